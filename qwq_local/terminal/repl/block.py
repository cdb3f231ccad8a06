'''Input between `"""` and `"""`: when it is still open, and what is sent of it.'''

from __future__ import annotations

_QUOTES = '"""'


def is_open(text: str) -> bool:
    """Whether Enter is to begin a new line: the block has begun and not ended."""
    return text.startswith(_QUOTES) and _end(text) is None


def content(text: str) -> str:
    """What the person means: without the quotes, where they are around the whole text."""
    end = _end(text) if text.startswith(_QUOTES) else None
    if end is None or text[end + len(_QUOTES) :].strip():
        return text
    return text[len(_QUOTES) : end].strip("\n")


def _end(text: str) -> int | None:
    """Where the closing quotes are: at the end of the first line that ends with them."""
    start = len(_QUOTES)
    while (found := text.find(_QUOTES, start)) >= 0:
        newline = text.find("\n", found)
        rest = text[found + len(_QUOTES) : newline if newline >= 0 else len(text)]
        if not rest.strip():
            return found
        start = found + 1
    return None
