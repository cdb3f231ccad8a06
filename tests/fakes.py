"""Fakes that tests pass in: a vocabulary, and an engine that replays a queue of pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qwq_local.dialogue.control import Opening, ReplyControl
from qwq_local.dialogue.reply import Reply, ReplySettings
from qwq_local.engine.api import CutBack, End, Force, Pause, PrefillProgress, Sample
from qwq_local.errors import Aborted, AbortFlag
from qwq_local.events import Event

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
        """The text of the tokens."""
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")


@dataclass
class FakeMatcher:
    """A matcher that records the tokens sampled under it."""

    seen: list[int] = field(default_factory=list)


class QueuedEngine:
    """An engine that samples given pieces, then the end of the turn, and keeps a cache of tokens."""

    def __init__(
        self,
        pieces: Sequence[str | bytes],
        n_ctx: int = 4096,
        abort: AbortFlag | None = None,
        abort_after: int = -1,
    ) -> None:
        self.vocabulary = FakeVocabulary()
        self.n_ctx = n_ctx
        self.remembered: list[int] = []
        self.matcher = FakeMatcher()
        self.abort = AbortFlag() if abort is None else abort
        self.sampled = 0
        self._cache: list[int] = []
        self._queue = [self.vocabulary.token_of(piece) for piece in pieces]
        self._abort_after = abort_after

    @property
    def tokens(self) -> Sequence[int]:
        """The cached tokens."""
        return self._cache

    @property
    def cached_text(self) -> str:
        """The text of the cached tokens."""
        return self.vocabulary.text(self._cache)

    def prefill(self, tokens: Sequence[int]) -> Iterator[PrefillProgress]:
        """Take the tokens in two steps."""
        if self.abort:
            raise Aborted
        half = len(tokens) // 2
        yield PrefillProgress(half, len(tokens), 0)
        self._cache = list(tokens)
        yield PrefillProgress(len(tokens), len(tokens), 0)

    def force(self, tokens: Sequence[int]) -> None:
        """Cache tokens that were not sampled."""
        self._cache += tokens

    def sample(self) -> int:
        """The next of the queue."""
        if self.sampled == self._abort_after:
            self.abort.set()
        self.sampled += 1
        token = self._queue.pop(0) if self._queue else _SPECIAL[END]
        self.remembered.append(token)
        return token

    def append(self, token: int) -> None:
        """Cache the token."""
        if self.abort:
            raise Aborted
        assert len(self._cache) < self.n_ctx, "the reply must not run past the window"
        self._cache.append(token)

    def truncate(self, n_tokens: int) -> None:
        """Drop the tokens from a position on."""
        del self._cache[n_tokens:]


def play(
    engine: QueuedEngine,
    settings: ReplySettings,
    prompt: Sequence[int],
    opening: Opening | None = None,
    *,
    control: ReplyControl | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Event]:
    """The events of a reply that a queued engine generates, as the scheduler runs it."""
    opening = opening or Opening(tuple(prompt))
    reply = Reply(engine.vocabulary, replace(settings, window=engine.n_ctx), opening, control, clock)
    is_stopped = False
    try:
        if not reply.is_over:
            for progress in engine.prefill([*opening.prompt, *reply.generated]):
                yield from reply.prefilled(progress)
            yield from _decoded(engine, reply)
    except Aborted:
        is_stopped = True
    yield from reply.finish(is_stopped=is_stopped)


def _decoded(engine: QueuedEngine, reply: Reply) -> Iterator[Event]:
    engine.remembered = list(reply.generated)
    while True:
        match reply.next():
            case Sample(is_constrained):
                token = engine.sample()
                if is_constrained:
                    engine.matcher.seen.append(token)
                yield from reply.took((token,))
                if not engine.vocabulary.is_end(token):
                    engine.append(token)
            case Force(tokens):
                engine.force(tokens)
                yield from reply.took(tokens)
                engine.remembered = list(reply.generated)
            case CutBack(n_tokens):
                engine.truncate(n_tokens)
                engine.remembered = list(reply.generated)
            case Pause():
                while not reply.wait(0.02):
                    if engine.abort:
                        raise Aborted
            case End():
                return
