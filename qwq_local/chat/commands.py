"""The table of commands: names, what they take, what they do; a line in, the command that it gives out.

What begins with a slash and one word is a command. A path such as /etc/hosts is none, nor is what has a
space before the slash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qwq_local.chat import attaching, conversing, recalling, saving, setting, weighing
from qwq_local.chat.events import COMMAND, ChatEvent, CommandHelp, Leave, TextTable
from qwq_local.chat.session import Session
from qwq_local.errors import UsageError
from qwq_local.profiles.keys import nearest

Handler = Callable[[Session, str], Iterator[ChatEvent]]
_MORE_HELP = (
    ("@PATH in a question", "attach a file where it is named"),
    ("/help keys", "the keys of a terminal"),
)


@dataclass(frozen=True, slots=True)
class Command:
    """One command: its name, what may follow it, its line of help, and what does it.

    `details` are the further lines of /help NAME.
    """

    name: str
    arguments: str
    help: str
    handler: Handler
    details: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def usage(self) -> str:
        """How it is written."""
        return f"/{self.name} {self.arguments}".rstrip()


def parse(line: str) -> tuple[str, str] | None:
    """The name of a command and what follows it; None for a line that is no command."""
    match = COMMAND.fullmatch(line)
    return (match[1].lower(), match[2] or "") if match is not None else None


def find_command(name: str) -> Command:
    """The command of a name. Raises UsageError naming the nearest one."""
    for command in COMMANDS:
        if name == command.name or name in command.aliases:
            return command
    names = [each for command in COMMANDS for each in (command.name, *command.aliases)]
    near = nearest(name, names, 0.5)
    hint = f"Did you mean /{near}?" if near else "/help lists the commands."
    raise UsageError(
        f"there is no command /{name[:40]}. {hint} A question that begins with / takes a space first."
    )


def help_command(_session: Session, arguments: str) -> Iterator[ChatEvent]:
    """All commands, one of them in detail, or the keys."""
    if arguments.strip().removeprefix("/").lower() == "keys":
        yield TextTable(KEYS)
        return
    if arguments.strip():
        command = find_command(arguments.strip().removeprefix("/").lower())
        also = (f"also: {', '.join('/' + alias for alias in command.aliases)}",) if command.aliases else ()
        yield CommandHelp(command.usage, (command.help, *command.details, *also))
        return
    commands = ((command.usage, command.help) for command in COMMANDS)
    yield TextTable((*commands, *_MORE_HELP))


def exit_command(_session: Session, _arguments: str) -> Iterator[ChatEvent]:
    """Leave."""
    yield Leave()


_SETTINGS_FOR_ONE_TURN = (
    "Settings are for this turn alone: /regen temperature=0.3. Without --seed another seed is drawn.",
    "What was answered before stays in the history.",
)

# What the keys of terminal/repl do, which knows no commands; docs/chat.md says more.
KEYS = (
    ("Ctrl-T", "while it thinks: fold, unfold; else open the last thought"),
    ("Ctrl-G", "answer now: end the thinking"),
    ("Ctrl-S", "steer: put a sentence of yours into the thinking"),
    ("Ctrl-C", "stop, or clear the line; on an empty one twice: leave"),
    ("Ctrl-D", "leave, on an empty line"),
    ("Enter", "send; while it works your line waits its turn"),
    ("Alt-Enter, Ctrl-J", "a new line"),
    ('"""', "begin and end a text of many lines"),
    ("Up", "take back the line that waits; else earlier lines"),
    ("Ctrl-R", "search earlier lines"),
    ("Ctrl-X Ctrl-E", "write the line in your editor"),
    ("Tab", "complete a command, file, key or name"),
    ("Right, Ctrl-E", "take what is suggested behind the cursor"),
    ("Ctrl-L, Ctrl-Z", "draw anew; to the shell, fg comes back"),
)

COMMANDS: tuple[Command, ...] = (
    Command(
        "think",
        "[N|last|grep WORDS|VIEW]",
        "open a thought, search all, or set how it shows",
        recalling.think_command,
        (
            "/think 3 opens the third thought, /think or /think last the last one.",
            "/think grep WORDS searches the thoughts of all conversations.",
            "/think off, excerpt, tail or full sets how thinking is shown while it streams.",
        ),
    ),
    Command("continue", "", "go on with what was stopped or cut", conversing.continue_command),
    Command(
        "regen",
        "[--seed N] [KEY=VALUE…]",
        "answer the last question anew",
        conversing.regen_command,
        _SETTINGS_FOR_ONE_TURN,
    ),
    Command("undo", "", "take the last turn back", conversing.undo_command),
    Command(
        "edit",
        "[TEXT]",
        "change the last question in your editor",
        conversing.edit_command,
        ("What comes back is asked in its place, and so is TEXT, without an editor.",),
    ),
    Command(
        "retry-from",
        "N",
        "go back to thought N and ask its question again",
        conversing.retry_command,
        ("--seed N and KEY=VALUE may follow, as after /regen.", *_SETTINGS_FOR_ONE_TURN),
    ),
    Command(
        "file",
        "PATH|GLOB…",
        "attach files to the next question",
        attaching.file_command,
        (
            "A directory stands for the text files below it; ** in a glob for any folders.",
            "Hidden files are left out.",
            "/file alone lists what waits; /file drop [NAME] takes all or one back.",
            "The tokens of each file are shown, and what they do to the plan.",
        ),
    ),
    Command("context", "", "who has the context", weighing.context_command),
    Command(
        "drop",
        "[N|none]",
        "leave the oldest N turns out of what is sent",
        weighing.drop_command,
        ("Without N it is one turn. The history keeps them; /drop none lets the model see them again.",),
    ),
    Command("model", "[NAME]", "let another model answer", setting.model_command),
    Command("profile", "[NAME]", "answer under another profile", setting.profile_command),
    Command(
        "set",
        "[KEY [VALUE]]",
        "set a key of the profile",
        setting.set_command,
        (
            "/set lists what was set, /set KEY says what it is and what is allowed.",
            "/set KEY default takes the profile's value again.",
        ),
    ),
    Command(
        "system",
        "[TEXT|none]",
        "the system prompt from the next question on",
        setting.system_command,
        ("/system none leaves it out, /system default takes the profile's.",),
    ),
    Command("seed", "[N|random]", "the seed of every turn from now on", setting.seed_command),
    Command("plan", "", "what is planned for the next question", weighing.plan_command),
    Command("stats", "", "tokens and seconds of the last turn", weighing.stats_command),
    Command(
        "copy",
        "[answer|thought|code [N]]",
        "put the last answer on the clipboard",
        recalling.copy_command,
        ("/copy code takes the last code block of the answer, /copy code 1 the first.",),
    ),
    Command(
        "save",
        "FILE.md|.json|.html",
        "write the conversation to a file",
        saving.save_command,
        ("A file that is there is overwritten only if this chat saved it, or if ! follows the name.",),
    ),
    Command("clear", "", "begin a new conversation", conversing.clear_command, aliases=("new",)),
    Command("name", "[NAME]", "call this conversation by a name", conversing.name_command),
    Command("resume", "[NAME|ID]", "go on with an earlier conversation", conversing.resume_command),
    Command("fork", "[N]", "go on in a copy that ends with thought N", conversing.fork_command),
    Command("history", "[WORDS]", "list or search all conversations", recalling.history_command),
    Command(
        "help",
        "[COMMAND|keys]",
        "this list, or more about one",
        help_command,
        ("/help keys lists the keys.",),
    ),
    Command("exit", "", "leave", exit_command, aliases=("quit", "bye")),
)
