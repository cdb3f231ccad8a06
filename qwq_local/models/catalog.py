"""What the name of a GGUF file says: its quantization type, its part number, whether it is a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SHA256 = re.compile(r"[0-9a-f]{64}")
_TYPE = re.compile(r"(?:^|[-._/])((?:I?Q\d|TQ\d)(?:_[A-Z0-9]+)*|BF16|F16|F32|MXFP4)(?=[-.]|$)", re.IGNORECASE)
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
# GGUFs that are not language models: vision projectors, importance matrices.
_NOT_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)

# The files of Qwen/QwQ-32B-GGUF in bytes, as rounded on its page: for `--list` when the hub does not answer.
OFFICIAL_BYTES: Mapping[str, int] = {
    "Q4_K_M": 19_900_000_000,
    "Q5_0": 22_600_000_000,
    "Q5_K_M": 23_300_000_000,
    "Q6_K": 26_900_000_000,
    "Q8_0": 34_800_000_000,
}


@dataclass(frozen=True, slots=True)
class Catalog:
    """Where the files of the model called `name` come from: a hub repository and its files by type."""

    name: str
    repo: str
    files: Mapping[str, str]


def file_type_of(name: str) -> str:
    """The quantization type in a file's name, in capitals; empty when there is none."""
    found = _TYPE.findall(name)
    return found[-1].upper() if found else ""


@dataclass(frozen=True, slots=True)
class FilePart:
    """The name of a file without its part number, that number from 1, and the number of parts."""

    stem: str
    number: int = 1
    count: int = 1


def part_of(name: str) -> FilePart:
    """The part of a split model that a file's name says; part 1 of 1 when it says none."""
    match = _PART.fullmatch(name)
    if match is None:
        return FilePart(name)
    return FilePart(match["stem"], int(match["part"]), int(match["count"]))


def parts_of(path: Path) -> tuple[Path, ...]:
    """The files of all parts of the model at `path`, the first one first."""
    part = part_of(path.name)
    if part.count == 1:
        return (path,)
    numbers = range(1, part.count + 1)
    return tuple(path.with_name(f"{part.stem}-{number:05}-of-{part.count:05}.gguf") for number in numbers)


def blob_sha256(path: Path) -> str:
    """The SHA-256 in the name of a file in the caches of Hugging Face and ollama; empty elsewhere."""
    blob = path.resolve()
    name = blob.name.removeprefix("sha256-")
    return name if blob.parent.name == "blobs" and SHA256.fullmatch(name) else ""


def is_model(name: str) -> bool:
    """Whether a file of that name is a GGUF with a language model or a part of one."""
    return name.lower().endswith(".gguf") and not _NOT_MODELS.search(name)
