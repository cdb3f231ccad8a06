"""All commands of a chat: how a line becomes one, /help, and the completion of a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from qwq_local.chat.commands import context, conversation, files, history, output, settings
from qwq_local.chat.commands.command import Command
from qwq_local.chat.completion import MAX_ITEMS, MENTION_START, complete_file, complete_word
from qwq_local.chat.events import COMMAND, ChatEvent, CommandHelp, Completion, KeyHelp, Leave, TextTable
from qwq_local.chat.session import Session
from qwq_local.errors import QwqError, UsageError
from qwq_local.profiles.keys import nearest

_MORE_HELP = (
    ("@PATH in a question", "attach a file where it is named"),
    ("/help keys", "the keys of a terminal"),
)


def parse(line: str) -> tuple[str, str] | None:
    """The name of a command and what follows it; None for a line that is no command."""
    match = COMMAND.fullmatch(line)
    return (match[1].lower(), match[2] or "") if match is not None else None


def find_command(session: Session, name: str) -> Command:
    """The command of a name. Raises UsageError that names the nearest one."""
    commands = available_commands(session)
    for command in commands:
        if name in command.names:
            return command
    near = nearest(name, [each for command in commands for each in command.names], 0.5)
    hint = f"Did you mean /{near}?" if near else "/help lists the commands."
    raise UsageError(
        f"there is no command /{name[:40]}. {hint} A question that begins with / takes a space first."
    )


def available_commands(session: Session) -> list[Command]:
    """The commands that this chat's model allows."""
    return [each for each in COMMANDS if each.needs is None or each.needs(session.model)]


def completions(session: Session, before_cursor: str) -> Sequence[Completion]:
    """What may replace the end of the text; at most MAX_ITEMS, nothing for an ordinary question."""
    try:
        return list(islice(_completions(session, before_cursor), MAX_ITEMS))
    except QwqError:
        # A folder or a history that cannot be read offers nothing; the command that opens it says why.
        return []


def _completions(session: Session, before_cursor: str) -> Iterator[Completion]:
    if not before_cursor.startswith("/"):
        line = before_cursor.rpartition("\n")[2]
        if mention := MENTION_START.search(line):
            yield from complete_file(session.setup.cwd, line[mention.end() :], mark="@")
        return
    name, space, rest = before_cursor[1:].partition(" ")
    for command in available_commands(session):
        if space and name.lower() in command.names and command.complete is not None:
            yield from command.complete(session, rest)
        elif not space:
            for each in command.names:
                if each.startswith(name.lower()):
                    yield Completion(f"/{each}", len(name) + 1, command.help)


def _help(session: Session, arguments: str) -> Iterator[ChatEvent]:
    name = arguments.strip().removeprefix("/").lower()
    if name == "keys":
        yield KeyHelp()
    elif name:
        command = find_command(session, name)
        also = (f"also: {', '.join('/' + alias for alias in command.aliases)}",) if command.aliases else ()
        yield CommandHelp(command.usage, (command.help, *command.details, *also))
    else:
        commands = [(command.usage, command.help) for command in available_commands(session)]
        yield TextTable((*commands, *_MORE_HELP))


def _complete_help(session: Session, rest: str) -> Iterator[Completion]:
    names = [(command.name, command.help) for command in available_commands(session)]
    yield from complete_word([*names, ("keys", "the keys of a terminal")], rest)


COMMANDS: tuple[Command, ...] = (
    *conversation.COMMANDS,
    *output.COMMANDS,
    *files.COMMANDS,
    *context.COMMANDS,
    *settings.COMMANDS,
    *history.COMMANDS,
    Command(
        "help",
        "[COMMAND|keys]",
        "this list, or more about one",
        _help,
        details=("/help keys lists the keys.",),
        complete=_complete_help,
    ),
    Command("exit", "", "leave", lambda _session, _arguments: iter([Leave()]), aliases=("quit", "bye")),
)
"""In the order of /help."""
