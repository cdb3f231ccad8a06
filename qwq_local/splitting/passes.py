"""A question to a text in parts: a plan for them in, a pass for each part, one answer out.

First every part is asked the question, then the answers are read together; when they do not fit together
either, in rounds, group by group. What came of each part is told, nothing is dropped without a word. Knows a
Backend and no llama.cpp; how the text is cut is in plan.py.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from qwq_local.backend.question import Question
from qwq_local.dialogue.conversation import Attachment, fence
from qwq_local.dialogue.excerpts import cut
from qwq_local.events import Event, Finished, FinishReason, Notice, TurnStats
from qwq_local.splitting.plan import (
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

    `seconds_left` is for all passes that are left, at the speed of those of this run; None for the first.
    """

    round: int
    part: int
    parts: int
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class PartDone:
    """What a pass came to: its answer and thinking, why it ended, its figures."""

    round: int
    part: int
    parts: int
    answer: str
    thinking: str
    reason: FinishReason
    stats: TurnStats


@dataclass(frozen=True, slots=True)
class Joining:
    """The last pass begins, over so many answers; its events are those of the turn."""

    answers: int


SplitEvent = Event | SplitPlanned | PartStarted | PartDone | Joining


def answer_split(backend: SplitBackend, request: SplitRequest, plan: SplitPlan) -> Iterator[SplitEvent]:
    """The events of all passes, ending with the Finished of the last, or of the run that was interrupted.

    The plan has parts. Raises what `reply` raises.
    """
    yield from _Passes(backend, request, plan).events()


@dataclass(frozen=True, slots=True)
class _Said:
    """An answer, and the parts of the text that it is from."""

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
        """Everything that happens."""
        yield split_planned(self._plan)
        questions = [
            (self._request.of_part(excerpt, number, self._n_parts), number, number)
            for number, excerpt in enumerate(self._plan.excerpts, 1)
        ]
        round_number = 1
        while True:
            said = yield from self._round(questions, round_number)
            if said is None:
                return
            groups = yield from self._groups(said)
            if len(groups) == 1:
                break
            questions = [
                (self._request.of_answers(self._shown(group), None), group[0].first, group[-1].last)
                for group in groups
            ]
            round_number += 1
        yield Joining(len(groups[0]))
        yield from self._backend.reply(self._request.of_answers(self._shown(groups[0]), self._request.schema))

    def _round(
        self, questions: Sequence[tuple[Question, int, int]], round_number: int
    ) -> Generator[SplitEvent, None, list[_Said] | None]:
        """Ask each question; what was said, or nothing when the run is over."""
        said = []
        for number, (question, first, last) in enumerate(questions, 1):
            yield PartStarted(round_number, number, len(questions), self._seconds_left())
            finished = yield from self._pass(question)
            yield PartDone(
                round_number, number, len(questions),
                finished.answer, finished.thinking, finished.reason, finished.stats,
            )  # fmt: skip
            if finished.reason is FinishReason.INTERRUPTED:
                yield Finished(FinishReason.INTERRUPTED, finished.stats, "", "")
                return None
            where = f"part {number} of {len(questions)}"
            if finished.reason is not FinishReason.STOP and finished.answer.strip():
                yield Notice(f"the answer to {where} was cut ({finished.reason}); it goes on as it is.")
            if finished.answer.strip():
                said.append(_Said(first, last, finished.answer))
            else:
                yield Notice(f"{where} gave no answer ({finished.reason}); the others go on without it.")
        if not said:
            yield Finished(FinishReason.NO_ANSWER, self._spent, "", "")
            return None
        return said

    def _pass(self, question: Question) -> Generator[SplitEvent, None, Finished]:
        """One turn; its events but the last."""
        for event in self._backend.reply(question):
            if isinstance(event, Finished):
                self._passes += 1
                self._spent = summed(self._spent, event.stats)
                return event
            yield event
        raise AssertionError("a turn always ends with Finished")

    def _seconds_left(self) -> float | None:
        """The time of a pass so far, for each pass that is left."""
        if not self._passes:
            return None
        left = max(1, self._plan.passes - self._passes)
        return left * (self._spent.prefill_s + self._spent.decode_s) / self._passes

    def _groups(self, said: Sequence[_Said]) -> Generator[Notice, None, list[list[_Said]]]:
        """Neighbouring answers that fit together; any two do, so that each round has fewer."""
        groups: list[list[_Said]] = []
        free = 0
        for each in said:
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

    def _shortened(self, said: _Said) -> _Said:
        bare = self._size(replace(said, text=""))
        room = max(1, self._plan.room // 2 - bare - MARGIN // 2)
        first, *_ = cut(said.text, room, 0, self._backend.count_tokens)
        return replace(said, text=said.text[: first.end])

    def _size(self, said: _Said) -> int:
        (shown,) = self._shown([said])
        return self._backend.count_tokens(fence(shown) + "\n\n")

    def _shown(self, said: Sequence[_Said]) -> list[Attachment]:
        return [Attachment(f"answer from {self._name(each)}", each.text) for each in said]

    def _name(self, said: _Said) -> str:
        if said.first == said.last:
            return f"part {said.first} of {self._n_parts}"
        return f"parts {said.first} to {said.last} of {self._n_parts}"


def summed(first: TurnStats, second: TurnStats) -> TurnStats:
    """The figures of two passes together."""
    return TurnStats(*(getattr(first, each.name) + getattr(second, each.name) for each in fields(TurnStats)))
