"""/save: the conversation as it stands to a file, in the form that its ending names."""

from __future__ import annotations

from collections.abc import Iterator

from qwq_local.chat.events import ChatEvent, Said
from qwq_local.chat.files import mode_of, resolved, split_arguments
from qwq_local.chat.session import Session
from qwq_local.errors import UsageError
from qwq_local.history.export import exported, format_of, save_text
from qwq_local.text import plural

_ANYWAY = "!"


def save_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Write the conversation to a file, or again to the one it was written to last."""
    words = split_arguments(arguments)
    names = [word for word in words if word != _ANYWAY]
    if len(names) > 1:
        names = [arguments.strip().removesuffix(_ANYWAY).rstrip()]
    if not names and not session.conversation.saved:
        raise UsageError("/save FILE: give a name that ends in .md, .json or .html.")
    path = resolved(names[0], session.setup.cwd) if names else session.conversation.saved[-1]
    shown = names[0] if names else str(path)
    kind = format_of(shown)
    record = session.conversation.record
    if record is None or not session.conversation.turns:
        raise UsageError("there is nothing to save yet: nothing was asked.")
    replaces = path in session.conversation.saved or len(names) < len(words)
    if mode_of(path) is not None and not replaces:
        raise UsageError(f"{shown} is there already: /save {shown} {_ANYWAY} replaces it.")
    save_text(path, exported(kind, record, session.conversation.turns), replaces=replaces)
    if path not in session.conversation.saved:
        session.conversation.saved.append(path)
    yield Said((f"saved {plural(len(session.conversation.turns), 'turn')} to {path}",))
