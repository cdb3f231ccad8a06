"""What one rendering of a chat template may use: time, the size of one value, the size of all.

Values come in and go out unchanged, or a TemplateError is raised. Knows no Jinja but its Undefined.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from jinja2.runtime import Undefined

from qwq_local.dialogue.foreign import width
from qwq_local.errors import TemplateError

MAX_VALUE = 1 << 20
MAX_MADE = 1 << 26
MAX_INT_BITS = 4096
MAX_SECONDS = 1.0
VALUE_PER_TEXT, SECONDS_PER_TEXT = 512, 0.0005
NODE_SIZE = 8


class Meter:
    """What one rendering may still use; every check raises TemplateError when it is used up."""

    def __init__(self, n_texts: int) -> None:
        self.max_value = MAX_VALUE + VALUE_PER_TEXT * n_texts
        self._seconds = MAX_SECONDS + SECONDS_PER_TEXT * n_texts
        self._deadline = time.monotonic() + self._seconds
        self._left = MAX_MADE + VALUE_PER_TEXT * n_texts

    def tick(self) -> None:
        """Checks the clock."""
        if time.monotonic() > self._deadline:
            raise TemplateError(
                f"The chat template takes longer than {self._seconds:.1f} s. Use another GGUF."
            )

    def check(self, size: int) -> None:
        """Checks the size of one value before it is made."""
        if size > self.max_value:
            raise TemplateError(
                f"The chat template makes more than {self.max_value:,} characters. Use another GGUF."
            )

    def measure(self, value: object, *, printable: bool = False) -> object:
        """The value itself, its size counted; `printable` allows only what has a bounded text form."""
        self.tick()
        size, stack = 0, [value]
        while stack:
            item = stack.pop()
            size += NODE_SIZE
            if isinstance(item, str):
                size += width(item)
            elif isinstance(item, list | tuple):
                self.check(size + NODE_SIZE * len(item))
                stack.extend(cast("Sequence[object]", item))
            elif isinstance(item, dict):
                self.check(size + NODE_SIZE * len(item))
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, int) and item.bit_length() > MAX_INT_BITS:
                raise TemplateError(f"The chat template computes with more than {MAX_INT_BITS} bits.")
            elif printable and not (item is None or isinstance(item, int | float | Undefined)):
                raise TemplateError(f"The chat template writes a {type(item).__name__}. Use another GGUF.")
            self.check(size)
        self._left -= size
        if self._left < 0:
            raise TemplateError(f"The chat template makes more than {MAX_MADE:,} characters in all.")
        return value
