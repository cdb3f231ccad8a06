"""What is loaded of one model file: nothing, the vocabulary alone, or the weights and one context over them.

The context follows the plans. A larger one at the same scaling copies the cached keys and values; another
scaling reads the prompt again, because keys are stored rotated. The old context is always freed first: two
of them rarely fit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_local.backend.planner import Planner
from qwq_local.engine.api import ContextSettings
from qwq_local.engine.context import LlamaContext, SequenceState
from qwq_local.engine.model import LoadedModel, LoadSettings, drained, load_model
from qwq_local.engine.scheduler import Scheduler
from qwq_local.engine.vocabulary import LlamaVocabulary
from qwq_local.errors import AbortFlag, DoesNotFit, QwqError
from qwq_local.events import Event, Loading, Notice
from qwq_local.models.header import special_token_ids
from qwq_local.planning.plan import Plan
from qwq_local.planning.summary import scaling_line, switch_line
from qwq_local.planning.window import Scaling
from qwq_local.profiles.keys import Profile


@dataclass(frozen=True, slots=True)
class ActiveContext:
    """A context, its scheduler, and the plan that it was made for."""

    context: LlamaContext
    scheduler: Scheduler
    plan: Plan

    def serves(self, plan: Plan) -> bool:
        """Whether it is large enough for another plan and scaled as that plan asks."""
        return self.plan.n_ctx >= plan.n_ctx and self.plan.rope == plan.rope

    def within(self, plan: Plan) -> Plan:
        """The budgets of another plan in this context."""
        n_ctx, placement = self.plan.n_ctx, self.plan.placement
        return replace(plan, n_ctx=n_ctx, placement=placement, uses=self.plan.uses)


class Contexts:
    """The one context over a loaded model; free it with `close`, before the model."""

    def __init__(self, model: LoadedModel, planner: Planner, threads: int) -> None:
        self._model = model
        self._planner = planner
        self._threads = threads
        self._active: ActiveContext | None = None
        self._is_outdated = False

    def expected_plan(self, prompt_tokens: int, loaded_layers: int) -> Plan:
        """The plan that `ready` follows if llama.cpp gets the memory. Raises as `ready` does."""
        plan = self._planner.plan(prompt_tokens, loaded_layers)
        active = self._active
        if active is None or self._is_outdated:
            return plan
        return active.within(plan) if active.serves(plan) else self._with_room_to_grow(active.plan, plan)

    def replace_next(self, threads: int) -> None:
        """The settings have changed: the next reply gets a new context."""
        self._threads = threads
        self._is_outdated = True

    def ready(self, prompt_tokens: int, loaded_layers: int) -> Generator[Notice, None, ActiveContext]:
        """A context for a prompt of this many tokens; the notices tell what had to change.

        Raises DoesNotFit when no smaller plan works either, and UsageError for settings that llama.cpp would
        refuse. The previous context is rebuilt then.
        """
        plan = self.expected_plan(prompt_tokens, loaded_layers)
        active = self._active
        if active is not None and not self._is_outdated and active.serves(plan):
            self._active = replace(active, plan=plan)
            return self._active
        saved = self._saved(plan)
        if active is not None and active.plan.rope != plan.rope:
            yield Notice(switch_line(active.plan, plan))
        elif active is None and plan.rope.is_on:
            yield Notice(scaling_line(plan))
        try:
            return (yield from self._build(plan, loaded_layers, saved))
        except QwqError:
            if active is not None:
                yield self._rebuild(active, saved)
            raise

    def close(self) -> None:
        """Free the context; closing twice is harmless."""
        if self._active is not None:
            self._active.scheduler.close()
            self._active.context.close()
            self._active = None

    def _build(
        self, plan: Plan, loaded_layers: int, saved: SequenceState | None
    ) -> Generator[Notice, None, ActiveContext]:
        """A context for the plan, or for the next smaller plan that llama.cpp gets the memory for."""
        self.close()
        while True:
            try:
                context = LlamaContext(self._model, self._settings(plan))
                break
            except DoesNotFit as refused:
                self._planner.note_failure(plan)
                smaller = self._smaller(plan, loaded_layers, refused)
                yield Notice(
                    f"a context of {plan.n_ctx:,} tokens with {plan.kv_type} KV does not fit; "
                    f"trying {smaller.n_ctx:,} tokens with {smaller.kv_type} KV."
                )
                plan = smaller
        self._is_outdated = False
        if saved is not None:
            context.sequences[0].restore(saved)
        return self._activate(context, plan)

    def _activate(self, context: LlamaContext, plan: Plan) -> ActiveContext:
        profile = self._planner.profile
        scheduler = Scheduler(context, prefill_gap=profile.prefill_gap, prefill_chunk=profile.prefill_chunk)
        self._active = ActiveContext(context, scheduler, plan)
        return self._active

    def _smaller(self, failed: Plan, loaded_layers: int, refused: DoesNotFit) -> Plan:
        """The next smaller plan. Raises llama.cpp's reason when there is none."""
        try:
            return self._planner.plan(failed.needs.prompt_tokens, loaded_layers)
        except DoesNotFit as none_left:
            raise DoesNotFit(f"{refused} {none_left}") from None

    def _rebuild(self, previous: ActiveContext, saved: SequenceState | None) -> Notice:
        context = LlamaContext(self._model, previous.context.settings)
        self._activate(context, previous.plan)
        is_restored = saved is not None and context.sequences[0].restore(saved)
        again = "" if is_restored else "; the next question reads its prompt again"
        return Notice(f"the context of {previous.plan.n_ctx:,} tokens is back{again}.")

    def _saved(self, plan: Plan) -> SequenceState | None:
        """A copy of what is cached, if the host memory holds it while the context is rebuilt."""
        if self._active is None or not (sequence := self._active.context.sequences[0]).tokens:
            return None
        host = plan.uses[-1]
        return sequence.saved_state() if sequence.state_bytes <= host.free else None

    def _with_room_to_grow(self, before: Plan, plan: Plan) -> Plan:
        """The plan with twice the previous context, if that reduces nothing else."""
        window = self._planner.window.tokens(plan.rope.factor)
        n_ctx = min(2 * before.n_ctx, window)
        if before.rope != plan.rope or plan.n_ctx >= n_ctx or plan.needs.n_ctx is not None:
            return plan
        return self._planner.enlarged(plan, n_ctx) or plan

    def _settings(self, plan: Plan) -> ContextSettings:
        shape = plan.placement.context
        return ContextSettings(
            n_ctx=plan.n_ctx,
            n_batch=shape.n_batch,
            n_ubatch=shape.n_ubatch,
            kv_type_k=shape.kv_type_k,
            kv_type_v=shape.kv_type_v,
            flash_attention=shape.flash_attention,
            yarn_factor=plan.rope.factor,
            yarn_origin=plan.rope.origin,
            is_linear=plan.rope.kind is Scaling.LINEAR,
            threads=self._threads,
        )


