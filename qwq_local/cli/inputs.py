"""What is asked: files, standard input and the argument in, messages out.

Everything that comes in must be UTF-8 text; what is not is refused by name and byte, never guessed at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwq_local.cli.environment import Environment
from qwq_local.dialogue.conversation import Attachment, Message, Role, user_message
from qwq_local.errors import SchemaError, UsageError

# 131,072 tokens are some 600 kB of prose; far beyond that nothing fits, and a disk image is no text.
MAX_TEXT_BYTES = 64 << 20
MAX_SCHEMA_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def checked(text: str, what: str) -> str:
    """The text of a flag or argument. Raises UsageError when its bytes were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return decoded(os.fsencode(text), what)
    return text


def read_attachments(paths: Sequence[Path]) -> list[Attachment]:
    """Each file's text under the name it was given by. Raises UsageError naming the file, and the byte."""
    return [Attachment(str(path), _read_file(path)) for path in paths]


def read_stdin(environment: Environment) -> str:
    """What was piped in; empty when a person is at the terminal or there is no standard input."""
    if environment.stdin is None or environment.stdin_is_terminal:
        return ""
    try:
        raw = environment.stdin.read(MAX_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"standard input cannot be read: {error}.") from error
    return decoded(raw, "standard input")


def decoded(raw: bytes, source: str) -> str:
    """Bytes as text. Raises UsageError naming the source and the first byte that is not UTF-8 text."""
    if len(raw) > MAX_TEXT_BYTES:
        raise UsageError(f"{source} is larger than {MAX_TEXT_BYTES >> 20} MiB: no context holds it.")
    raw = raw.removeprefix(_BYTE_ORDER_MARK)
    if (at := raw.find(b"\0")) >= 0:
        raise UsageError(f"{source} is not text: byte {at:,} is zero.")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} is not UTF-8 text: byte {error.start:,} is 0x{raw[error.start]:02x}."
        ) from None
    return text.replace("\r\n", "\n")


@dataclass(frozen=True, slots=True)
class Framing:
    """What stands around every question: the system prompt, the files before it, the suffix after it."""

    system: str
    attachments: tuple[Attachment, ...] = ()
    suffix: str = ""

    def messages(self, question: str, stdin_text: str = "") -> list[Message]:
        """System and user message: files first, then standard input, the question and the suffix last.

        Raises UsageError when there is nothing to ask.
        """
        asked = question.rstrip()
        if self.suffix and (asked or stdin_text.strip()):
            asked = f"{asked}\n{self.suffix}" if asked else self.suffix
        message = user_message(self.attachments, stdin_text, asked)
        return [Message(Role.SYSTEM, self.system), message] if self.system else [message]


def read_schema(path: Path) -> Mapping[str, object]:
    """The JSON schema in a file. Raises SchemaError when it is not a JSON object."""
    raw = _read_file(path, MAX_SCHEMA_BYTES)
    try:
        schema = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise SchemaError(f"{path} holds a {type(schema).__name__}; a JSON schema is an object.")
    return schema


def _read_file(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is no file name: {error}.") from None
    if len(raw) > limit:
        raise UsageError(f"{path} is larger than {limit >> 10:,} KiB.")
    return decoded(raw, str(path))
