"""/continue, /regen, /undo, /edit and other commands that change the conversation; and plain questions.

Turns are never deleted: what is undone or answered again stays in the archive beside what replaces it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence

from qwq_local.chat.commands.command import Command
from qwq_local.chat.commands.context import price_of_named
from qwq_local.chat.commands.history import recalled, resume
from qwq_local.chat.completion import complete_name, complete_word
from qwq_local.chat.conversation import short_title
from qwq_local.chat.events import ChatEvent, Completion, Edit, say
from qwq_local.chat.files import mentioned_files, split_arguments
from qwq_local.chat.model import ChatModel, parse_settings
from qwq_local.chat.session import Session, thought_numbers
from qwq_local.chat.turns import ChatQuestion, ask, continue_turn
from qwq_local.dialogue.conversation import fence
from qwq_local.errors import HistoryError, UsageError
from qwq_local.events import FinishReason
from qwq_local.history.records import TurnOrigin, TurnRecord, TurnState
from qwq_local.profiles.keys import MAX_SEED, MEANINGS, RULES


def new_question(session: Session, question: str) -> Iterator[ChatEvent]:
    """Ask what the user typed, with the files that wait and those that it names."""
    yield from _copied_if_changed_elsewhere(session)
    named = mentioned_files(question, session.setup.cwd)
    attachments = {each.name: each for each in (*session.attachments, *named)}
    files = tuple(attachments.values())
    asked = ChatQuestion(
        question,
        session.content(question, files),
        session.conversation.turns,
        files=tuple(attachments),
        file_texts=tuple(map(fence, files)),
        waiting=tuple(session.attached),
    )
    yield from ask(session, asked, lambda sent: price_of_named(session, named, sent))


def edited_question(session: Session, turn: TurnRecord, question: str) -> Iterator[ChatEvent]:
    """Ask an edited question in place of a turn. Its files stay; those that the question names are added."""
    kept = _files_part(turn)
    named = mentioned_files(question, session.setup.cwd)
    added = [each for each in named if not kept or each.name not in turn.files]
    asked = ChatQuestion(
        question,
        kept + session.content(question, added),
        session.conversation.turns[: turn.number - 1],
        files=(*(turn.files if kept else ()), *(each.name for each in added)),
        file_texts=(*filter(None, [kept]), *map(fence, added)),
    )
    yield from ask(session, asked, lambda sent: price_of_named(session, added, sent))


def _copied_if_changed_elsewhere(session: Session) -> Iterator[ChatEvent]:
    """Continue in a copy, and say so, if another chat has continued the conversation."""
    try:
        other = session.conversation.copy_if_changed_elsewhere()
    except HistoryError:  # what cannot be copied cannot be written either, and the turn itself says why
        return
    if other is not None:
        yield say(
            f"conversation {other} was gone on with elsewhere: this goes on beside it, as conversation "
            f"{session.conversation.id}."
        )


def _continue(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    if session.conversation.id is None:
        if session.offered is None:
            raise UsageError("nothing was asked in this conversation yet: /resume lists the ones before.")
        yield from resume(session, session.archive.conversation(session.offered), continues=True)
        session.offered = None
    yield from _copied_if_changed_elsewhere(session)
    turn = session.archive.turn(_last(session).id)
    if turn.state is TurnState.RUNNING:
        raise UsageError(f"thought {turn.number} is being answered by another process.")
    if turn.state is TurnState.DONE and turn.reason in (FinishReason.STOP, None):
        raise UsageError(
            f"thought {turn.number} came to its end, there is nothing to continue: /regen asks again."
        )
    if not turn.prompt or turn.origin is None or not turn.origin.identity:
        raise UsageError(
            f"thought {turn.number} ended before it began, there is nothing to go on from: /regen."
        )
    identity, name = session.model.identity(), session.model.name
    if not _is_same(turn.origin, identity, name):
        raise UsageError(
            f"thought {turn.number} is by {turn.origin.model} ({turn.origin.identity[:20]}), which is not "
            f"{name} ({identity[:20]}): /model {turn.origin.model} goes back, "
            "/regen asks again."
        )
    yield from continue_turn(session, turn)


def _is_same(origin: TurnOrigin, identity: str, model: str) -> bool:
    """Whether the same weights answer; by the model's name where only one side has the checksum."""
    kind, same_kind = identity.partition(":")[0], origin.identity.partition(":")[0]
    return origin.identity == identity if kind == same_kind else origin.model == model


