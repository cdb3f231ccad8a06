"""What a person can do after a turn that was cut, closed or switched: its end and its plan in, lines out."""

from __future__ import annotations

from collections.abc import Iterator

from qwq_local.events import CloseReason, FinishReason, Planned
from qwq_local.planning.window import Window
from qwq_local.profiles.keys import Profile


def mends(
    closed: CloseReason | None,
    reason: FinishReason | None,
    plans: tuple[Planned | None, Planned],
    profile: Profile,
) -> Iterator[str]:
    """The lines after a turn: how its thinking and it ended, and its plan after that of the turn before."""
    before, planned = plans
    if closed is not None and reason is not FinishReason.INTERRUPTED:
        yield from _of_the_thinking(closed, planned)
    if reason is not None:
        yield from _of_the_answer(reason, planned, profile)
    factor = before.yarn_factor if before is not None else 1.0
    if planned.yarn_factor > max(factor, 1.0):
        yield (
            f"YaRN {planned.yarn_factor:g} is on from here: /drop leaves out the oldest turns, "
            "/clear begins anew without it."
        )


def _of_the_thinking(closed: CloseReason, planned: Planned) -> Iterator[str]:
    match closed:
        case CloseReason.BUDGET:
            yield (
                f"the thinking was ended at its budget of {planned.thinking_budget:,} tokens: "
                "/set thinking_budget N, then /regen."
            )
        case CloseReason.CONTEXT:
            yield (
                f"the thinking was ended, the context of {planned.n_ctx:,} tokens was nearly full: "
                "/drop leaves out the oldest turns, then /regen."
            )
        case CloseReason.LOOP:
            yield "the thinking repeated itself and was cut: /regen tries another seed."
        case _:
            return


def _of_the_answer(reason: FinishReason, planned: Planned, profile: Profile) -> Iterator[str]:
    match reason:
        case FinishReason.MAX_TOKENS:
            yield (
                f"the answer was cut at max_tokens, {profile.max_tokens:,}: /continue goes on, "
                "/set max_tokens N raises it."
            )
        case FinishReason.CONTEXT:
            yield f"the answer was cut, the context of {planned.n_ctx:,} tokens is full: {_mend(profile)}"
        case FinishReason.LOOP:
            yield "the answer was ended, it repeated itself: /regen tries another seed."
        case FinishReason.NO_ANSWER:
            yield "no answer came out of the thinking: /continue goes on, /regen tries another seed."
        case FinishReason.STOP | FinishReason.INTERRUPTED:
            return


def _mend(profile: Profile) -> str:
    window = Window(profile.native_window, profile.yarn_factors, profile.yarn)
    if profile.n_ctx is not None and profile.n_ctx < window.largest:
        return "/set n_ctx default, then /continue."
    larger = [factor for factor in sorted(window.factors) if factor > window.allowed_factors[-1]]
    if larger:
        return f"/set yarn {larger[0]:g}, then /continue."
    return "/drop leaves out the oldest turns, then /regen."
