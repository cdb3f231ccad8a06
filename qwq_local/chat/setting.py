"""/set, /seed, /system, /profile and /model: a key and a value, or a name, in; another way to answer out.

Everything is checked before it counts; what is refused leaves all as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qwq_local.chat.answering import shown
from qwq_local.chat.events import ChatEvent, Said
from qwq_local.chat.session import Session
from qwq_local.errors import ProfileError, UsageError
from qwq_local.history.records import ConversationRecord
from qwq_local.profiles.keys import RULES, nearest
from qwq_local.profiles.rules import quoted

DEFAULT = "default"
_SHOWN_CHARS = 300


def set_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Say what was set, or what a key is; with a value set it, with `default` as the profile has it."""
    key, _, value = _parted(arguments)
    if not key:
        yield Said(tuple(_what_was_set(session)))
        return
    if key not in RULES:
        near = nearest(key, RULES)
        raise ProfileError(f"there is no key {quoted(key[:60])}.{f' Did you mean {near}?' if near else ''}")
    if not value:
        yield Said((_described(session, key), f"allowed: {RULES[key].allowed}"))
        return
    session.answering.change({key: None if value == DEFAULT else value})
    yield Said((_described(session, key),))


def seed_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """The seed of every turn from now on, or `random` for a new one each time."""
    yield from set_command(session, f"seed {arguments}")


def system_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """The system prompt from the next question on; without text the one there is, `none` for none."""
    text = arguments.strip()
    if not text:
        system = session.answering.profile.system
        yield Said(
            (f"system prompt: {quoted(system[:_SHOWN_CHARS])}" if system else "there is no system prompt.",)
        )
        return
    session.answering.change({"system": "" if text == "none" else None if text == DEFAULT else text})
    tokens = session.answering.backend.count_tokens(session.answering.profile.system)
    said = f"the system prompt has {tokens:,} tokens." if tokens else "there is no system prompt any more."
    yield Said((f"from the next question on {said}",))


def profile_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Another profile from now on; what was set stays set over it. Without a name the one there is."""
    answering, name = session.answering, arguments.strip()
    if not name:
        names = ", ".join(session.setup.profile_names())
        yield Said((f"profile {answering.chosen.profile or 'none'}", f"there are: {names}"))
        return
    answering.change_profile(name)
    kept = ", ".join(f"{key} {text[:40] or 'none'}" for key, text in answering.settings.items())
    described = answering.profile.description
    yield Said((f"profile {name}: {described}", *([f"still set: {kept}"] if kept else [])))


def model_command(session: Session, arguments: str) -> Iterator[ChatEvent]:
    """Another model from now on, the conversation goes on. Without a name the one there is."""
    answering, name = session.answering, arguments.strip()
    if not name:
        names = ", ".join(session.setup.model_names())
        yield Said((f"model {answering.chosen.model}", f"there are: {names}"))
        return
    planned = answering.change_model(name)
    yield Said((f"{planned.model} answers from now on; it is loaded with the next question.", planned.line))


def take_over(session: Session, record: ConversationRecord) -> Iterator[str]:
    """Answer with a conversation's own system prompt; a line when another model answered it before."""
    answering = session.answering
    if record.system != answering.profile.system:
        answering.change({"system": record.system})
    if record.model != answering.chosen.model:
        yield (
            f"it was answered by {record.model}, {answering.chosen.model} answers now: "
            f"/model {record.model} goes back."
        )


def seeded(words: Sequence[str]) -> tuple[int | None, list[str]]:
    """The seed after `--seed` among some words, and the other words. Raises UsageError for no seed."""
    rest, seed, words = [], None, list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name != "--seed":
            rest.append(word)
            continue
        text = value if equals else words.pop(0) if words else ""
        try:
            seed = RULES["seed"].accept(RULES["seed"].read(text))
        except ValueError:
            raise UsageError(f"--seed {text[:40]}: allowed is {RULES['seed'].allowed}.") from None
    return seed if isinstance(seed, int) else None, rest


def _parted(arguments: str) -> tuple[str, str, str]:
    """Key and value, between them a space or `=`."""
    text = arguments.strip()
    at = next((i for i, character in enumerate(text) if character in " =\t\n"), len(text))
    return text[:at], text[at : at + 1], text[at + 1 :].strip().removeprefix("= ").strip()


def _what_was_set(session: Session) -> Iterator[str]:
    answering = session.answering
    if not answering.settings:
        yield f"nothing is set: everything is as profile {answering.chosen.profile or 'none'} has it."
    for key in answering.settings:
        yield f"{key} {_short(shown(answering.profile, key))} (profile: {_short(answering.default_of(key))})"


def _described(session: Session, key: str) -> str:
    """A key's value and where it comes from."""
    resolved = session.answering.chosen.resolved
    origin = "set here" if key in session.answering.settings else resolved.origins[key]
    return f"{key} {_short(shown(resolved.profile, key))} · {origin}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"
