"""What is asked: files, standard input and the argument in, messages out.

Everything that comes in must be UTF-8 text; what is not is refused by name and byte, never guessed at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from qwq_local.cli.environment import Environment
from qwq_local.dialogue.conversation import Attachment
from qwq_local.errors import SchemaError, UsageError
from qwq_local.reading import MAX_TEXT_BYTES, decoded, read_text

MAX_SCHEMA_BYTES = 1 << 20


def read_attachments(paths: Sequence[Path]) -> list[Attachment]:
    """Each file's text under the name it was given by. Raises UsageError naming the file, and the byte."""
    if Path("-") in paths:
        raise UsageError("-f -: standard input is read without being named. Leave it out.")
    return [Attachment(str(path), read_text(path)) for path in paths]


def read_stdin(environment: Environment) -> str:
    """What was piped in; empty when a person is at the terminal or there is no standard input."""
    if environment.stdin is None or environment.stdin_is_terminal:
        return ""
    try:
        raw = environment.stdin.read(MAX_TEXT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"standard input cannot be read: {error}.") from error
    return decoded(raw, "standard input")


def read_schema(path: Path) -> Mapping[str, object]:
    """The JSON schema in a file. Raises SchemaError when it is not a JSON object."""
    raw = read_text(path, MAX_SCHEMA_BYTES)
    try:
        schema = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{path} is not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise SchemaError(f"{path} holds {json.dumps(schema)[:40]}; a JSON schema is an object.")
    return schema
