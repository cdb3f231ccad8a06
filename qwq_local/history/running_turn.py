"""A running turn: the record that it began as and the events since, as one record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qwq_local.events import (
    Answer,
    Event,
    Finished,
    FinishReason,
    Generated,
    Planned,
    Prompted,
    Steered,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.history.records import (
    AnswerPart,
    ThinkingPart,
    TokenRun,
    ToolCallPart,
    ToolResultPart,
    TurnOrigin,
    TurnRecord,
    TurnState,
)
from qwq_local.wire import plain

TurnEvent = Planned | Prompted | Thinking | Steered | Answer | Generated | ThinkingClosed | Finished
"""The events that change a turn's record."""

_CUT = frozenset({FinishReason.INTERRUPTED, FinishReason.MAX_TOKENS, FinishReason.CONTEXT})


class RunningTurn:
    """Takes events and gives the turn as it stands.

    Thinking and answer after the last part of a tool grow, the parts before stay. A turn that is continued
    keeps its plan; its seconds are added. `thinking_s` is set from outside: events do not carry the time.
    """

    def __init__(self, begun: TurnRecord) -> None:
        n_kept = 1 + max(
            (i for i, part in enumerate(begun.parts) if isinstance(part, ToolCallPart | ToolResultPart)),
            default=-1,
        )
        self._begun = begun
        self._kept = begun.parts[:n_kept]
        rest = replace(begun, parts=begun.parts[n_kept:])
        self._n_kept_tokens = len(begun.generated) - len(rest.generated)
        self._thinking, self._answer, self._steered = [rest.thinking], [rest.answer], list(rest.steered)
        self._tokens, self._n_thinking = TokenRun(), 0
        for part in rest.parts:
            self._tokens = self._tokens.followed_by(part.tokens)
            if isinstance(part, ThinkingPart):
                self._n_thinking = len(self._tokens.ids)
        self._thinking_tokens: int | None = None  # unknown before the first ids
        self._record = begun
        self.thinking_s = begun.thinking_s

    @property
    def has_ended(self) -> bool:
        """Whether it finished or was stopped."""
        return self._record.state is not TurnState.RUNNING

    def take(self, event: Event) -> None:
        """The next event."""
        match event:
            case Planned():
                if not self._begun.plan:
                    self._change(plan=plain(event))
            case Prompted():
                self._change(prompt=event.tokens)
            case Thinking():
                self._thinking.append(event.text)
            case Steered():
                self._thinking.append(event.text)
                self._steered.append(event.text)
            case Answer():
                self._answer.append(event.text)
            case Generated():
                self._take_tokens(event)
            case ThinkingClosed():
                self.thinking_s = self._begun.thinking_s + event.elapsed_s
                self._change(closed=event.reason)
            case Finished():
                self._thinking, self._answer = [event.thinking], [event.answer]
                self._change(
                    state=TurnState.STOPPED if event.reason in _CUT else TurnState.DONE,
                    reason=event.reason,
                    stats=_added(self._begun.stats, event.stats),
                )
            case _:
                pass

    def set_origin(self, origin: TurnOrigin) -> None:
        """What it is computed with."""
        self._change(origin=origin)

    def stop(self, state: TurnState, reason: FinishReason | None) -> None:
        """End it without Finished."""
        self._change(stats=self._stats, state=state, reason=reason)

    @property
    def record(self) -> TurnRecord:
        """The turn as it stands, with the figures that its events tell so far."""
        thinking = ThinkingPart(
            "".join(self._thinking), tuple(self._steered), self._tokens.part(0, self._n_thinking)
        )
        answer = AnswerPart("".join(self._answer), self._tokens.part(self._n_thinking))
        grown = tuple(part for part in (thinking, answer) if part.text or part.tokens.ids)
        stats = self._record.stats if self.has_ended else self._stats
        return replace(self._record, parts=self._kept + grown, stats=stats, thinking_s=self.thinking_s)

    @property
    def _stats(self) -> TurnStats:
        stats = self._begun.stats
        stats = replace(stats, prompt_tokens=len(self._record.prompt) or stats.prompt_tokens)
        if self._thinking_tokens is None:
            return stats
        n_answer = self._n_kept_tokens + len(self._tokens.ids) - self._thinking_tokens
        return replace(stats, thinking_tokens=self._thinking_tokens, answer_tokens=max(0, n_answer))

    def _take_tokens(self, event: Generated) -> None:
        new = TokenRun(event.tokens, event.sampled or None, event.logprobs)
        self._tokens = self._tokens.part(0, event.start - self._n_kept_tokens).followed_by(new)
        self._thinking_tokens = event.thinking
        self._n_thinking = max(0, event.thinking - self._n_kept_tokens)

    def _change(self, **changes: Any) -> None:
        self._record = replace(self._record, **changes)


def _added(before: TurnStats, now: TurnStats) -> TurnStats:
    """The figures of a continued turn: `now` counts all its tokens, but only the seconds since."""
    if not before.decode_s:  # the process died and its seconds are unknown
        return now
    return replace(
        now,
        prefill_s=before.prefill_s + now.prefill_s,
        decode_s=before.decode_s + now.decode_s,
        cached_tokens=before.cached_tokens,
        resumed_tokens=0,
        resumed_cached=0,
    )
