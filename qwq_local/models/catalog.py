"""File names of a repository in, the quantizations it offers out: types, sizes, parts that belong together.

A type is read off the file's name, as every publisher of GGUFs writes it. Knows no memory and no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_local.errors import UsageError

if TYPE_CHECKING:
    from qwq_local.hub.client import Listing, RemoteFile

_TYPE = re.compile(r"(?:^|[-._/])((?:I?Q\d|TQ\d)(?:_[A-Z0-9]+)*|BF16|F16|F32|MXFP4)(?=[-.]|$)", re.IGNORECASE)
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")
# GGUFs that are no language models: vision projectors, importance matrices.
_OTHERS = re.compile(r"mmproj|imatrix", re.IGNORECASE)
UNQUANTIZED = ("F32", "F16", "BF16")

# Qwen/QwQ-32B-GGUF in bytes, as its page rounds them: for `--list` where the hub cannot be asked.
OFFICIAL_BYTES: Mapping[str, int] = {
    "Q4_K_M": 19_900_000_000,
    "Q5_0": 22_600_000_000,
    "Q5_K_M": 23_300_000_000,
    "Q6_K": 26_900_000_000,
    "Q8_0": 34_800_000_000,
}


@dataclass(frozen=True, slots=True)
class Catalog:
    """Where the files of the model called `name` may be: a hub repository and its files by type."""

    name: str
    repo: str
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Offer:
    """One quantization in a repository: all its parts in order."""

    file_type: str
    files: tuple[RemoteFile, ...]

    @property
    def name(self) -> str:
        """The name of its first file."""
        return self.files[0].name

    @property
    def n_bytes(self) -> int:
        """What all parts have together."""
        return sum(file.n_bytes for file in self.files)


def file_type_of(name: str) -> str:
    """The quantization type in a file's name, in capitals; empty when there is none."""
    found = _TYPE.findall(name)
    return found[-1].upper() if found else ""


def part_of(name: str) -> tuple[str, int, int]:
    """A file's name without its part number, that number from 1, and how many parts there are."""
    match = _PART.fullmatch(name)
    if match is None:
        return name, 1, 1
    return match["stem"], int(match["part"]), int(match["count"])


def parts_of(path: Path) -> tuple[Path, ...]:
    """The files of all parts of the model that the GGUF at `path` is of, the first one first."""
    stem, _, count = part_of(path.name)
    if count == 1:
        return (path,)
    return tuple(path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1))


def is_model(name: str) -> bool:
    """Whether the name is that of a GGUF with a language model in it, or a part of one."""
    return name.lower().endswith(".gguf") and not _OTHERS.search(name)


def offers(listing: Listing) -> list[Offer]:
    """What the repository offers whole, the largest first; a type it has twice keeps its smaller file."""
    groups: dict[str, dict[int, RemoteFile]] = {}
    counts: dict[str, int] = {}
    for file in listing.files:
        if is_model(file.name):
            stem, part, count = part_of(file.name)
            groups.setdefault(stem, {})[part] = file
            counts[stem] = count
    found = [
        Offer(file_type_of(parts[1].name), tuple(parts[number] for number in sorted(parts)))
        for stem, parts in groups.items()
        if set(parts) == set(range(1, counts[stem] + 1))
    ]
    return sorted(found, key=lambda offer: (-offer.n_bytes, offer.name))


def offer_of_type(repo: str, available: Iterable[Offer], file_type: str) -> Offer:
    """The offer of that type, in any case. Raises UsageError that lists the types there are."""
    known = {offer.file_type: offer for offer in available if offer.file_type}
    if (found := known.get(file_type.upper())) is not None:
        return found
    near = get_close_matches(file_type.upper(), known, n=1, cutoff=0.6)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"{repo} has no type {file_type}; it has {', '.join(sorted(known)) or 'none'}.{meant}")


def offer_of_file(listing: Listing, available: Iterable[Offer], name: str) -> Offer:
    """The offer that a file belongs to, with all parts.

    Raises PullError naming the nearest files when there is no such one, UsageError for one that is no model.
    """
    wanted = listing.find(name)
    for offer in available:
        if wanted in offer.files:
            return offer
    raise UsageError(
        f"{name} is no whole GGUF model: some of its parts are missing, or it is something else."
    )
