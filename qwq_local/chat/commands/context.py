"""/context, /drop, /plan and /stats: what has the context, what is planned, what the last turn took."""

from __future__ import annotations

from collections.abc import Iterator

from qwq_local.chat.commands.command import Command
from qwq_local.chat.context import next_question, turn_tokens
from qwq_local.chat.events import ChatEvent, ContextUse, NextPlan, say
from qwq_local.chat.model import ChatModel
from qwq_local.chat.session import Session, thought_numbers
from qwq_local.errors import UsageError
from qwq_local.planning.summary import stats_line


def _context(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    if (planned := session.model.plan(next_question(session))) is None:
        return
    yield ContextUse(planned.ledger, planned.prompt_tokens, planned.n_ctx)
    if planned.yarn_factor > 1:
        yield say(f"the next question takes YaRN {planned.yarn_factor:g}.")


def _drop(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Leave the oldest turns out of what the model sees, or with `none` show it all of them again."""
    conversation, word = session.conversation, arguments.strip()
    if word == "none":
        conversation.dropped = frozenset()
        yield say("the model sees the whole conversation again.")
        return
    count = int(word) if word.isdecimal() and len(word) < 10 else 0 if word else 1
    if not count:
        raise UsageError(f"/drop {word[:40]}: give how many of the oldest turns, or none to see all again.")
    gone = conversation.drop(count)
    if not gone:
        raise UsageError("there is no turn to leave out.")
    tokens = turn_tokens(session, gone)
    size = f", {tokens:,} tokens" if tokens is not None else ""
    yield say(
        f"left out of what the model sees while this chat runs: {thought_numbers(gone)}{size}; "
        "the history keeps them, /drop none takes them in again."
    )


def _plan(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    if (planned := session.model.plan(next_question(session))) is not None:
        yield NextPlan(planned)


def _stats(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    last = session.conversation.last
    if last is None:
        raise UsageError("nothing was asked yet.")
    seed = f"seed {last.origin.seed} · " if last.origin is not None else ""
    reason = f"ended: {last.reason}" if last.reason is not None else f"state: {last.state}"
    yield say(f"thought {last.number} · {seed}{reason}", stats_line(last.stats))


COMMANDS = (
    Command("context", "", "who has the context", _context, needs=ChatModel.can_plan),
    Command(
        "drop",
        "[N|none]",
        "leave the oldest N turns out of what is sent",
        _drop,
        details=(
            "Without N it is one turn. The history keeps them; /drop none lets the model see them again.",
        ),
    ),
    Command("plan", "", "what is planned for the next question", _plan, needs=ChatModel.can_plan),
    Command("stats", "", "tokens and seconds of the last turn", _stats),
)
