"""Fakes that tests pass in: an engine that replays a queue of pieces, a clock that is told the time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qwq_local.engine.api import (
    Aborted,
    AbortFlag,
    ContextSettings,
    Grammar,
    PrefillProgress,
    SamplerSettings,
)

END = "<|im_end|>"
CLOSE = "</think>"
_SPECIAL = {"<|im_start|>": 1, "<think>": 2, CLOSE: 3, END: 4}
_FIRST_CHARACTER = 0x1000


class FakeVocabulary:
    """One token per character of plain text; a scripted piece of several characters is a token too."""

    def __init__(self) -> None:
        self._pieces: dict[int, bytes] = {token: piece.encode() for piece, token in _SPECIAL.items()}

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The four tags."""
        return _SPECIAL

    def encode_text(self, text: str) -> list[int]:
        """One token a character."""
        return [_FIRST_CHARACTER + ord(character) for character in text]

    def piece(self, token: int) -> bytes:
        """The bytes of a token."""
        if token in self._pieces:
            return self._pieces[token]
        return chr(token - _FIRST_CHARACTER).encode()

    def is_end(self, token: int) -> bool:
        """Whether it is the end of the turn."""
        return token == _SPECIAL[END]

    def token_of(self, piece: str | bytes) -> int:
        """The token that a scripted piece is sampled as."""
        if isinstance(piece, str) and piece in _SPECIAL:
            return _SPECIAL[piece]
        raw = piece.encode() if isinstance(piece, str) else piece
        for token, known in self._pieces.items():
            if known == raw:
                return token
        token = 0x200000 + len(self._pieces)
        self._pieces[token] = raw
        return token

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens say together."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")


@dataclass
class FakeGrammar:
    """Keeps the tokens that were sampled under it."""

    seen: list[int] = field(default_factory=list)

    def reset(self) -> None:
        """Forget them."""
        self.seen.clear()


class QueuedEngine:
    """An Engine whose samples are the pieces it was given; it ends the turn when they run out."""

    def __init__(
        self,
        pieces: Sequence[str | bytes],
        n_ctx: int = 4096,
        abort: AbortFlag | None = None,
        abort_after: int = -1,
    ) -> None:
        self.vocabulary = FakeVocabulary()
        self.settings = ContextSettings(n_ctx=n_ctx)
        self.sampler: SamplerSettings | None = None
        self.remembered: list[int] = []
        self._cache: list[int] = []
        self._queue = [self.vocabulary.token_of(piece) for piece in pieces]
        self._abort = abort or AbortFlag()
        self._abort_after = abort_after
        self.sampled = 0

    @property
    def tokens(self) -> Sequence[int]:
        """The cached tokens."""
        return self._cache

    @property
    def cached_text(self) -> str:
        """What the cached tokens say."""
        return self.vocabulary.text(self._cache)

    def prefill(self, tokens: Sequence[int]) -> Iterator[PrefillProgress]:
        """Take the tokens in two steps."""
        if self._abort:
            raise Aborted
        half = len(tokens) // 2
        yield PrefillProgress(half, len(tokens), 0)
        self._cache = list(tokens)
        yield PrefillProgress(len(tokens), len(tokens), 0)

    def start_sampling(self, settings: SamplerSettings) -> None:
        """Remember the settings."""
        self.sampler = settings
        self.remembered = []

    def remember(self, tokens: Sequence[int]) -> None:
        """Keep the tokens."""
        self.remembered = list(tokens)

    def sample(self, grammar: Grammar | None = None) -> int:
        """The next of the queue."""
        if self.sampled == self._abort_after:
            self._abort.set()
        self.sampled += 1
        token = self._queue.pop(0) if self._queue else _SPECIAL[END]
        self.remembered.append(token)
        if isinstance(grammar, FakeGrammar):
            grammar.seen.append(token)
        return token

    def append(self, token: int) -> None:
        """Cache the token."""
        if self._abort:
            raise Aborted
        assert len(self._cache) < self.settings.n_ctx, "the turn must not run past the window"
        self._cache.append(token)

    def truncate(self, n_tokens: int) -> None:
        """Drop the tokens from a position on."""
        del self._cache[n_tokens:]
