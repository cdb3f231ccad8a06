"""A turn of the history run once more: its record and a backend in, the same turn beside it as it comes.

It begins from the recorded token ids with a fresh prefill, and ends where the two part or the record does. A
turn that was stopped and gone on with runs in the same parts: each halts where the next one took over. How
both were made is told with the result. Knows no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwq_local.backend.question import Backend, Question
from qwq_local.dialogue.closing import CLOSING_SENTENCES
from qwq_local.dialogue.control import Halt, Opening
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.dialogue.difference import AROUND, Difference, Texts, common_length, first_difference
from qwq_local.errors import HistoryError
from qwq_local.events import (
    Answer,
    CloseReason,
    Finished,
    FinishReason,
    Generated,
    Planned,
    Prefill,
    Thinking,
)
from qwq_local.history.records import Origin, TurnRecord, TurnState
from qwq_local.profiles.keys import Profile


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a turn that ran without a stop: computed with what, under which plan, and where it ends.

    `begins` after so many generated ids; without an `end` it goes on as far as the model does.
    """

    origin: Origin
    plan: Mapping[str, object]
    begins: Halt
    end: Halt | None


@dataclass(frozen=True, slots=True)
class Side:
    """How one of the two runs was made."""

    library: str
    identity: str
    cached_tokens: int
    is_fresh: bool


