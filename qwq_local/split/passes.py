"""The passes over a text in parts: one for each part, then one over their answers.

Answers that do not fit together are first joined in groups, in as many rounds as it takes. The events say
what came of each part, and what was left out.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from qwq_local.backend.api import ReplyRequest
from qwq_local.dialogue.conversation import Attachment, fence
from qwq_local.dialogue.excerpts import cut
from qwq_local.events import Event, Finished, FinishReason, Notice, TurnStats
from qwq_local.split.plan import (
    MARGIN,
    SplitBackend,
    SplitPlan,
    SplitPlanned,
    SplitRequest,
    split_planned,
)


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
    yield from _Passes(backend, request, plan).events()


@dataclass(frozen=True, slots=True)
class _PartQuestion:
    """A question, and the first and the last part of the text that it is about."""

    first: int
    last: int
    question: ReplyRequest


@dataclass(frozen=True, slots=True)
class _PartAnswer:
    """An answer, and the first and the last part of the text that it is from."""

    first: int
    last: int
    text: str


class _Passes:
    """One run over all parts."""

    def __init__(self, backend: SplitBackend, request: SplitRequest, plan: SplitPlan) -> None:
        self._backend = backend
        self._request = request
        self._plan = plan
        self._n_parts = len(plan.excerpts)
        self._spent = TurnStats()
        self._passes = 0

    def events(self) -> Iterator[SplitEvent]:
        """The events of the run."""
        yield split_planned(self._plan)
        questions = [
            _PartQuestion(number, number, self._request.of_part(excerpt, number, self._n_parts))
            for number, excerpt in enumerate(self._plan.excerpts, 1)
        ]
        round_number = 1
        while True:
            answers = yield from self._round(questions, round_number)
            if answers is None:
                return
            groups = yield from self._groups(answers)
            if len(groups) == 1:
                break
            questions = [
                _PartQuestion(
                    group[0].first, group[-1].last, self._request.of_answers(self._shown(group), None)
                )
                for group in groups
            ]
            round_number += 1
        yield Joining(len(groups[0]))
        yield from self._backend.reply(
            self._request.of_answers(self._shown(groups[0]), self._request.constraint)
        )

    def _round(
        self, questions: Sequence[_PartQuestion], round_number: int
    ) -> Generator[SplitEvent, None, list[_PartAnswer] | None]:
        """Ask each question; returns the answers, or None when the run is over."""
        answers = []
        for number, part in enumerate(questions, 1):
            yield PartStarted(round_number, number, len(questions), self._seconds_left())
            finished = yield from self._pass(part.question)
            yield PartDone(
                round_number,
                number,
                len(questions),
                finished.answer,
                finished.thinking,
                finished.reason,
                finished.stats,
            )
            if finished.reason is FinishReason.INTERRUPTED:
                yield Finished(FinishReason.INTERRUPTED, finished.stats, "", "")
                return None
            where = f"part {number} of {len(questions)}"
            if finished.reason is not FinishReason.STOP and finished.answer.strip():
                yield Notice(f"the answer to {where} was cut ({finished.reason}); it goes on as it is.")
            if finished.answer.strip():
                answers.append(_PartAnswer(part.first, part.last, finished.answer))
            else:
                yield Notice(f"{where} gave no answer ({finished.reason}); the others go on without it.")
        if not answers:
            yield Finished(FinishReason.NO_ANSWER, self._spent, "", "")
            return None
        return answers

    def _pass(self, question: ReplyRequest) -> Generator[SplitEvent, None, Finished]:
        """The events of one turn but the last, which is returned."""
        for event in self._backend.reply(question):
            if isinstance(event, Finished):
                self._passes += 1
                self._spent = summed(self._spent, event.stats)
                return event
            yield event
        raise AssertionError("a turn always ends with Finished")

    def _seconds_left(self) -> float | None:
        """What the passes that are left take if each takes as long as those so far; None before the first."""
        if not self._passes:
            return None
        left = max(1, self._plan.passes - self._passes)
        return left * (self._spent.prefill_s + self._spent.decode_s) / self._passes

    def _groups(self, answers: Sequence[_PartAnswer]) -> Generator[Notice, None, list[list[_PartAnswer]]]:
        """Groups of neighbouring answers that fit together. Any two fit, so each round has fewer answers."""
        groups: list[list[_PartAnswer]] = []
        free = 0
        for each in answers:
            size = self._size(each)
            if size > self._plan.room // 2:
                short = self._shortened(each)
                yield Notice(
                    f"the answer from {self._name(each)} has {size:,} tokens; its first "
                    f"{len(short.text):,} of {len(each.text):,} characters go on, so that two fit together."
                )
                each, size = short, min(self._size(short), self._plan.room // 2)
            if size > free:
                groups.append([])
                free = self._plan.room
            groups[-1].append(each)
            free -= size
        return groups

    def _shortened(self, answer: _PartAnswer) -> _PartAnswer:
        bare = self._size(replace(answer, text=""))
        room = max(1, self._plan.room // 2 - bare - MARGIN // 2)
        first, *_ = cut(answer.text, room, 0, self._backend.count_tokens)
        return replace(answer, text=answer.text[: first.end])

    def _size(self, answer: _PartAnswer) -> int:
        (shown,) = self._shown([answer])
        return self._backend.count_tokens(fence(shown) + "\n\n")

    def _shown(self, answers: Sequence[_PartAnswer]) -> list[Attachment]:
        return [Attachment(f"answer from {self._name(each)}", each.text) for each in answers]

    def _name(self, answer: _PartAnswer) -> str:
        if answer.first == answer.last:
            return f"part {answer.first} of {self._n_parts}"
        return f"parts {answer.first} to {answer.last} of {self._n_parts}"


def summed(first: TurnStats, second: TurnStats) -> TurnStats:
    """The tokens and seconds of two passes together."""
    return TurnStats(*(getattr(first, each.name) + getattr(second, each.name) for each in fields(TurnStats)))
