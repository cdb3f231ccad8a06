"""Text from outside: files, standard input, arguments. All of it must be UTF-8.

An error names the source and the first byte that is not text.
"""

from __future__ import annotations

import os
from pathlib import Path

from qwq_local.errors import UsageError

# 131,072 tokens are some 600 kB of prose; a text much larger than that fits no window.
MAX_TEXT_BYTES = 64 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How files begin that people take for text, and what to do about them.
_KINDS = (
    (b"\xff\xfe", "It is UTF-16: iconv -f UTF-16 -t UTF-8 makes it UTF-8."),
    (b"\xfe\xff", "It is UTF-16: iconv -f UTF-16 -t UTF-8 makes it UTF-8."),
    (b"%PDF-", "It is a PDF: pdftotext FILE - writes its text."),
    (b"PK\x03\x04", "It is a ZIP archive, as .docx and .odt are: save it as plain text first."),
    (b"\x1f\x8b", "It is compressed: gunzip it first."),
)


def check_utf8(text: str, what: str) -> str:
    """The text of a flag or argument. Raises UsageError when its bytes were not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return decode_utf8(os.fsencode(text), what)
    return text


def decode_utf8(raw: bytes, source: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Bytes as text, with `\\n` as line end. Raises UsageError when they are not UTF-8 text."""
    if len(raw) > limit:
        raise UsageError(f"{source} is larger than {limit >> 20} MiB: no context holds it.")
    raw = raw.removeprefix(_BYTE_ORDER_MARK)
    if (at := raw.find(b"\0")) >= 0:
        raise UsageError(f"{source} is not text: byte {at:,} is zero.{_kind(raw)}")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} is not UTF-8 text: byte {error.start:,} is 0x{raw[error.start]:02x}.{_kind(raw)}"
        ) from None
    return text.replace("\r\n", "\n")


def _kind(raw: bytes) -> str:
    """What the bytes are instead of text, and what to do, if their beginning shows it."""
    return next((f" {what}" for start, what in _KINDS if raw.startswith(start)), "")


def read_text(path: Path, limit: int = MAX_TEXT_BYTES, name: str = "") -> str:
    """The text of a file. Raises UsageError.

    `limit` is in bytes. `name` is the file's name in errors, by default its path.
    """
    name = name or str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UsageError(f"{name!r} is no file name: {error}.") from None
    if len(raw) > limit:
        raise UsageError(f"{name} is larger than {limit >> 10:,} KiB.")
    return decode_utf8(raw, name)