@dataclass(frozen=True, slots=True)
class _Loaded:
    model: LoadedModel
    contexts: Contexts
    n_gpu_layers: int


class Weights:
    """What is loaded of a model file; free it with `close`."""

    def __init__(
        self, path: Path, planner: Planner, profile: Profile, threads: int, abort: AbortFlag
    ) -> None:
        self._path = path
        self._planner = planner
        self._profile = profile
        self._threads = threads
        self._abort = abort
        self._loaded: _Loaded | None = None
        self._vocabulary_only: LoadedModel | None = None

    @property
    def vocabulary(self) -> LlamaVocabulary:
        """The model's vocabulary, loaded alone while the weights are not. Raises Aborted."""
        if self._loaded is not None:
            return self._loaded.model.vocabulary
        if self._vocabulary_only is None:
            settings = LoadSettings(special_ids=self._special_ids, vocab_only=True)
            self._vocabulary_only = drained(load_model(self._path, settings, self._abort))
        return self._vocabulary_only.vocabulary

    def expected_plan(self, prompt_tokens: int) -> Plan:
        """The plan that `ready` follows. Raises DoesNotFit, PromptTooLong, UsageError."""
        if self._loaded is not None:
            try:
                return self._loaded.contexts.expected_plan(prompt_tokens, self._loaded.n_gpu_layers)
            except DoesNotFit:
                if not self._can_free_layers:
                    raise
        return self._planner.plan(prompt_tokens)

    def load(self, prompt_tokens: Callable[[], int], n_characters: int) -> Iterator[Event]:
        """Load the weights, if they are not. How many layers go to a GPU depends on the prompt.

        A prompt of `n_characters` that might be too long is counted first: its vocabulary loads much faster
        than the weights. Raises Aborted, DoesNotFit, PromptTooLong.
        """
        if self._loaded is None:
            limit = self._profile.n_ctx or self._planner.window.largest
            must_count = self._planner.machine.gpus or n_characters > limit
            yield from self._load(self._planner.plan(prompt_tokens() if must_count else 0))

    def ready(self, prompt_tokens: int) -> Generator[Event, None, ActiveContext]:
        """A context for the prompt. If it leaves less room on the GPU, the weights are loaded again."""
        assert self._loaded is not None
        try:
            return (yield from self._loaded.contexts.ready(prompt_tokens, self._loaded.n_gpu_layers))
        except DoesNotFit:
            if not self._can_free_layers:
                raise
            plan = self._planner.plan(prompt_tokens)
        yield Notice(
            f"the weights are loaded again with {plan.n_gpu_layers} layers on the GPU, "
            f"not {self._loaded.n_gpu_layers}: the context needs the room."
        )
        self._unload()
        loaded = yield from self._load(plan)
        return (yield from loaded.contexts.ready(prompt_tokens, loaded.n_gpu_layers))

    def adopt(self, profile: Profile, threads: int, *, is_context_new: bool) -> None:
        """Use another profile, which loads the same weights; `is_context_new` if not the same context."""
        self._profile, self._threads = profile, threads
        if is_context_new and self._loaded is not None:
            self._loaded.contexts.replace_next(threads)

    def drop_context(self) -> None:
        """Free the context, after an error that leaves its content unknown."""
        if self._loaded is not None:
            self._loaded.contexts.close()

    def close(self) -> None:
        """Free the context, then the weights; closing twice is harmless."""
        self._unload()
        self._unload_vocabulary()

    @property
    def _can_free_layers(self) -> bool:
        return bool(self._loaded and self._loaded.n_gpu_layers and self._profile.n_gpu_layers is None)

    @property
    def _special_ids(self) -> tuple[int, ...]:
        return special_token_ids(self._planner.header)

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
                yield Loading(self._planner.name, next(loading))
            except StopIteration as finished:
                model: LoadedModel = finished.value
                break
        self._unload_vocabulary()
        self._loaded = _Loaded(model, Contexts(model, self._planner, self._threads), plan.n_gpu_layers)
        return self._loaded

    def _unload(self) -> None:
        if self._loaded is not None:
            self._loaded.contexts.close()
            self._loaded.model.close()
            self._loaded = None

    def _unload_vocabulary(self) -> None:
        if self._vocabulary_only is not None:
            self._vocabulary_only.close()
            self._vocabulary_only = None
