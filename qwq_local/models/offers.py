"""The quantizations that a repository offers, which of them fits this machine best, and a look at its header.

The best quantization is the largest one that leaves room for a working context. A model in 16 bits or more
is never chosen by itself: it is better than the best quantization by nothing that a user would notice.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from qwq_convert.architectures import find_architecture, supported
from qwq_convert.strict_json import shown

from qwq_local.errors import DoesNotFit, ModelFileError, PullError, UsageError
from qwq_local.hub.client import Hub, Listing
from qwq_local.hub.source import RemoteFile
from qwq_local.hub.transfer import ByteRange, RetryWait
from qwq_local.models.catalog import file_type_of, is_model, part_of
from qwq_local.text import binary_size, decimal_size

if TYPE_CHECKING:
    from qwq_local.models.facts import Fit

FIRST_BYTES = 4096
UNQUANTIZED = ("F32", "F16", "BF16")
_KEY = b"general.architecture"
_STRING_TYPE = 8  # GGUF_METADATA_VALUE_TYPE_STRING
# Magic, version, number of tensors, number of key-values; then the first key and the type of its value.
_START = struct.Struct(f"<4sIQQQ{len(_KEY)}sI")
_MAX_ARCHITECTURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Offer:
    """One quantization in a repository, with all its parts in order."""

    file_type: str
    files: tuple[RemoteFile, ...]

    @property
    def name(self) -> str:
        """The name of the first file."""
        return self.files[0].name

    @property
    def n_bytes(self) -> int:
        """The length of all parts together."""
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class ChosenOffer:
    """An offer, and in one line why it was chosen."""

    offer: Offer
    reason: str


def offers(listing: Listing) -> list[Offer]:
    """Every quantization that the repository has with all its parts, the largest first."""
    groups: dict[str, dict[int, RemoteFile]] = {}
    counts: dict[str, int] = {}
    for file in listing.files:
        if is_model(file.name):
            part = part_of(file.name)
            groups.setdefault(part.stem, {})[part.number] = file
            counts[part.stem] = part.count
    found = [
        Offer(file_type_of(parts[1].name), tuple(parts[number] for number in sorted(parts)))
        for stem, parts in groups.items()
        if set(parts) == set(range(1, counts[stem] + 1))
    ]
    return sorted(found, key=lambda offer: (-offer.n_bytes, offer.name))


def offer_of_type(repo: str, available: Iterable[Offer], file_type: str) -> Offer:
    """The offer of that type, in any case; of two, the smaller. Raises UsageError with all types."""
    known = {offer.file_type: offer for offer in available if offer.file_type}
    if (found := known.get(file_type.upper())) is not None:
        return found
    near = get_close_matches(file_type.upper(), known, n=1, cutoff=0.6)
    meant = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"{repo} has no type {file_type}; it has {', '.join(sorted(known)) or 'none'}.{meant}")


def offer_of_file(listing: Listing, available: Iterable[Offer], name: str) -> Offer:
    """The offer that a file belongs to, with all parts.

    Raises PullError with the nearest names when there is no such file, UsageError when it is not a model.
    """
    wanted = listing.find(name)
    for offer in available:
        if wanted in offer.files:
            return offer
    raise UsageError(
        f"{name} is no whole GGUF model: some of its parts are missing, or it is something else."
    )


def best_offer(repo: str, available: Sequence[Offer], fit: Fit) -> ChosenOffer:
    """The largest quantization with room for 16k tokens. Raises DoesNotFit with what the smallest gives."""
    # Imports numpy, which a pull by a type's name does not need.
    from qwq_local.models.facts import MIN_CONTEXT

    usable = [offer for offer in available if offer.file_type and offer.file_type not in UNQUANTIZED]
    where = f"{binary_size(fit.free_bytes)} free in {fit.place}"
    for offer in usable:
        context = fit.context(offer.n_bytes)
        if context >= MIN_CONTEXT:
            return ChosenOffer(
                offer,
                f"{offer.file_type} ({decimal_size(offer.n_bytes)}) is the largest of {len(usable)} types "
                f"that leaves room for {MIN_CONTEXT:,} tokens: {context:,} with a {fit.kv_type} KV cache, "
                f"{where}",
            )
    if not usable:
        raise DoesNotFit(f"{repo} has no quantized GGUF. Name another with --repo, or a file with --file.")
    smallest = usable[-1]
    raise DoesNotFit(
        f"no type in {repo} leaves room for {MIN_CONTEXT:,} tokens here: {where}, and the smallest, "
        f"{smallest.file_type}, is {decimal_size(smallest.n_bytes)} and gives "
        f"{fit.context(smallest.n_bytes):,}. Take it all the same with `qwq pull {smallest.file_type}`, "
        "or make a smaller one: `qwq pull --convert Q3_K_M`."
    )


def check_remote_header(hub: Hub, listing: Listing, file: RemoteFile) -> Generator[RetryWait, None, None]:
    """Look at a file's first bytes. Raises ModelFileError when they show that qwq cannot run the model.

    Every writer of GGUFs puts the architecture first. Where it is not first, the reader of the whole header
    decides, after the download.
    """
    try:
        first = yield from hub.read_range(listing, file, ByteRange(0, min(FIRST_BYTES, file.n_bytes)))
    except PullError:
        return  # the download itself has the better message, and needs no ranges
    if not first.startswith(b"GGUF"):
        raise ModelFileError(f"{file.name} is no GGUF. Nothing was downloaded; choose another file.")
    architecture = _architecture(first)
    if architecture is not None and find_architecture(architecture) is None:
        raise ModelFileError(
            f"{file.name} holds a model of architecture {shown(architecture)}; qwq runs "
            f"{supported()}. Nothing was downloaded."
        )


def _architecture(first: bytes) -> str | None:
    """The value of the first key, when the key is the architecture and the value is a short string."""
    if len(first) < _START.size + 8:
        return None
    *_, n_key, key, kind = _START.unpack_from(first)
    (n_bytes,) = struct.unpack_from("<Q", first, _START.size)
    if (n_key, key, kind) != (len(_KEY), _KEY, _STRING_TYPE) or n_bytes > _MAX_ARCHITECTURE_BYTES:
        return None
    return first[_START.size + 8 :][:n_bytes].decode("utf-8", "replace")
