"""`qwq history`: lists, searches, shows, exports and removes the conversations that are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qwq_local.cli.environment import Environment, process_environment
from qwq_local.errors import HistoryError
from qwq_local.history.archive import FILE, Archive
from qwq_local.history.export import Format, exported, format_of, save_text
from qwq_local.history.labels import (
    NOT_STANDING,
    minute_of,
    model_of,
    state_line,
    steered_parts,
    thought_line,
    title_of,
)
from qwq_local.history.records import ConversationRecord, TurnRecord
from qwq_local.history.search import SearchHit
from qwq_local.paths import directories
from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import aligned_lines, one_line, sanitize
from qwq_local.text import plural
from qwq_local.wire import write_line

STDOUT = "-"
_NOTHING = "No conversation is kept yet; `qwq chat` and `qwq ask` keep every one."
_MAX_TITLE, _MAX_MODEL = 60, 24
_YOURS = "[yours] "

app = typer.Typer(
    invoke_without_command=True,
    help="List the conversations that are kept, or search, show, export, remove them.",
)
Which = Annotated[str, typer.Argument(metavar="ID|NAME", help="A conversation, as `qwq history` lists it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@app.callback()
def list_command(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="How many at most; 0 for all.")] = 30,
    as_json: AsJson = False,
) -> None:
    """List the conversations that are kept, the last one first."""
    if context.invoked_subcommand is not None:
        return
    environment = process_environment()
    with _archive(environment) as archive:
        records = archive.conversations()
    shown = records[:limit] if limit else records
    if as_json:
        environment.print(_json(shown))
        return
    output = Output.of(environment.stdout, environment.variables)
    columns = output.size()[0] if output.is_terminal else 200
    environment.print(*(_list_lines(shown, columns) if shown else [_NOTHING]))
    if len(shown) < len(records):
        n_hidden = len(records) - len(shown)
        hidden = "1 older one is" if n_hidden == 1 else f"{n_hidden:,} older ones are"
        write_line(environment.stderr, f"{hidden} not listed: --limit 0 lists all.\n")


def _list_lines(records: Sequence[ConversationRecord], columns: int) -> Iterator[str]:
    """The list as aligned lines, those of `qwq ask` marked; titles and models are cut to fit the columns."""
    rows = [("ID", "CONVERSATION", "CHANGED", "MODEL", "TURNS", "")]
    n_id = max(2, *(len(str(record.id)) for record in records))
    n_mark = len("  ask") if any(map(_mark, records)) else 0
    room = max(20, columns - n_id - len(minute_of(0)) - len("TURNS") - 4 * len("  ") - n_mark)
    n_model = min(_MAX_MODEL, room // 3)
    for record in records:
        rows.append(
            (
                str(record.id),
                one_line(title_of(record), min(_MAX_TITLE, room - n_model)),
                minute_of(record.changed_at),
                one_line(record.model, n_model) or "-",
                str(record.n_turns),
                _mark(record),
            )
        )
    yield from aligned_lines(rows)


def _mark(record: ConversationRecord) -> str:
    return "ask" if record.command == "ask" else ""


@app.command("search")
def search_command(
    words: Annotated[list[str], typer.Argument(metavar="WORDS…", help="All of them occur in what is found.")],
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="How many places at most.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Find where words occur, in questions, thoughts and answers; parts of words are found too."""
    environment = process_environment()
    text = " ".join(words)
    with _archive(environment) as archive:
        hits = archive.search(text, limit)
        found = {hit.conversation.id for hit in hits}
        standing = frozenset[int]().union(*(archive.standing(each) for each in found))
    if as_json:
        environment.print(_json(hits))
        return
    if not hits:
        raise HistoryError(f"no conversation has {one_line(text, 200)!r}.")
    environment.print(*_hit_lines(hits, standing))
    if any(hit.turn not in standing for hit in hits):
        write_line(environment.stderr, f"`qwq history show ID --all` prints what was {NOT_STANDING}, too.\n")


def _hit_lines(hits: Sequence[SearchHit], standing: Set[int]) -> Iterator[str]:
    """What was found: a line for each conversation, and under it a line for each place.

    `standing` are the ids of the turns on the current paths of their conversations.
    """
    last = 0
    for hit in hits:
        if hit.conversation.id != last:
            last = hit.conversation.id
            day = minute_of(hit.conversation.changed_at)
            yield f"{last}  {one_line(title_of(hit.conversation), _MAX_TITLE)} · {day}"
        gone = "" if hit.turn in standing else f" ({NOT_STANDING})"
        yield f"    {hit.part.value} {hit.number}{gone}: {one_line(hit.excerpt, 1000)}"


