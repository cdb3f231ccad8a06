"""/model, /profile, /set, /system and /seed: who answers, and with which settings.

A change is checked before it counts; a change that is refused leaves everything as it was.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwq_local.chat.commands.command import Command
from qwq_local.chat.completion import complete_name, complete_word
from qwq_local.chat.events import ChatEvent, Completion, say
from qwq_local.chat.model import ChatModel, value_text
from qwq_local.chat.session import Session
from qwq_local.errors import ProfileError
from qwq_local.profiles.keys import MEANINGS, RULES, nearest
from qwq_local.settings import quoted

_DEFAULT = "default"
_SHOWN_CHARS = 300


def _model(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Let another model answer from now on, in the same conversation. Without a name say which answers."""
    name = arguments.strip()
    if not name:
        names = ", ".join(session.setup.model_names())
        yield say(f"model {session.model.name}", f"there are: {names}")
        return
    planned = session.model.change_model(name)
    shown, plan = (planned.model, (planned.line,)) if planned is not None else (name, ())
    yield say(f"{shown} answers from now on; it is loaded with the next question.", *plan)


def _profile(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Use another profile from now on; settings stay over it. Without a name say which is used."""
    model, name = session.model, arguments.strip()
    if not name:
        names = ", ".join(session.setup.profile_names())
        yield say(f"profile {model.chosen.profile or 'none'}", f"there are: {names}")
        return
    model.change_profile(name)
    kept = ", ".join(f"{key} {text[:40] or 'none'}" for key, text in model.chosen.settings.items())
    lines = [f"profile {name}: {model.profile.description}", *([f"still set: {kept}"] if kept else [])]
    yield say(*lines)


def _set(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Set a key, or say what it is; `default` restores the profile's value. No key: list what was set."""
    key, value = _key_and_value(arguments)
    if not key:
        yield say(*_what_was_set(session))
        return
    if key not in RULES:
        near = nearest(key, RULES)
        raise ProfileError(f"there is no key {quoted(key[:60])}.{f' Did you mean {near}?' if near else ''}")
    if not value:
        yield say(_described(session, key), MEANINGS[key], f"allowed: {RULES[key].allowed}")
        return
    session.model.change({key: None if value == _DEFAULT else value})
    yield say(_described(session, key))


def _complete_set(_session: Session, rest: str) -> Iterator[Completion]:
    key, space, start = rest.partition(" ")
    if not space:
        yield from complete_word(MEANINGS.items(), key)
    elif key in RULES:
        yield from complete_name((*RULES[key].names, _DEFAULT), start.lstrip())


def _key_and_value(arguments: str) -> tuple[str, str]:
    """Key and value, with a space or `=` between them."""
    text = arguments.strip()
    at = next((i for i, character in enumerate(text) if character in " =\t\n"), len(text))
    return text[:at], text[at + 1 :].strip().removeprefix("= ").strip()


def _what_was_set(session: Session) -> Iterator[str]:
    model = session.model
    if not model.chosen.settings:
        yield f"nothing is set: everything is as profile {model.chosen.profile or 'none'} has it."
    for key in model.chosen.settings:
        value, default = value_text(model.profile, key), model.default_of(key)
        yield f"{key} {_short(value)} (profile: {_short(default)})"


def _described(session: Session, key: str) -> str:
    """A key's value and where it comes from."""
    resolved = session.model.chosen.resolved
    origin = "set here" if key in session.model.chosen.settings else resolved.origins[key]
    return f"{key} {_short(value_text(resolved.profile, key))} · {origin}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _system(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """The system prompt from the next question on. Without a text say what it is; `none` removes it."""
    text = arguments.strip()
    if not text:
        system = session.model.profile.system
        yield say(
            f"system prompt: {quoted(system[:_SHOWN_CHARS])}" if system else "there is no system prompt."
        )
        return
    session.model.change({"system": "" if text == "none" else None if text == _DEFAULT else text})
    system = session.model.profile.system
    tokens = session.model.count_tokens(system)
    size = f"the system prompt has {tokens:,} tokens." if tokens else "there is a new system prompt."
    yield say(f"from the next question on {size if system else 'there is no system prompt any more.'}")


COMMANDS = (
    Command(
        "model",
        "[NAME]",
        "let another model answer",
        _model,
        complete=lambda session, rest: complete_name(session.setup.model_names(), rest),
    ),
    Command(
        "profile",
        "[NAME]",
        "answer under another profile",
        _profile,
        complete=lambda session, rest: complete_name(session.setup.profile_names(), rest),
        needs=ChatModel.can_adopt,
    ),
    Command(
        "set",
        "[KEY [VALUE]]",
        "set a key of the profile",
        _set,
        details=(
            "/set lists what was set, /set KEY says what it is and what is allowed.",
            "/set KEY default takes the profile's value again.",
        ),
        complete=_complete_set,
        needs=ChatModel.can_adopt,
    ),
    Command(
        "system",
        "[TEXT|none]",
        "the system prompt from the next question on",
        _system,
        details=("/system none leaves it out, /system default takes the profile's.",),
    ),
    Command(
        "seed",
        "[N|random]",
        "the seed of every turn from now on",
        lambda session, arguments: _set(session, f"seed {arguments}"),
    ),
)