@dataclass(frozen=True, slots=True)
class Resumed:
    """The turn was gone on with after so many generated tokens: how many of all were cached, then and now."""

    generated: int
    recorded_cached: int
    rerun_cached: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a rerun came to: where the two part, if they do, and how each was made."""

    turn: int
    difference: Difference | None
    is_whole: bool
    n_characters: int
    recorded: Side
    rerun: Side
    resumed: tuple[Resumed, ...] = ()


@dataclass(frozen=True, slots=True)
class Compared:
    """So many characters of all that are recorded came again, all the same so far."""

    characters: int
    total: int


@dataclass(frozen=True, slots=True)
class Here:
    """Who runs it once more: a backend under the first stage's profile, its weights, and llama.cpp's version.

    `profile_of` a later stage is what the backend goes on under.
    """

    backend: Backend
    identity: str
    library: str
    profile_of: Callable[[Stage], Profile]


def stages_of(turn: TurnRecord) -> tuple[Stage, ...]:
    """The parts of a turn, one after the other; one that was stopped before its first token is left out.

    Raises HistoryError when they cannot be brought about again.
    """
    if turn.state is TurnState.RUNNING:
        raise HistoryError(f"turn {turn.id} is still running. Wait for its end.")
    if turn.origin is None or not turn.prompt or not turn.plan:
        raise HistoryError(f"turn {turn.id} ended before it began: no prompt is recorded to repeat.")
    if turn.steered or turn.closed is CloseReason.ASKED:
        raise HistoryError(f"turn {turn.id} was steered or cut short by hand: that cannot be repeated.")
    if turn.origin.is_continued and not turn.origin.continuations:
        raise HistoryError(
            f"turn {turn.id} was stopped and gone on with: the sampler began anew there, so it cannot be "
            "repeated from its beginning."
        )
    parts = turn.origin.continuations
    begins = [Halt.after(()), *(Halt(part.generated, part.digest) for part in parts)]
    # Where a turn that was stopped ends, the rerun need not go on.
    last = None if _is_whole(turn) or not turn.generated else Halt.after(turn.generated)
    ends: list[Halt | None] = [*begins[1:], last]
    made = [(turn.origin, turn.plan), *((part.origin, part.plan) for part in parts)]
    return tuple(
        Stage(origin, plan, begin, end)
        for (origin, plan), begin, end in zip(made, begins, ends, strict=True)
        if begin != end
    )


def repeat(
    turn: TurnRecord, stages: Sequence[Stage], here: Here
) -> Iterator[Prefill | Compared | Comparison]:
    """Run the turn and compare as it goes, Comparison last; without one it was interrupted.

    Raises HistoryError when the turn cannot have the plan that it had here, and what `reply` raises.
    """
    running = _Running(turn, here.backend)
    for stage in stages:
        if running.cached:
            here.backend.adopt(here.profile_of(stage))
        yield from running.run(stage)
        if not running.is_at(stage.end):
            break
    if running.was_stopped:
        return
    first, origin = running.cached[0], stages[0].origin
    yield Comparison(
        turn=turn.id,
        difference=first_difference(running.recorded, running.text),
        is_whole=running.recorded.is_whole,
        n_characters=running.following.total,
        recorded=Side(origin.library, origin.identity, turn.stats.cached_tokens, origin.is_fresh),
        rerun=Side(here.library, here.identity, first, is_fresh=True),
        resumed=tuple(
            Resumed(stage.begins.n_tokens, stage.origin.cached_tokens, cached)
            for stage, cached in zip(stages[1:], running.cached[1:], strict=False)
        ),
    )


def _is_whole(turn: TurnRecord) -> bool:
    return turn.state is TurnState.DONE or turn.reason not in (None, FinishReason.INTERRUPTED)


class _Running:
    """A turn as it runs again, stage by stage; `cached` are the tokens that each found in the KV cache."""

    def __init__(self, turn: TurnRecord, backend: Backend) -> None:
        self._turn = turn
        self._backend = backend
        self._generated: tuple[int, ...] = ()
        self._finished: Finished | None = None
        self.recorded = Texts(turn.thinking, turn.answer, _is_whole(turn))
        self.following = _Following(self.recorded)
        self.cached: list[int] = []

    def run(self, stage: Stage) -> Generator[Prefill | Compared, None, None]:
        """Run a stage to its end, or until nothing more can change the result."""
        self._finished = None
        cached: int | None = None
        for event in self._backend.reply(self._question(stage)):
            match event:
                case Planned():
                    _check_plan(event, self._turn.id, stage.plan)
                case Prefill():
                    cached = event.cached if cached is None else cached
                    yield event
                case Generated():
                    self._generated = (*self._generated[: event.start], *event.tokens)
                case Thinking() | Answer():
                    self.following.take(event)
                    yield Compared(self.following.compared, self.following.total)
                case Finished():
                    self._finished = event
            if self.following.is_decided:
                break
        self.cached.append(cached or 0)

    def is_at(self, end: Halt | None) -> bool:
        """Whether the stage ended where the next one goes on."""
        if self.following.is_decided or self._is_interrupted or end is None:
            return False
        return end.is_at(self._generated)

    @property
    def was_stopped(self) -> bool:
        """Whether it was stopped before it was decided."""
        return self._is_interrupted and not self.following.is_decided

    @property
    def text(self) -> Texts:
        """What it said, as far as it came."""
        if self._finished is None:
            return self.following.texts
        return Texts(self._finished.thinking, self._finished.answer)

    @property
    def _is_interrupted(self) -> bool:
        return self._finished is None or self._finished.reason is FinishReason.INTERRUPTED

    def _question(self, stage: Stage) -> Question:
        message = Message(Role.USER, self._turn.content or self._turn.question or "?")
        # A stage that found no token of the ones before it in the cache computed them anew, in other batches.
        is_fresh = not self.cached or stage.origin.cached_tokens <= len(self._turn.prompt)
        # Like the turn that is repeated: text that is cut in mid-character is held back.
        return Question(
            [message],
            seed=stage.origin.seed,
            opening=Opening(self._turn.prompt, self._generated),
            wants_tokens=True,
            is_fresh=is_fresh,
            halt=stage.end,
        )


def _check_plan(planned: Planned, turn: int, plan: Mapping[str, object]) -> None:
    """Raises HistoryError when this machine does not give the turn what it had."""
    for key in ("n_ctx", "yarn_factor", "kv_type", "thinking_budget", "answer_reserve"):
        then, now = plan.get(key), getattr(planned, key)
        if then is not None and then != now:
            raise HistoryError(
                f"turn {turn} had {key} {then}, here it would have {now}: that would be another turn. "
                "Free some memory, or repeat it where it was made."
            )


class _Following:
    """The text of a rerun as it comes, beside the recorded one; linear in the text."""

    def __init__(self, recorded: Texts) -> None:
        self._recorded = recorded
        self._pieces: dict[str, list[str]] = {"thinking": [], "answer": []}
        self._lengths = {"thinking": 0, "answer": 0}
        self._same = {"thinking": True, "answer": True}
        self._past_difference = 0
        # What a loop said before it was cut back is not recorded, and proves nothing.
        self._was_cut = CLOSING_SENTENCES[CloseReason.LOOP] in recorded.thinking
        self.compared = 0

    @property
    def total(self) -> int:
        return len(self._recorded.thinking) + len(self._recorded.answer)

    @property
    def texts(self) -> Texts:
        return Texts("".join(self._pieces["thinking"]), "".join(self._pieces["answer"]))

    @property
    def is_decided(self) -> bool:
        """Whether the rest no longer matters: they parted, or all that was recorded came again."""
        if self._past_difference > AROUND and not self._was_cut:
            return True
        return not self._recorded.is_whole and self.compared >= self.total

    def take(self, event: Thinking | Answer) -> None:
        part = "thinking" if isinstance(event, Thinking) else "answer"
        recorded = self._recorded.thinking if part == "thinking" else self._recorded.answer
        at = self._lengths[part]
        self._pieces[part].append(event.text)
        self._lengths[part] += len(event.text)
        expected = recorded[at : at + len(event.text)]
        same = common_length(expected, event.text)
        if self._same[part]:
            self.compared += same
        # What goes on past the recorded end may be a loop that is yet cut back.
        if not self._same[part] or same < len(expected):
            self._same[part] = False
            self._past_difference += len(event.text)
