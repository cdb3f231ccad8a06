"""What takes how much of the context: the ledger, the plan for what comes next, and what could go.

Nothing is ever left out of a conversation but by /drop, which a person gives.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwq_local.backend.question import Question
from qwq_local.chat.events import ChatEvent, ContextUse, NextPlan, Said
from qwq_local.chat.session import Session, fences, thoughts
from qwq_local.chat.turns import Asked, question_of
from qwq_local.errors import UsageError
from qwq_local.history.records import TurnRecord
from qwq_local.planning.words import stats_line

_SHOWN_TURNS = 3


def next_question(session: Session, *, with_files: bool = True) -> Question:
    """What would be sent now: the conversation, the files that wait, and the shortest of questions."""
    attachments = session.attachments if with_files else ()
    question = "" if attachments else "?"
    content = session.content(question, attachments)
    return question_of(
        session, Asked("", content, session.conversation.turns, file_texts=fences(attachments))
    )


def price_lines(session: Session, question: Question) -> Iterator[str]:
    """What the files of a question do to the plan. Raises PromptTooLong, DoesNotFit."""
    answering = session.answering
    planned = answering.backend.dry_run(question)
    now = answering.planned or answering.backend.dry_run(next_question(session, with_files=False))
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
    if planned.sacrifices and planned.sacrifices != now.sacrifices:
        changes.append(f"given up: {', '.join(planned.sacrifices)}")
    prompt = f"the prompt has {planned.prompt_tokens:,} tokens with them"
    room = f"{prompt} and the plan stays: context {planned.n_ctx:,}, {planned.kv_type} KV."
    yield f"{prompt}. {' · '.join(changes)}." if changes else room


def context_command(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    """Who has the context, as a bar and in tokens."""
    planned = session.answering.backend.dry_run(next_question(session))
    yield ContextUse(planned.ledger, planned.prompt_tokens, planned.n_ctx)
    if planned.yarn_factor > 1:
        yield Said((f"the next question takes YaRN {planned.yarn_factor:g}.",))


def drop_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Leave the oldest turns out of what the model sees, or with `none` let it see all again."""
    conversation, word = session.conversation, arguments.strip()
    if word == "none":
        conversation.dropped = frozenset()
        yield Said(("the model sees the whole conversation again.",))
        return
    count = int(word) if word.isdecimal() and len(word) < 10 else 0 if word else 1
    if not count:
        raise UsageError(f"/drop {word[:40]}: give how many of the oldest turns, or none to see all again.")
    gone = conversation.drop(count)
    if not gone:
        raise UsageError("there is no turn to leave out.")
    tokens = sum(_tokens(session, turn) for turn in gone)
    yield Said(
        (
            f"left out of what the model sees while this chat runs: {thoughts(gone)}, {tokens:,} tokens; "
            "the history keeps them, /drop none takes them in again.",
        )
    )


def what_can_go(session: Session) -> Iterator[str]:
    """What could be left out when a prompt does not fit: the oldest turns, the files that wait."""
    sent = session.conversation.sent
    if sent:
        oldest = [f"thought {turn.number} ({_tokens(session, turn):,} tok)" for turn in sent[:_SHOWN_TURNS]]
        rest = f" and {len(sent) - _SHOWN_TURNS} later ones" if len(sent) > _SHOWN_TURNS else ""
        yield f"oldest turns: {', '.join(oldest)}{rest}: /drop N leaves out the first N."
    if session.attached:
        largest = sorted(session.attached.items(), key=lambda item: -item[1].tokens)[:_SHOWN_TURNS]
        files = [f"{name} ({waiting.tokens:,} tok)" for name, waiting in largest]
        rest = (
            f" and {len(session.attached) - len(files)} smaller ones"
            if len(session.attached) > len(files)
            else ""
        )
        yield f"attached: {', '.join(files)}{rest}: /file drop NAME takes one back."


def _tokens(session: Session, turn: TurnRecord) -> int:
    """What a turn takes of a later prompt: what was asked and answered."""
    count = session.answering.backend.count_tokens
    return count(turn.content) + count(turn.answer)


def plan_command(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    """What is planned for the next question."""
    yield NextPlan(session.answering.backend.dry_run(next_question(session)))


def stats_command(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    """Tokens and seconds of the last turn."""
    last = session.conversation.last
    if last is None:
        raise UsageError("nothing was asked yet.")
    seed = f"seed {last.origin.seed} · " if last.origin is not None else ""
    reason = f"ended: {last.reason}" if last.reason is not None else f"state: {last.state}"
    yield Said((f"thought {last.number} · {seed}{reason}", stats_line(last.stats)))