@app.command("show")
def show_command(
    which: Which,
    thinking: Annotated[bool, typer.Option("--thinking", help="With the thoughts unfolded.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="With the turns that were undone or answered anew.")
    ] = False,
) -> None:
    """Print a conversation."""
    environment = process_environment()
    conversation, turns = _found(environment, which)
    gone: Set[int] = frozenset()
    if everything:
        with _archive(environment) as archive:
            every = archive.every_turn(conversation.id)
        gone = {turn.id for turn in every} - {turn.id for turn in turns}
        turns = every
    environment.print(*map(sanitize, _conversation_lines(conversation, turns, gone, with_thinking=thinking)))


def _conversation_lines(
    conversation: ConversationRecord, turns: Sequence[TurnRecord], gone: Set[int], *, with_thinking: bool
) -> Iterator[str]:
    """A conversation as text: questions quoted, thoughts folded to a line or unfolded.

    `gone` are the ids of turns that no longer belong to it.
    """
    yield f"# {title_of(conversation)}"
    facts = (
        f"conversation {conversation.id}" + (" by `qwq ask`" if conversation.command == "ask" else ""),
        model_of(conversation, turns),
        conversation.profile,
        minute_of(conversation.created_at),
    )
    yield " · ".join(filter(None, facts))
    for turn in turns:
        yield ""
        yield from (f"> {line}".rstrip() for line in turn.question.split("\n"))
        yield from (f"> (with {name})" for name in turn.files)
        if turn.thinking.strip():
            yield ""
            yield f"{'▾' if with_thinking else '▸'} {thought_line(turn)}"
        if with_thinking:  # behind a bar, with the person's own sentences marked
            pieces = steered_parts(turn.thinking.strip("\n"), turn.steered)
            text = "".join(_YOURS + piece if is_yours else piece for piece, is_yours in pieces)
            yield from (f"│ {line}".rstrip() for line in text.split("\n"))
        if turn.answer.strip():
            yield ""
            yield turn.answer.strip("\n")
        for state in filter(None, (state_line(turn), NOT_STANDING if turn.id in gone else "")):
            yield ""
            yield f"({state})"


@app.command("export")
def export_command(
    which: Which,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="NAME.md, .json or .html; - for Markdown on stdout.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a conversation to a file: Markdown, JSON, or a page of HTML."""
    environment = process_environment()
    kind = Format.MARKDOWN if file == STDOUT else format_of(file)
    conversation, turns = _found(environment, which, with_tokens=True)
    text = exported(kind, conversation, turns)
    if file == STDOUT:
        is_seen = Output.of(environment.stdout, environment.variables).is_terminal
        write_line(environment.stdout, sanitize(text) if is_seen else text)
        return
    path = Path(file).expanduser()
    save_text(path, text, replaces=force, advice="--force replaces it.")
    write_line(environment.stderr, f"{sanitize(str(path))}: {plural(len(turns), 'turn')}.\n")


@app.command("rm")
def rm_command(
    which: Annotated[
        list[str], typer.Argument(metavar="ID|NAME…", help="Conversations, as `qwq history` lists them.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove conversations for good, their thoughts and answers too; says which, and asks."""
    environment = process_environment()
    with _archive(environment, must_exist=True) as archive:
        found = [archive.find(each) for each in which]
        records = list({record.id: record for record in found}.values())
        for record in records:
            turns = plural(record.n_turns, "turn")
            title = one_line(title_of(record), _MAX_TITLE)
            write_line(
                environment.stderr, f"{record.id}  {title} · {minute_of(record.changed_at)} · {turns}\n"
            )
        what = "this conversation" if len(records) == 1 else f"these {len(records)} conversations"
        if not yes and not environment.agrees(f"Remove {what} for good?", "removes"):
            environment.print("Nothing was removed.")
            return
        archive.remove(*(record.id for record in records))
    what = "1 conversation is" if len(records) == 1 else f"{len(records)} conversations are"
    environment.print(f"{what} removed.")


def _found(
    environment: Environment, which: str, *, with_tokens: bool = False
) -> tuple[ConversationRecord, list[TurnRecord]]:
    with _archive(environment, must_exist=True) as archive:
        conversation = archive.find(which)
        return conversation, archive.path(conversation.id, with_tokens=with_tokens)


@contextmanager
def _archive(environment: Environment, *, must_exist: bool = False) -> Iterator[Archive]:
    """The user's history, with the turns of dead processes completed; an empty one while there is none."""
    path = directories(environment.variables).data / FILE
    if must_exist and not path.exists():
        raise HistoryError(_NOTHING)
    with Archive.to_read(path) if path.exists() else Archive.private() as archive:
        for notice in archive.notices:
            write_line(environment.stderr, sanitize(notice) + "\n")
        archive.pick_up()
        yield archive


def _json(records: Sequence[ConversationRecord] | Sequence[SearchHit]) -> str:
    return json.dumps([asdict(record) for record in records], ensure_ascii=False, indent=1)
