"""A question about a text in parts: the passes and their prompts, over a Backend that answers
by a function. Its tokens are characters; the real planner divides its window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from qwq_local.backend.api import ReplyRequest
from qwq_local.backend.split import (
    Joining,
    PartDone,
    PartStarted,
    SplitEvent,
    SplitPlan,
    SplitPlanned,
    SplitRequest,
    answer_split,
    plan_split,
)
from qwq_local.dialogue.conversation import Attachment, Framing, Role
from qwq_local.engine.api import JsonSchema
from qwq_local.errors import Aborted, DoesNotFit, PromptTooLong, UsageError
from qwq_local.events import DeviceBytes, Event, Finished, FinishReason, Notice, Planned, Prefill, TurnStats
from qwq_local.planning.window import Needs, Window, share_window

N_CTX = 4096
OBJECT = JsonSchema({"type": "object"})
STATS = TurnStats(1000, 0, 20, 30, 2.0, 5.0)


class AnsweringBackend:
    """A Backend whose answer is a function of the question's text; None interrupts the turn."""

    def __init__(
        self, answer: Callable[[str], str | None], *, largest: int = N_CTX, costs: str = "", past: int = N_CTX
    ) -> None:
        """No context above `largest` fits; one above `past` costs layers or thinking."""
        self.asked: list[ReplyRequest] = []
        self.planned: list[Planned] = []
        self._answer = answer
        self._largest, self._costs, self._past = largest, costs, past

    def reply(self, question: ReplyRequest) -> Iterator[Event]:
        planned = self.dry_run(question)
        self.asked.append(question)
        yield planned
        yield Prefill(planned.prompt_tokens, planned.prompt_tokens, 0)
        answer = self._answer(question.messages[-1].content)
        if answer is None:
            yield Finished(FinishReason.INTERRUPTED, STATS, "hm", "half an ans")
        else:
            reason = FinishReason.STOP if answer else FinishReason.NO_ANSWER
            yield Finished(reason, STATS, "thought", answer)

    def dry_run(self, question: ReplyRequest) -> Planned:
        tokens = 10 + sum(len(message.content) for message in question.messages)
        shares = share_window(Needs(tokens, 600, 200), Window(N_CTX))
        if shares.n_ctx > self._largest:
            raise DoesNotFit("too large")
        costs = self._costs if shares.n_ctx > self._past else ""
        planned = Planned(
            "fake",
            shares.n_ctx,
            tokens,
            shares.thinking_budget,
            shares.answer_reserve,
            1.0,
            "f16",
            n_gpu_layers=5 if costs == "layers" else 9,
            seed=1,
            devices=(DeviceBytes("GPU", 10**9, 0, 0, 10**10), DeviceBytes("CPU", 10**9, 0, 0, 10**10)),
        )
        if costs == "thinking":
            planned = replace(planned, thinking_budget=100)
        self.planned.append(planned)
        return planned

    def count_tokens(self, text: str) -> int:
        return len(text)

    def largest_context(self) -> int:
        return N_CTX

    def stop(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def asked_of(text: str = "", *files: Attachment, question: str = "Who did it?") -> SplitRequest:
    return SplitRequest(Framing("Be brief.", files, "Say why."), text, question, OBJECT)


def run(backend: AnsweringBackend, request: SplitRequest) -> tuple[SplitPlan, list[SplitEvent]]:
    plan = plan_split(backend, request, lambda: False)
    return plan, list(answer_split(backend, request, plan))


def of_kind(events: Sequence[SplitEvent], kind: type[SplitEvent]) -> list[SplitEvent]:
    return [event for event in events if isinstance(event, kind)]


STORY = "".join(f"On day {i} somebody went to the sea and came back.\n\n" for i in range(200))


def test_every_part_is_asked_and_then_all_answers_are_joined() -> None:
    backend = AnsweringBackend(lambda text: f"seen {text.count('On day')}")
    plan, events = run(backend, asked_of(STORY))
    parts = len(plan.excerpts)

    assert parts > 3
    assert len(backend.asked) == parts + 1 == plan.passes
    for number, question in enumerate(backend.asked[:-1], 1):
        system, user = question.messages
        assert (system.role, system.content) == (Role.SYSTEM, "Be brief.")
        assert f"part {number} of {parts}" in user.content
        assert user.content.endswith("\n\nWho did it?\nSay why.")
        assert question.constraint is None
    last = backend.asked[-1]
    assert last.constraint is OBJECT
    assert [
        f"answer from part {i} of {parts}\nseen" in last.messages[-1].content for i in range(1, parts + 1)
    ]
    assert all(f"On day {i} " in "".join(q.messages[-1].content for q in backend.asked) for i in range(200))
    assert isinstance(events[0], SplitPlanned)
    assert isinstance(events[-1], Finished)
    assert len(of_kind(events, Finished)) == 1
    assert of_kind(events, Joining) == [Joining(parts)]


def test_parts_fill_the_window_beside_the_full_budgets() -> None:
    backend = AnsweringBackend(lambda _: "yes")
    plan, _ = run(backend, asked_of(STORY))
    largest = max(backend.planned[-len(plan.excerpts) - 1 : -1], key=lambda planned: planned.prompt_tokens)

    assert largest.prompt_tokens > N_CTX - 64 - 800 - 300
    assert all(p.thinking_budget == 600 and p.answer_reserve == 200 for p in backend.planned)


def test_a_text_that_fits_is_not_split() -> None:
    plan = plan_split(AnsweringBackend(lambda _: "yes"), asked_of("short"), lambda: False)

    assert (plan.excerpts, plan.passes) == ((), 1)
    assert plan.planned.prompt_tokens < 100


def test_cutting_a_long_text_can_be_interrupted() -> None:
    with pytest.raises(Aborted):
        plan_split(AnsweringBackend(lambda _: "yes"), asked_of(STORY), lambda: True)


def test_parts_name_their_files_and_lines() -> None:
    first = Attachment("a.txt", "".join(f"line {i}\n" for i in range(1, 801)))
    second = Attachment("b.txt", "the end\n")
    backend = AnsweringBackend(lambda _: "yes")
    plan, _ = run(backend, asked_of("", first, second))
    names = [attachment.name for excerpt in plan.excerpts for attachment in excerpt.attachments]

    assert names[0].startswith("a.txt, lines 1 to ")
    assert names[-1] == "b.txt"
    for excerpt in plan.excerpts:
        for attachment in excerpt.attachments:
            if attachment.name != "b.txt":
                begin, end = attachment.name.removeprefix("a.txt, lines ").split(" to ")
                lines = attachment.text.split()[1::2]
                assert (lines[0], lines[-1]) == (begin, end)


def test_answers_that_do_not_fit_together_are_joined_in_rounds() -> None:
    backend = AnsweringBackend(lambda _: "x" * 700)
    plan, events = run(backend, asked_of(STORY * 4))
    rounds = {event.round for event in events if isinstance(event, PartStarted)}
    done = [event for event in events if isinstance(event, PartDone)]

    assert len(rounds) >= 2
    assert len([event for event in done if event.round == 1]) == len(plan.excerpts)
    second = [event for event in done if event.round == 2]
    assert [(event.part, event.parts) for event in second] == [
        (i, len(second)) for i in range(1, len(second) + 1)
    ]
    joined = [q.messages[-1].content for q in backend.asked if "Above are answers" in q.messages[-1].content]
    assert "answer from part 1 of" in joined[0]
    assert "answer from parts 1 to " in joined[-1]


def test_answers_too_long_to_join_are_shortened_with_a_notice() -> None:
    backend = AnsweringBackend(lambda _: "Far too much to say. " * 120)
    plan, events = run(backend, asked_of(STORY))
    notices = [event.text for event in events if isinstance(event, Notice)]

    assert len([text for text in notices if "go on" in text]) >= len(plan.excerpts)
    assert isinstance(events[-1], Finished)


def test_a_part_without_an_answer_is_reported_and_the_others_continue() -> None:
    backend = AnsweringBackend(lambda text: "" if "part 2 of" in text else "yes")
    plan, events = run(backend, asked_of(STORY))

    assert of_kind(events, Joining) == [Joining(len(plan.excerpts) - 1)]
    assert any("part 2 of" in event.text for event in events if isinstance(event, Notice))


def test_no_answer_at_all_ends_as_a_turn_without_one() -> None:
    _, events = run(AnsweringBackend(lambda _: ""), asked_of(STORY))

    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.NO_ANSWER


def test_an_interrupted_part_ends_the_run_and_keeps_the_answers() -> None:
    backend = AnsweringBackend(lambda text: None if "part 3 of" in text else "yes")
    _, events = run(backend, asked_of(STORY))
    done = [event for event in events if isinstance(event, PartDone)]

    assert [event.answer for event in done] == ["yes", "yes", "half an ans"]
    assert done[-1].reason is FinishReason.INTERRUPTED
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.INTERRUPTED
    assert len(backend.asked) == 3


def test_the_time_left_assumes_the_mean_of_the_passes_so_far() -> None:
    plan, events = run(AnsweringBackend(lambda _: "yes"), asked_of(STORY))
    left = [event.seconds_left for event in events if isinstance(event, PartStarted)]
    spent = [event.stats.prefill_s + event.stats.decode_s for event in events if isinstance(event, PartDone)]

    assert left[0] is None
    for done, seconds in enumerate(left[1:], 1):
        assert seconds == pytest.approx(sum(spent[:done]) / done * (plan.passes - done))


@pytest.mark.parametrize("costs", ["", "layers", "thinking"])
def test_parts_are_smaller_when_memory_is_short(costs: str) -> None:
    """The parts shrink before the thinking or the layers on the GPU do."""
    largest = N_CTX if costs else 2048
    backend = AnsweringBackend(lambda _: "yes", largest=largest, costs=costs, past=2048)
    plan, _ = run(backend, asked_of(STORY))

    assert plan.planned.n_ctx <= 2048
    assert (plan.planned.n_gpu_layers, plan.planned.thinking_budget) == (9, 600)
    assert len(plan.excerpts) > 8


def test_a_question_that_cannot_be_split_is_refused() -> None:
    backend = AnsweringBackend(lambda _: "yes")
    with pytest.raises(UsageError, match="not the question"):
        plan_split(backend, asked_of(STORY, question="  "), lambda: False)
    with pytest.raises(PromptTooLong, match="window"):
        plan_split(backend, asked_of("", question="why " * 2000), lambda: False)
    with pytest.raises(PromptTooLong, match="Shorten the question"):
        plan_split(backend, asked_of(STORY, question="why " * 750), lambda: False)
