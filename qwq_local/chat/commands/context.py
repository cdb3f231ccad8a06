"""/context, /drop, /plan and /stats; the price of files, and what could be left out of the context.

Nothing is left out of a conversation except by /drop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qwq_local.backend.api import ReplyRequest
from qwq_local.chat.commands.command import Command
from qwq_local.chat.events import ChatEvent, ContextUse, NextPlan, Shown, TextTable, say
from qwq_local.chat.model import ChatModel
from qwq_local.chat.session import Session, thought_numbers
from qwq_local.chat.turns import ChatQuestion, reply_request
from qwq_local.dialogue.conversation import Attachment, fence
from qwq_local.errors import UsageError
from qwq_local.history.records import TurnRecord
from qwq_local.planning.summary import stats_line

_SHOWN_FILES = 20
_SHOWN_TURNS = 3


def next_question(session: Session, *, with_files: bool = True) -> ReplyRequest:
    """What would be sent now: the conversation, the files that wait, and a question as short as possible."""
    attachments = session.attachments if with_files else ()
    question = "" if attachments else "?"
    content = session.content(question, attachments)
    texts = tuple(map(fence, attachments))
    return reply_request(session, ChatQuestion("", content, session.conversation.turns, file_texts=texts))


def price(session: Session, request: ReplyRequest) -> Iterator[Shown]:
    """What the files of a question change in the plan. Raises PromptTooLong, DoesNotFit."""
    model = session.model
    planned = model.plan(request)
    now = model.planned or model.plan(next_question(session, with_files=False))
    if planned is None or now is None:
        return
    changes = []
    if planned.yarn_factor > 1 and planned.yarn_factor != now.yarn_factor:
        window = int(planned.yarn_origin * planned.yarn_factor)
        changes.append(f"YaRN {planned.yarn_factor:g} needed: window {window:,}")
    if planned.n_ctx > now.n_ctx:
        changes.append(f"context {planned.n_ctx:,}, now {now.n_ctx:,}")
    if planned.kv_type != now.kv_type:
        changes.append(f"KV cache {planned.kv_type}, now {now.kv_type}")
    if planned.thinking_budget < now.thinking_budget:
        changes.append(f"thinking {planned.thinking_budget:,}, now {now.thinking_budget:,}")
    if planned.reductions and planned.reductions != now.reductions:
        changes.append(f"given up: {', '.join(planned.reductions)}")
    prompt = f"the prompt has {planned.prompt_tokens:,} tokens with them"
    same = f"{prompt} and the plan stays: context {planned.n_ctx:,}, {planned.kv_type} KV."
    yield say(f"{prompt}. {' · '.join(changes)}." if changes else same)


def price_of_named(session: Session, named: Sequence[Attachment], request: ReplyRequest) -> Iterator[Shown]:
    """The tokens of files that a question names, and what they change in the plan. Raises PromptTooLong."""
    if named:
        yield from token_table([(each.name, session.model.count_tokens(fence(each))) for each in named])
        yield from price(session, request)


def token_table(counts: Sequence[tuple[str, int | None]]) -> Iterator[Shown]:
    """A row for each of the first files with its tokens, and a line for the rest."""
    shown, rest = counts[:_SHOWN_FILES], counts[_SHOWN_FILES:]
    yield TextTable(tuple((name, _token_text(tokens)) for name, tokens in shown), right=(1,))
    if rest:
        total = token_sum(tokens for _, tokens in rest)
        yield say(f"and {len(rest)} more files{f', {_token_text(total)}' if total is not None else ''}")


def token_sum(counts: Iterable[int | None]) -> int | None:
    """The tokens together; None if they are not counted."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def turn_tokens(session: Session, turns: Sequence[TurnRecord]) -> int | None:
    """What some turns take of a later prompt: their questions and answers. None if it is not counted."""
    count = session.model.count_tokens
    return token_sum(count(text) for turn in turns for text in (turn.content, turn.answer))


def droppable_lines(session: Session) -> Iterator[str]:
    """What could be left out when a prompt does not fit: the oldest turns, the files that wait."""
    sent = session.conversation.sent
    if sent:
        oldest = [
            f"thought {turn.number}{_in_brackets(turn_tokens(session, [turn]))}"
            for turn in sent[:_SHOWN_TURNS]
        ]
        rest = f" and {len(sent) - _SHOWN_TURNS} later ones" if len(sent) > _SHOWN_TURNS else ""
        yield f"oldest turns: {', '.join(oldest)}{rest}: /drop N leaves out the first N."
    if session.attached:
        by_size = sorted(session.attached.items(), key=lambda item: -(item[1].tokens or 0))
        files = [f"{name}{_in_brackets(waiting.tokens)}" for name, waiting in by_size[:_SHOWN_TURNS]]
        n_more = len(session.attached) - len(files)
        rest = f" and {n_more} smaller ones" if n_more else ""
        yield f"attached: {', '.join(files)}{rest}: /file drop NAME takes one back."


def _token_text(tokens: int | None) -> str:
    return f"{tokens:,} tokens" if tokens is not None else ""


def _in_brackets(tokens: int | None) -> str:
    return f" ({tokens:,} tok)" if tokens is not None else ""


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
