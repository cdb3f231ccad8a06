"""A turn of the history run once more: its record and a backend in, the same turn beside it as it comes.

It begins from the recorded token ids with a fresh prefill, and ends where the two part or the record does.
How both were made is told with the result. Knows no terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwq_local.backend.question import Backend, Question
from qwq_local.dialogue.control import Opening
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.dialogue.difference import AROUND, Difference, Texts, common_length, first_difference
from qwq_local.errors import HistoryError
from qwq_local.events import Answer, CloseReason, Finished, FinishReason, Planned, Prefill, Thinking
from qwq_local.history.records import Origin, TurnRecord, TurnState


@dataclass(frozen=True, slots=True)
class Side:
    """How one of the two runs was made."""

    library: str
    identity: str
    cached_tokens: int
    is_fresh: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a rerun came to: where the two part, if they do, and how each was made."""

    turn: int
    difference: Difference | None
    is_whole: bool
    n_characters: int
    recorded: Side
    rerun: Side


@dataclass(frozen=True, slots=True)
class Compared:
    """So many characters of all that are recorded came again, all the same so far."""

    characters: int
    total: int


def repeat(
    backend: Backend, turn: TurnRecord, origin: Origin, identity: str, library: str
) -> Iterator[Prefill | Compared | Comparison]:
    """Run the turn and compare as it goes, Comparison last; without one it was interrupted.

    Raises HistoryError when the turn cannot have the plan that it had here, and what `reply` raises.
    """
    is_whole = turn.state is TurnState.DONE or turn.reason not in (None, FinishReason.INTERRUPTED)
    recorded = Texts(turn.thinking, turn.answer, is_whole)
    following = _Following(recorded)
    cached, finished = 0, None
    for event in backend.reply(_question(turn, origin)):
        match event:
            case Planned():
                _check_plan(event, turn)
            case Prefill():
                cached = event.cached
                yield event
            case Thinking() | Answer():
                following.take(event)
                yield Compared(following.compared, following.total)
            case Finished():
                finished = event
        if following.is_decided:
            break
    was_stopped = finished is None or finished.reason is FinishReason.INTERRUPTED
    if was_stopped and not following.is_decided:
        return
    text = following.texts if finished is None else Texts(finished.thinking, finished.answer)
    yield Comparison(
        turn=turn.id,
        difference=first_difference(recorded, text),
        is_whole=is_whole,
        n_characters=following.total,
        recorded=Side(origin.library, origin.identity, turn.stats.cached_tokens, origin.is_fresh),
        rerun=Side(library, identity, cached, is_fresh=True),
    )


def repeatable(turn: TurnRecord) -> Origin:
    """What a turn was computed with. Raises HistoryError when its prompt alone does not bring it about."""
    if turn.state is TurnState.RUNNING:
        raise HistoryError(f"turn {turn.id} is still running. Wait for its end.")
    if turn.origin is None or not turn.prompt or not turn.plan:
        raise HistoryError(f"turn {turn.id} ended before it began: no prompt is recorded to repeat.")
    if turn.steered or turn.closed is CloseReason.ASKED:
        raise HistoryError(f"turn {turn.id} was steered or cut short by hand: that cannot be repeated.")
    if turn.origin.is_continued:
        raise HistoryError(
            f"turn {turn.id} was stopped and gone on with: the sampler began anew there, so it cannot be "
            "repeated from its beginning."
        )
    return turn.origin


def _question(turn: TurnRecord, origin: Origin) -> Question:
    message = Message(Role.USER, turn.content or turn.question or "?")
    # Like the turn that is repeated: text that is cut in mid-character is held back.
    return Question(
        [message], seed=origin.seed, opening=Opening(turn.prompt, ()), wants_tokens=True, is_fresh=True
    )


def _check_plan(planned: Planned, turn: TurnRecord) -> None:
    """Raises HistoryError when this machine does not give the turn what it had."""
    for key in ("n_ctx", "yarn_factor", "kv_type", "thinking_budget", "answer_reserve"):
        then, now = turn.plan.get(key), getattr(planned, key)
        if then is not None and then != now:
            raise HistoryError(
                f"turn {turn.id} had {key} {then}, here it would have {now}: that would be another turn. "
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
        if self._past_difference > AROUND:
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
