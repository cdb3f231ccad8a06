"""The path of a GGUF in, the headers of all its parts out: of one file, or of a split model's several.

Split models are named NAME-00001-of-0000N.gguf and say in `split.*` keys which part they are (llama.cpp's
src/llama-model-loader.cpp, tools/gguf-split). What llama.cpp asks of them is checked. Knows no tensor data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qwq_convert.reading.gguf_header import GgufHeader, read_header
from qwq_local.errors import ConvertError

_SPLIT_NAME = re.compile(r"^(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf$")


def read_parts(path: Path) -> tuple[GgufHeader, ...]:
    """The headers of the GGUF at `path` and, when it is the first of several parts, of them all, in order.

    ConvertError when a part is missing, damaged, out of place, not the first, or repeats a tensor.
    """
    first = read_header(path)
    parts = [first]
    owners = {tensor.name: path for tensor in first.tensors}
    for number, sibling in _siblings(path, first):
        part = read_header(sibling)
        if (stated := _number(part, "split.no")) != number:
            raise ConvertError(f"{sibling}: says it is part {stated}, should be {number}. Fetch it again.")
        for tensor in part.tensors:
            if (owner := owners.setdefault(tensor.name, sibling)) != sibling:
                raise ConvertError(f"{sibling}: {tensor.name!r} is in {owner.name} too. Fetch both again.")
        parts.append(part)
    _check_count(first, len(owners))
    return tuple(parts)


def _siblings(path: Path, first: GgufHeader) -> Iterator[tuple[int, Path]]:
    """The other parts with their numbers from 1. ConvertError when `path` is not the first of them."""
    count = _number(first, "split.count")
    if count is None or count <= 1:
        return
    match = _SPLIT_NAME.match(path.name)
    is_first = match is not None and int(match["part"]) == 1 and int(match["count"]) == count
    if match is None or not is_first or _number(first, "split.no") != 0:
        raise ConvertError(
            f"{path} is one of {count} parts: name the first, ending in -00001-of-{count:05}.gguf."
        )
    for number in range(1, count):
        yield number, path.with_name(f"{match['stem']}-{number + 1:05}-of-{count:05}.gguf")


def _check_count(first: GgufHeader, n_tensors: int) -> None:
    stated = _number(first, "split.tensors.count")
    if stated is not None and stated != n_tensors:
        raise ConvertError(f"{first.path}: its parts hold {n_tensors} tensors, it says {stated}. Fetch them.")


def _number(header: GgufHeader, key: str) -> int | None:
    value = header.value(key) if key in header.keys else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
