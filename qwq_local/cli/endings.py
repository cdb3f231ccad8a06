"""How a turn's end becomes an exit status and a line for the person: reason and profile in, those out."""

from __future__ import annotations

from dataclasses import replace

from qwq_local.errors import ExitStatus
from qwq_local.events import FinishReason, Planned, TurnStats
from qwq_local.planning.window import Window, larger_factor
from qwq_local.planning.words import ledger_line
from qwq_local.profiles.layers import Profile

STATUS = {
    FinishReason.STOP: ExitStatus.ANSWERED,
    FinishReason.MAX_TOKENS: ExitStatus.CUT,
    FinishReason.CONTEXT: ExitStatus.CUT,
    FinishReason.LOOP: ExitStatus.CUT,
    FinishReason.NO_ANSWER: ExitStatus.NO_ANSWER,
    FinishReason.INTERRUPTED: ExitStatus.INTERRUPTED,
}

_ENDINGS = {
    FinishReason.MAX_TOKENS: "the answer was cut at max_tokens. Raise it: --set max_tokens=N (0: no limit).",
    FinishReason.LOOP: "the answer was ended: it repeated itself. Another --seed may do better.",
    FinishReason.NO_ANSWER: "no answer came out of the thinking. Another --seed may do better.",
}


def ending(reason: FinishReason, profile: Profile) -> str:
    """Why there is less of an answer than there should be and what would help, or nothing."""
    if reason is not FinishReason.CONTEXT:
        return _ENDINGS.get(reason, "")
    window = Window(profile.native_window, profile.yarn_factors, profile.yarn)
    if profile.n_ctx is not None and profile.n_ctx < window.largest:
        return f"the answer was cut: the context of {profile.n_ctx:,} tokens is full. Leave out n_ctx."
    mend = larger_factor(window.largest + 1, window) or (
        " Raise answer_reserve, or shorten the prompt." if window.yarn is None else " Shorten the prompt."
    )
    return f"the answer was cut: its context is full.{mend}"


def final_ledger(planned: Planned, stats: TurnStats) -> str:
    """The ledger after the turn: what was thought and said is no longer free."""
    said = stats.thinking_tokens + stats.answer_tokens
    ledger = replace(planned.ledger, free=max(0, planned.ledger.free - said))
    return f"{ledger_line(ledger, planned.n_ctx)} · this turn {said:,}"
