"""How a text that no context holds is cut into parts for a question.

Parts are as large as the largest context allows beside the question, the thinking and the answer, and as the
memory allows without taking layers off a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from qwq_local.backend.api import Backend, CountsTokens, Plans, ReplyRequest
from qwq_local.dialogue.conversation import Attachment, Framing, fence
from qwq_local.dialogue.excerpts import Excerpt, Measure, Sources, cut
from qwq_local.engine.api import AnswerConstraint
from qwq_local.errors import Aborted, DoesNotFit, PromptTooLong, UsageError
from qwq_local.events import Planned
from qwq_local.planning.window import CLOSING

PART_NOTE = (
    "The text above is part {part} of {parts} of a longer one. Answer from this part alone, with whatever in "
    "it matters to the question; if nothing in it does, say only that."
)
JOIN_NOTE = (
    "Above are answers to one question, each of them from other parts of a text that is too long to be read "
    "at once. Put together what they say, and answer the question from them alone."
)
LEAST_ROOM = 64
MOST_OVERLAP = 512
# Byte pairs merge otherwise where texts meet, and numbers have more digits.
MARGIN = 32
# Tokens that the answer of a pass is expected to have.
_ANSWERED = 400
_SHRINKS = 0.75


@runtime_checkable
class SplitBackend(Backend, Plans, CountsTokens, Protocol):
    """A backend that can answer a text in parts: it counts tokens and plans."""


@dataclass(frozen=True, slots=True)
class SplitRequest:
    """What is asked: texts, and a question with its framing. Only the last answer obeys the constraint."""

    framing: Framing
    stdin_text: str
    question: str
    constraint: AnswerConstraint | None = None

    def whole(self) -> ReplyRequest:
        """Everything as one question."""
        messages = self.framing.messages(self.question, self.stdin_text)
        return ReplyRequest(messages, self.constraint, files=tuple(map(fence, self.framing.attachments)))

    def of_part(self, excerpt: Excerpt, part: int, parts: int) -> ReplyRequest:
        """The question to one part of the text."""
        return self._noted(excerpt, PART_NOTE.format(part=part, parts=parts))

    def of_answers(self, answers: Sequence[Attachment], constraint: AnswerConstraint | None) -> ReplyRequest:
        """The question to the answers of several parts."""
        return replace(self._noted(Excerpt(tuple(answers), ""), JOIN_NOTE), constraint=constraint)

    def _noted(self, excerpt: Excerpt, note: str) -> ReplyRequest:
        framing = replace(self.framing, attachments=excerpt.attachments)
        messages = framing.messages(f"{note}\n\n{self.question}", excerpt.stdin_text)
        return ReplyRequest(messages, files=tuple(map(fence, excerpt.attachments)))


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """How a text is asked: its parts and the plan for the largest.

    Without excerpts the text fits and is asked in one pass. `tokens` are those of all parts, `room` those
    that one part, or answers together, may have.
    """

    planned: Planned
    excerpts: tuple[Excerpt, ...] = ()
    tokens: int = 0
    room: int = 0
    overlap: int = 0

    @property
    def passes(self) -> int:
        """How many passes there are if answers have the usual length."""
        left = passes = max(1, len(self.excerpts))
        while left > 1:
            left = -(-left // max(2, self.room // _ANSWERED))
            passes += left
        return passes


@dataclass(frozen=True, slots=True)
class SplitPlanned:
    """The text is asked in parts: how many there are, of how many tokens; `tokens` are those of all parts."""

    parts: int
    passes: int
    tokens: int
    part_tokens: int
    overlap_tokens: int


def plan_split(backend: SplitBackend, request: SplitRequest, is_stopped: Callable[[], bool]) -> SplitPlan:
    """How the text is asked: in one pass when it fits, else in parts as large as window and memory allow.

    Raises UsageError without a question, PromptTooLong when there is no room beside it, DoesNotFit, Aborted.
    """

    def measure(text: str) -> int:
        if is_stopped():
            raise Aborted
        return backend.count_tokens(text)

    if not request.question.strip():
        raise UsageError('--split cuts the text, not the question: give one, as in qwq ask --split "What …?"')
    try:
        return SplitPlan(backend.dry_run(request.whole()))
    except (PromptTooLong, DoesNotFit):
        sources = Sources(request.framing.attachments, request.stdin_text)
        if not sources.text.strip():
            raise
    frame = backend.dry_run(_frame(request, sources))
    shares = _shares(frame, backend.largest_context())
    room = shares.part
    while True:
        is_least = room * _SHRINKS < LEAST_ROOM
        try:
            plan = _cut_to(backend, request, sources, room, measure)
        except DoesNotFit:
            if is_least:
                raise
        else:
            # Short memory would take from the thinking and from the layers on a GPU: take smaller parts.
            thinks = plan.planned.thinking_budget >= shares.thinking * _SHRINKS
            if is_least or (thinks and plan.planned.n_gpu_layers >= frame.n_gpu_layers):
                return plan
        room = int(room * _SHRINKS)


def split_planned(plan: SplitPlan) -> SplitPlanned:
    """The plan as an event."""
    return SplitPlanned(
        parts=len(plan.excerpts),
        passes=plan.passes,
        tokens=plan.tokens,
        part_tokens=plan.planned.prompt_tokens,
        overlap_tokens=plan.overlap,
    )


def _frame(request: SplitRequest, sources: Sources) -> ReplyRequest:
    """The question with an empty part under the longest name: its tokens are not there for a part."""
    excerpt = Excerpt((Attachment(sources.longest_name, "-"),), "-")
    question = request.of_part(excerpt, 999_999, 999_999)
    joined = request.of_answers([Attachment("answer from parts 9,999 to 9,999 of 99,999", "-")], None)
    return max(question, joined, key=lambda each: len(each.messages[-1].content))


@dataclass(frozen=True, slots=True)
class _SplitShares:
    """Tokens of the largest context: what a part may have, and what the thinking gets at least."""

    part: int
    thinking: int


def _shares(frame: Planned, n_ctx: int) -> _SplitShares:
    """What is left beside the question, the thinking and the answer; thinking and answer get half at most."""
    kept = min(frame.thinking_budget + frame.answer_reserve, n_ctx // 2)
    room = n_ctx - CLOSING - kept - frame.prompt_tokens - MARGIN
    if room < LEAST_ROOM:
        raise PromptTooLong(
            f"question, system prompt, thinking and answer leave {max(0, room):,} of {n_ctx:,} tokens for "
            "the text. Shorten the question, or allow a larger context."
        )
    return _SplitShares(room, max(0, kept - frame.answer_reserve))


def _cut_to(
    backend: SplitBackend, request: SplitRequest, sources: Sources, room: int, measure: Measure
) -> SplitPlan:
    """The text in parts of at most `room` tokens, and the plan for the largest. Raises DoesNotFit."""
    overlap = min(room // 8, MOST_OVERLAP)
    parts = cut(sources.text, room, overlap, measure)
    excerpts = tuple(sources.excerpts(parts))
    largest = max(range(len(excerpts)), key=lambda number: excerpts[number].length)
    planned = backend.dry_run(request.of_part(excerpts[largest], largest + 1, len(excerpts)))
    return SplitPlan(planned, excerpts, sum(part.size for part in parts), room, overlap)