def _regen(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Ask the last question again, with another seed or settings for this turn alone."""
    yield from _copied_if_changed_elsewhere(session)
    yield from _ask_again(session, _last(session), split_arguments(arguments))


def _retry(session: Session, arguments: str) -> Iterator[ChatEvent]:
    yield from _copied_if_changed_elsewhere(session)
    number, _, rest = arguments.strip().partition(" ")
    yield from _ask_again(session, _numbered(session, number, "/retry-from"), split_arguments(rest))


def _complete_regen(session: Session, rest: str) -> Iterator[Completion]:
    word = rest.rpartition(" ")[2]
    key, equals, start = word.partition("=")
    names = [("--seed", "the seed of this turn")]
    if session.model.can_adopt():
        if equals and key in RULES:
            yield from complete_name(RULES[key].names, start)
            return
        names += ((f"{name}=", meaning) for name, meaning in MEANINGS.items())
    yield from complete_word(names, word)


def _ask_again(session: Session, turn: TurnRecord, words: Sequence[str]) -> Iterator[ChatEvent]:
    """Ask a turn's question again; `words` are --seed and settings for this turn."""
    seed, settings = _seed_and_settings(words)
    if seed is None and "seed" not in settings and session.model.profile.seed is not None:
        # A fixed seed would only give the same answer.
        seed = random.SystemRandom().randrange(MAX_SEED + 1)
    kept = _files_part(turn)
    asked = ChatQuestion(
        turn.question,
        turn.content,
        session.conversation.turns[: turn.number - 1],
        files=turn.files,
        file_texts=(kept,) if kept else (),
        seed=seed,
    )
    with session.model.under(settings):
        yield from ask(session, asked)


def _seed_and_settings(words: Sequence[str]) -> tuple[int | None, Mapping[str, str]]:
    """The seed after `--seed` and the `key=value` settings. Raises UsageError."""
    rest, seed, left = [], None, list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name != "--seed":
            rest.append(word)
            continue
        text = value if equals else left.pop(0) if left else ""
        try:
            seed = RULES["seed"].accept(RULES["seed"].read(text))
        except ValueError:
            raise UsageError(f"--seed {text[:40]}: allowed is {RULES['seed'].allowed}.") from None
    return seed if isinstance(seed, int) else None, parse_settings(rest)


def _undo(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    yield from _copied_if_changed_elsewhere(session)
    turn = _last(session)
    before = session.conversation.turns[: turn.number - 1]
    session.conversation.back_to(before[-1] if before else None)
    yield say(f"{thought_numbers([turn])} is undone; the history keeps it.")
    if before:
        yield recalled(before[-1])
    else:
        yield say("the conversation stands before its first question.")


def _edit(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Let the user edit the last question; the result replaces it, and so does a text given here."""
    yield from _copied_if_changed_elsewhere(session)
    turn = _last(session)
    if arguments.strip():
        yield from edited_question(session, turn, arguments.strip())
        return
    session.edited_turn = turn
    yield Edit(turn.question)


def _clear(session: Session, _arguments: str) -> Iterator[ChatEvent]:
    """Begin a new conversation; the old one stays in the history."""
    before = session.conversation.record
    session.conversation.clear()
    session.attached.clear()
    session.offered = None
    kept = f" /resume {before.id} comes back to {short_title(before)!r}." if before is not None else ""
    yield say(f"a new conversation begins with the next question.{kept}")


def _name(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Name the conversation; without a name say what it is called."""
    if not arguments.strip():
        name = session.conversation.name
        yield say(f"this conversation is called {name!r}." if name else "this conversation has no name yet.")
    else:
        session.conversation.rename(arguments.strip())
        yield say(f"this conversation is called {session.conversation.name!r} now.")


def _fork(session: Session, arguments: str) -> Iterator[ChatEvent]:
    turn = _numbered(session, arguments.strip() or str(_last(session).number), "/fork")
    assert session.conversation.id is not None
    copy = session.archive.fork(session.conversation.id, turn.number)
    session.conversation.open(copy)
    yield say(f"conversation {copy} goes on after {thought_numbers([turn])}; the one before stays as it is.")


def _last(session: Session) -> TurnRecord:
    if (turn := session.conversation.last) is None:
        raise UsageError("nothing was asked in this conversation yet.")
    return turn


def _numbered(session: Session, number: str, command: str) -> TurnRecord:
    turns = session.conversation.turns
    if not turns:
        raise UsageError("nothing was asked in this conversation yet.")
    if not (number.isdecimal() and len(number) < 10 and 1 <= int(number) <= len(turns)):
        given = f" {number[:40]}" if number else ""
        raise UsageError(f"{command}{given}: give the number of a thought, 1 to {len(turns)}.")
    return turns[int(number) - 1]


def _files_part(turn: TurnRecord) -> str:
    """The part of a turn's message before its question: the files. Empty if it cannot be found."""
    end = turn.content.rfind(f"`\n\n{turn.question}") if turn.files else -1
    return turn.content[: end + len("`\n\n")] if end >= 0 else ""


_SETTINGS_FOR_ONE_TURN = (
    "Settings are for this turn alone: /regen temperature=0.3. Without --seed another seed is drawn.",
    "What was answered before stays in the history.",
)

COMMANDS = (
    Command("continue", "", "go on with what was stopped or cut", _continue, needs=ChatModel.can_continue),
    Command(
        "regen",
        "[--seed N] [KEY=VALUE…]",
        "answer the last question anew",
        _regen,
        details=_SETTINGS_FOR_ONE_TURN,
        complete=_complete_regen,
    ),
    Command("undo", "", "take the last turn back", _undo),
    Command(
        "edit",
        "[TEXT]",
        "change the last question in your editor",
        _edit,
        details=("What comes back is asked in its place, and so is TEXT, without an editor.",),
    ),
    Command(
        "retry-from",
        "N",
        "go back to thought N and ask its question again",
        _retry,
        details=("--seed N and KEY=VALUE may follow, as after /regen.", *_SETTINGS_FOR_ONE_TURN),
        complete=_complete_regen,
    ),
    Command("clear", "", "begin a new conversation", _clear, aliases=("new",)),
    Command("name", "[NAME]", "call this conversation by a name", _name),
    Command("fork", "[N]", "go on in a copy that ends with thought N", _fork),
)
