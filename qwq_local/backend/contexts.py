"""The context over loaded weights, and how it follows its plans: kept, grown, rebuilt, or taken back.

A larger context at the same scaling takes over the cached tokens by copying their keys and values. Another
scaling needs another prefill, since keys are stored rotated. The old context is always freed first: two of
them do not fit on the devices that this is for.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

from qwq_local.backend.provision import Provision
from qwq_local.engine.api import ContextSettings
from qwq_local.engine.context import LlamaContext, SequenceState
from qwq_local.engine.model import LoadedModel
from qwq_local.engine.scheduler import Scheduler
from qwq_local.errors import DoesNotFit, QwqError
from qwq_local.events import Notice
from qwq_local.planning.plan import Plan
from qwq_local.planning.summary import scaling_line, switch_line
from qwq_local.planning.window import Scaling


@dataclass(frozen=True, slots=True)
class Standing:
    """A context, its scheduler, and the plan that it fulfils."""

    context: LlamaContext
    scheduler: Scheduler
    plan: Plan


class Contexts:
    """The one context there is at a time; free it with `close`, before its model."""

    def __init__(self, model: LoadedModel, provision: Provision, threads: int) -> None:
        self._model = model
        self._provision = provision
        self._threads = threads
        self._standing: Standing | None = None
        self._is_outdated = False

    def foreseen(self, prompt_tokens: int, loaded_layers: int) -> Plan:
        """The plan that `ready` would fulfil if all the memory can be had. Raises as it does."""
        plan = self._provision.plan(prompt_tokens, loaded_layers)
        standing = self._standing
        if standing is None or self._is_outdated:
            return plan
        return _within(standing, plan) if _serves(standing, plan) else self._grown(standing.plan, plan)

    def outdate(self, threads: int) -> None:
        """The settings changed: the next context is a new one, with what the old one holds if that fits."""
        self._threads = threads
        self._is_outdated = True

    def ready(self, prompt_tokens: int, loaded_layers: int) -> Generator[Notice, None, Standing]:
        """A context for a prompt of so many tokens; notices tell what had to change.

        Raises DoesNotFit when no smaller plan can be had either, and UsageError for settings that llama.cpp
        would refuse; the context that there was is then back.
        """
        plan = self.foreseen(prompt_tokens, loaded_layers)
        standing = self._standing
        if standing is not None and not self._is_outdated and _serves(standing, plan):
            self._standing = replace(standing, plan=plan)
            return self._standing
        saved = self._saved(plan)
        if standing is not None and standing.plan.rope != plan.rope:
            yield Notice(switch_line(standing.plan, plan))
        elif standing is None and plan.rope.is_on:
            yield Notice(scaling_line(plan))
        try:
            return (yield from self._build(plan, loaded_layers, saved))
        except QwqError:
            if standing is not None:
                yield from self._bring_back(standing, saved)
            raise

    def close(self) -> None:
        """Free the context; closing twice is harmless."""
        if self._standing is not None:
            self._standing.scheduler.close()
            self._standing.context.close()
            self._standing = None

    def _build(
        self, plan: Plan, loaded_layers: int, saved: SequenceState | None
    ) -> Generator[Notice, None, Standing]:
        """A context for the plan, or for the next smaller ones when the memory cannot be had."""
        self.close()
        while True:
            try:
                context = LlamaContext(self._model, self._settings(plan))
                break
            except DoesNotFit as refused:
                self._provision.could_not_be_had(plan)
                smaller = self._smaller(plan, loaded_layers, refused)
                yield Notice(
                    f"a context of {plan.n_ctx:,} tokens with {plan.kv_type} KV could not be had; "
                    f"trying {smaller.n_ctx:,} tokens with {smaller.kv_type} KV."
                )
                plan = smaller
        self._standing = Standing(context, Scheduler(context), plan)
        self._is_outdated = False
        if saved is not None:
            context.sequences[0].restore(saved)
        return self._standing

    def _smaller(self, failed: Plan, loaded_layers: int, refused: DoesNotFit) -> Plan:
        """The next smaller plan. Raises what llama.cpp said when there is none."""
        try:
            return self._provision.plan(failed.needs.prompt_tokens, loaded_layers)
        except DoesNotFit as none_left:
            raise DoesNotFit(f"{refused} {none_left}") from None

    def _bring_back(self, standing: Standing, saved: SequenceState | None) -> Generator[Notice, None, None]:
        context = LlamaContext(self._model, standing.context.settings)
        self._standing = Standing(context, Scheduler(context), standing.plan)
        was_kept = saved is not None and context.sequences[0].restore(saved)
        read_anew = "" if was_kept else "; what it held is read again with the next question"
        yield Notice(f"the context of {standing.plan.n_ctx:,} tokens is back{read_anew}.")

    def _saved(self, plan: Plan) -> SequenceState | None:
        """What is cached now, when there is room to keep it aside while the context is rebuilt."""
        if self._standing is None or not (sequence := self._standing.context.sequences[0]).tokens:
            return None
        host = plan.uses[-1]
        if sequence.state_bytes > host.free:
            return None
        return sequence.saved_state()

    def _grown(self, before: Plan, plan: Plan) -> Plan:
        """The plan with twice the context that there is, to grow into, where that is free of sacrifice."""
        window = self._provision.window.tokens(plan.rope.factor)
        n_ctx = min(2 * before.n_ctx, window)
        if before.rope != plan.rope or plan.n_ctx >= n_ctx or plan.needs.n_ctx is not None:
            return plan
        larger = self._provision.enlarged(plan, n_ctx)
        return plan if larger is None else larger

    def _settings(self, plan: Plan) -> ContextSettings:
        context = plan.placement.context
        return ContextSettings(
            n_ctx=plan.n_ctx,
            n_batch=context.n_batch,
            n_ubatch=context.n_ubatch,
            kv_type_k=context.kv_type_k,
            kv_type_v=context.kv_type_v,
            flash_attention=context.flash_attention,
            yarn_factor=plan.rope.factor,
            yarn_origin=plan.rope.origin,
            is_linear=plan.rope.kind is Scaling.LINEAR,
            threads=self._threads,
        )


def _serves(standing: Standing, plan: Plan) -> bool:
    """Whether the context there is will do: large enough, and scaled as the plan wants it."""
    return standing.plan.n_ctx >= plan.n_ctx and standing.plan.rope == plan.rope


def _within(standing: Standing, plan: Plan) -> Plan:
    """The new plan's budgets in the context that there is."""
    shares = replace(plan.shares, n_ctx=standing.plan.n_ctx)
    return replace(plan, shares=shares, placement=standing.plan.placement, uses=standing.plan.uses)
