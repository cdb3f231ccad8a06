"""A context of one sequence that tests prefill, sample and decode step by step, without a scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwq_local.engine.api import ContextSettings, PrefillProgress, SamplerSettings
from qwq_local.engine.constraint import ConstraintMatcher
from qwq_local.engine.context import CachedSequence, LlamaContext, Rows, common_prefix
from qwq_local.engine.library import library
from qwq_local.engine.model import LoadedModel
from qwq_local.engine.sampler import SamplerChain
from qwq_local.engine.vocabulary import LlamaVocabulary
from qwq_local.errors import AbortFlag


class SingleSequence(CachedSequence):
    """The first sequence of a context of its own; free it with `close`, before its model."""

    def __init__(
        self,
        model: LoadedModel,
        settings: ContextSettings,
        abort: AbortFlag | None = None,
        context: LlamaContext | None = None,
    ) -> None:
        """With a `context`, its first sequence."""
        self.context = context or LlamaContext(model, settings)
        super().__init__(library(), self.context.handle, 0, self.context.settings)
        self.tokens, self.cells = self.context.sequences[0].tokens, self.context.sequences[0].cells
        self.context.sequences = (self,)
        self._abort = abort
        self._chain: SamplerChain | None = None

    @property
    def vocabulary(self) -> LlamaVocabulary:
        """The model's."""
        return self.context.vocabulary

    def prefill(self, tokens: Sequence[int]) -> Iterator[PrefillProgress]:
        """Hold exactly these tokens, keeping the longest common prefix; logits follow the last."""
        cached = min(common_prefix(self.tokens, tokens), len(tokens) - 1)
        self.truncate(cached)
        yield PrefillProgress(cached, len(tokens), cached)
        while (done := len(self.tokens)) < len(tokens):
            chunk = tokens[done : done + self.settings.n_batch]
            (self.row,) = self.context.decode([Rows(0, chunk)], self._abort)
            yield PrefillProgress(len(self.tokens), len(tokens), cached)

    def start_sampling(self, settings: SamplerSettings) -> None:
        """Begin a new sampler chain."""
        if self._chain is not None:
            self._chain.close()
        self._chain = self.context.new_chain(settings)

    def remember(self, tokens: Sequence[int]) -> None:
        """Let penalties look back at these tokens."""
        assert self._chain is not None
        self._chain.remember(tokens)

    def sample(self, matcher: ConstraintMatcher | None = None) -> int:
        """The next token; it is not cached yet."""
        assert self._chain is not None
        return self.context.sample(self._chain, self.row, matcher)

    def append(self, token: int) -> None:
        """Decode one token."""
        (self.row,) = self.context.decode([Rows(0, (token,))], self._abort)

    def close(self) -> None:
        """Free the chain and the context."""
        if self._chain is not None:
            self._chain.close()
            self._chain = None
        self.context.close()
