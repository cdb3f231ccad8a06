"""The weights of one model file and the context over them: nothing, the vocabulary alone, or all loaded.

Plans come from a Provision; events tell what it takes to fulfil them. Knows no prompt and no turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwq_local.backend.contexts import Contexts, Standing
from qwq_local.backend.provision import Provision
from qwq_local.engine.api import AbortFlag
from qwq_local.engine.model import LoadedModel, LoadSettings, drained, load_model
from qwq_local.engine.vocabulary import LlamaVocabulary
from qwq_local.errors import DoesNotFit
from qwq_local.events import Event, Loading, Notice
from qwq_local.models.header import special_token_ids
from qwq_local.planning.plan import Plan
from qwq_local.profiles.keys import Profile


@dataclass(frozen=True, slots=True)
class _Loaded:
    model: LoadedModel
    contexts: Contexts
    n_gpu_layers: int


class Weights:
    """What is loaded of a model file; free it with `close`, after everything that was made over it."""

    def __init__(
        self,
        path: Path,
        provision: Provision,
        profile: Profile,
        threads: int,
        abort: AbortFlag,
    ) -> None:
        self._path = path
        self._provision = provision
        self._profile = profile
        self._threads = threads
        self._abort = abort
        self._loaded: _Loaded | None = None
        self._words: LoadedModel | None = None

    @property
    def vocabulary(self) -> LlamaVocabulary:
        """The model's vocabulary, loaded alone while the weights are not. Raises Aborted."""
        if self._loaded is not None:
            return self._loaded.model.vocabulary
        if self._words is None:
            settings = LoadSettings(special_ids=self._special_ids, vocab_only=True)
            self._words = drained(load_model(self._path, settings, self._abort))
        return self._words.vocabulary

    def foreseen(self, prompt_tokens: int) -> Plan:
        """The plan that `ready` would fulfil. Raises DoesNotFit, PromptTooLong, UsageError."""
        if self._loaded is not None:
            try:
                return self._loaded.contexts.foreseen(prompt_tokens, self._loaded.n_gpu_layers)
            except DoesNotFit:
                if not self._gives_layers_back:
                    raise
        return self._provision.plan(prompt_tokens)

    @property
    def model(self) -> LoadedModel:
        """The loaded model."""
        assert self._loaded is not None
        return self._loaded.model

    def load(self, prompt_tokens: Callable[[], int], n_characters: int) -> Iterator[Event]:
        """Load what is not; how many layers a GPU gets hangs on the prompt.

        A prompt of so many characters is measured first where it might be too long: that is known long before
        the weights are there. Raises Aborted, DoesNotFit, PromptTooLong.
        """
        if self._loaded is None:
            limit = self._profile.n_ctx or self._provision.window.largest
            must_measure = self._provision.machine.gpus or n_characters > limit
            yield from self._load(self._provision.plan(prompt_tokens() if must_measure else 0))

    def ready(self, prompt_tokens: int) -> Generator[Event, None, Standing]:
        """A context for the prompt; when it takes fewer layers on the GPU the weights are loaded again."""
        assert self._loaded is not None
        try:
            return (yield from self._loaded.contexts.ready(prompt_tokens, self._loaded.n_gpu_layers))
        except DoesNotFit:
            if not self._gives_layers_back:
                raise
            plan = self._provision.plan(prompt_tokens)
        yield Notice(
            f"the weights are loaded again with {plan.n_gpu_layers} layers on the GPU, "
            f"not {self._loaded.n_gpu_layers}: the context needs the room."
        )
        self._unload()
        loaded = yield from self._load(plan)
        return (yield from loaded.contexts.ready(prompt_tokens, loaded.n_gpu_layers))

    def adopt(self, profile: Profile, threads: int, *, is_context_new: bool) -> None:
        """Go on under another profile, which loads the same weights; maybe with another context."""
        self._profile, self._threads = profile, threads
        if is_context_new and self._loaded is not None:
            self._loaded.contexts.outdate(threads)

    def drop_context(self) -> None:
        """Free the context: nobody knows what it holds."""
        if self._loaded is not None:
            self._loaded.contexts.close()

    def close(self) -> None:
        """Free the context, then the weights; closing twice is harmless."""
        self._unload()
        self._forget_words()

    @property
    def _gives_layers_back(self) -> bool:
        return bool(self._loaded and self._loaded.n_gpu_layers and self._profile.n_gpu_layers is None)

    @property
    def _special_ids(self) -> tuple[int, ...]:
        return special_token_ids(self._provision.header)

    def _load(self, plan: Plan) -> Generator[Event, None, _Loaded]:
        settings = LoadSettings(
            n_gpu_layers=plan.n_gpu_layers,
            use_mmap=self._profile.use_mmap,
            special_ids=self._special_ids,
            split=plan.placement.split,
        )
        loading = load_model(self._path, settings, self._abort)
        while True:
            try:
                yield Loading(self._provision.name, next(loading))
            except StopIteration as finished:
                model: LoadedModel = finished.value
                break
        self._forget_words()
        contexts = Contexts(model, self._provision, self._threads)
        self._loaded = _Loaded(model, contexts, plan.n_gpu_layers)
        return self._loaded

    def _unload(self) -> None:
        if self._loaded is not None:
            self._loaded.contexts.close()
            self._loaded.model.close()
            self._loaded = None

    def _forget_words(self) -> None:
        if self._words is not None:
            self._words.close()
            self._words = None
