"""A text that no context holds: a question to each of its parts, then one to their answers.

Parts are as large as the largest context allows beside the question, the thinking and the answer, and as the
memory allows without taking layers off a GPU. Answers that do not fit together are joined in groups first, in
as many rounds as it takes. The events say what came of each part, and what was left out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Protocol, runtime_checkable

from qwq_local.backend.api import Backend, CountsTokens, Plans, ReplyRequest
from qwq_local.dialogue.conversation import Attachment, Framing, fence
from qwq_local.dialogue.excerpts import Excerpt, Measure, Sources, cut
from qwq_local.engine.api import AnswerConstraint
from qwq_local.errors import Aborted, DoesNotFit, PromptTooLong, UsageError
from qwq_local.events import Event, Finished, FinishReason, Notice, Planned, TurnStats
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

    @property
    def event(self) -> SplitPlanned:
        """The plan as an event."""
        return SplitPlanned(
            len(self.excerpts), self.passes, self.tokens, self.planned.prompt_tokens, self.overlap
        )


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
    n_ctx = backend.largest_context()
    # Thinking and answer get half of the context at most.
    kept = min(frame.thinking_budget + frame.answer_reserve, n_ctx // 2)
    room = n_ctx - CLOSING - kept - frame.prompt_tokens - MARGIN
    if room < LEAST_ROOM:
        raise PromptTooLong(
            f"question, system prompt, thinking and answer leave {max(0, room):,} of {n_ctx:,} tokens for "
            "the text. Shorten the question, or allow a larger context."
        )
    least_thinking = (kept - frame.answer_reserve) * _SHRINKS
    while True:
        is_least = room * _SHRINKS < LEAST_ROOM
        try:
            plan = _cut_to(backend, request, sources, room, measure)
        except DoesNotFit:
            if is_least:
                raise
        else:
            # Short memory would take from the thinking and from the layers on a GPU: take smaller parts.
            planned = plan.planned
            costs = planned.thinking_budget < least_thinking or planned.n_gpu_layers < frame.n_gpu_layers
            if is_least or not costs:
                return plan
        room = int(room * _SHRINKS)


def _frame(request: SplitRequest, sources: Sources) -> ReplyRequest:
    """The question with an empty part under the longest name: its tokens are not there for a part."""
    excerpt = Excerpt((Attachment(sources.longest_name, "-"),), "-")
    question = request.of_part(excerpt, 999_999, 999_999)
    joined = request.of_answers([Attachment("answer from parts 9,999 to 9,999 of 99,999", "-")], None)
    return max(question, joined, key=lambda each: len(each.messages[-1].content))


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


@dataclass(frozen=True, slots=True)
class PartStarted:
    """A pass over part `part` of `parts` begins, or in a later `round` over a group of answers.

    `seconds_left` is for all passes that are left, at the speed of the passes so far; None for the first.
    """

    round: int
    part: int
    parts: int
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class PartDone:
    """A pass is over: its answer and thinking, why it ended, its tokens and seconds."""

    round: int
    part: int
    parts: int
    answer: str
    thinking: str
    reason: FinishReason
    stats: TurnStats


@dataclass(frozen=True, slots=True)
class Joining:
    """The last pass begins, over `answers` answers; its events follow."""

    answers: int


SplitEvent = Event | SplitPlanned | PartStarted | PartDone | Joining


def answer_split(backend: SplitBackend, request: SplitRequest, plan: SplitPlan) -> Iterator[SplitEvent]:
    """The events of all passes; the last is the Finished of the last pass, or of one that was interrupted.

    The plan must have parts. Raises what `reply` raises.
    """
    return _Passes(backend, request, plan).events()


@dataclass(frozen=True, slots=True)
class _PartAnswer:
    """An answer, and the first and the last part of the text that it is from."""

    first: int
    last: int
    n_parts: int
    text: str

    @property
    def attachment(self) -> Attachment:
        parts = f"part {self.first}" if self.first == self.last else f"parts {self.first} to {self.last}"
        return Attachment(f"answer from {parts} of {self.n_parts}", self.text)


@dataclass(slots=True)
class _Passes:
    """One run over all parts. `spent` is what the `passes` so far took."""

    backend: SplitBackend
    request: SplitRequest
    plan: SplitPlan
    spent: TurnStats = field(default_factory=TurnStats)
    passes: int = 0

    def events(self) -> Iterator[SplitEvent]:
        """The events of the run."""
        yield self.plan.event
        n_parts = len(self.plan.excerpts)
        # The answer to each question is from the parts of its group.
        groups = [[_PartAnswer(number, number, n_parts, "")] for number in range(1, n_parts + 1)]
        questions = [
            self.request.of_part(excerpt, number, n_parts)
            for number, excerpt in enumerate(self.plan.excerpts, 1)
        ]
        for round_number in count(1):
            texts = yield from self._round(questions, round_number)
            if texts is None:
                return
            answers = [
                _PartAnswer(group[0].first, group[-1].last, n_parts, text)
                for group, text in zip(groups, texts, strict=True)
                if text.strip()
            ]
            groups = yield from self._groups(answers)
            if len(groups) == 1:
                break
            questions = [self._joined(group, None) for group in groups]
        yield Joining(len(groups[0]))
        yield from self.backend.reply(self._joined(groups[0], self.request.constraint))

    def _round(
        self, questions: Sequence[ReplyRequest], round_number: int
    ) -> Generator[SplitEvent, None, list[str] | None]:
        """Ask each question; returns the answers, or None when the run is over."""
        answers = []
        for number, question in enumerate(questions, 1):
            yield PartStarted(round_number, number, len(questions), self._seconds_left())
            finished = yield from self._pass(question)
            answer, reason, stats = finished.answer, finished.reason, finished.stats
            yield PartDone(round_number, number, len(questions), answer, finished.thinking, reason, stats)
            if reason is FinishReason.INTERRUPTED:
                yield Finished(reason, stats, "", "")
                return None
            where = f"part {number} of {len(questions)}"
            if not answer.strip():
                yield Notice(f"{where} gave no answer ({reason}); the others go on without it.")
            elif reason is not FinishReason.STOP:
                yield Notice(f"the answer to {where} was cut ({reason}); it goes on as it is.")
            answers.append(answer)
        if not any(map(str.strip, answers)):
            yield Finished(FinishReason.NO_ANSWER, self.spent, "", "")
            return None
        return answers

    def _pass(self, question: ReplyRequest) -> Generator[SplitEvent, None, Finished]:
        """The events of one turn but the last, which is returned."""
        for event in self.backend.reply(question):
            if isinstance(event, Finished):
                self.passes += 1
                self.spent = summed(self.spent, event.stats)
                return event
            yield event
        raise AssertionError("a turn always ends with Finished")

    def _seconds_left(self) -> float | None:
        """What the passes that are left take if each takes as long as those so far; None before the first."""
        if not self.passes:
            return None
        left = max(1, self.plan.passes - self.passes)
        return left * (self.spent.prefill_s + self.spent.decode_s) / self.passes

    def _groups(self, answers: Sequence[_PartAnswer]) -> Generator[Notice, None, list[list[_PartAnswer]]]:
        """Groups of neighbouring answers that fit together. Any two fit, so each round has fewer answers."""
        groups: list[list[_PartAnswer]] = []
        free, most = 0, self.plan.room // 2
        for each in answers:
            size = self._size(each)
            if size > most:
                bare = self._size(replace(each, text=""))
                first, *_ = cut(each.text, max(1, most - bare - MARGIN // 2), 0, self.backend.count_tokens)
                short = replace(each, text=each.text[: first.end])
                yield Notice(
                    f"the {each.attachment.name} has {size:,} tokens; its first {len(short.text):,} of "
                    f"{len(each.text):,} characters go on, so that two fit together."
                )
                each, size = short, min(self._size(short), most)
            if size > free:
                groups.append([])
                free = self.plan.room
            groups[-1].append(each)
            free -= size
        return groups

    def _size(self, answer: _PartAnswer) -> int:
        return self.backend.count_tokens(fence(answer.attachment) + "\n\n")

    def _joined(self, group: Sequence[_PartAnswer], constraint: AnswerConstraint | None) -> ReplyRequest:
        return self.request.of_answers([each.attachment for each in group], constraint)


def summed(first: TurnStats, second: TurnStats) -> TurnStats:
    """The tokens and seconds of two passes together."""
    return TurnStats(*(getattr(first, each.name) + getattr(second, each.name) for each in fields(TurnStats)))
