"""What was collected so far, and of what, to and from a file beside the output.

OUT.partial is an importance matrix like any other, usable as it is, with one more key: a JSON text that says
how many chunks are in, the exact counts, and digests of model, text and options. It is one file, renamed into
place, so that sums and state never disagree. Knows no llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwq_convert.imatrix.file import ImportanceMatrix, read_imatrix, write_imatrix
from qwq_convert.reading.gguf_header import read_header
from qwq_convert.reading.strict_json import Fields, parse_object
from qwq_convert.writing.partial import partial_path
from qwq_local.errors import ConvertError

STATE_KEY = "qwq.imatrix.state"
MAX_STATE_BYTES = 2**24
MAX_COUNT = 2**53
# What is looked at of a model: all of it would take minutes for 65 GB.
SAMPLES, SAMPLE_BYTES = 64, 2**16


@dataclass(frozen=True, slots=True)
class Collected:
    """How far a run came: `counts` are exact where the file's floats need not be."""

    matrix: ImportanceMatrix
    counts: Mapping[str, int]
    chunks_done: int


def save(out: Path, collected: Collected, identity: Mapping[str, str]) -> None:
    """Keep what was collected so far; ConvertError when it cannot be written."""
    state = {
        "chunks_done": collected.chunks_done,
        "counts": dict(collected.counts),
        "identity": dict(identity),
    }
    write_imatrix(partial_path(out), collected.matrix, (STATE_KEY, json.dumps(state)))


def resume(out: Path, identity: Mapping[str, str]) -> tuple[Collected | None, str]:
    """What an earlier run of the same identity left, and otherwise why there is nothing to go on from.

    The reason is empty when there was no earlier run. Never raises for what the file holds.
    """
    path = partial_path(out)
    if not path.exists():
        return None, ""
    try:
        matrix, state = read_imatrix(path), _read_state(path)
        made_of = state.optional_object("identity")
        counts = state.optional_object("counts")
        if made_of is None or counts is None:
            state.fail("identity and counts are missing.")
        for part, digest in identity.items():
            if made_of.optional_text(part) != digest:
                return None, f"{path} was collected with other {part}"
        exact = {name: counts.integer(name, 0, MAX_COUNT) for name in matrix.counts}
        if any(np.float32(count) != matrix.counts[name][0] for name, count in exact.items()):
            state.fail("its counts are not those of its sums.")
        return Collected(matrix, exact, state.integer("chunks_done")), ""
    except ConvertError as error:
        return None, f"what an earlier run left cannot be used ({error})"


def model_digest(path: Path) -> str:
    """A digest of a model file's length and of samples all over it, its header among them."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            n_bytes = file.seek(0, 2)
            digest.update(f"{n_bytes}\0".encode())
            for sample in range(SAMPLES):
                file.seek(sample * n_bytes // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read ({error.strerror}).") from None
    return digest.hexdigest()


def digest_of(parts: Iterable[bytes]) -> str:
    """A digest of byte strings one after the other, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\0".encode())
        digest.update(part)
    return digest.hexdigest()


def _read_state(path: Path) -> Fields:
    header = read_header(path)
    if STATE_KEY not in header.keys:
        raise ConvertError(f"{path}: has no {STATE_KEY}.")
    _, encoded = header.encoded(STATE_KEY)
    if len(encoded) > MAX_STATE_BYTES:
        raise ConvertError(f"{path}: {STATE_KEY} has {len(encoded):,} bytes.")
    return parse_object(encoded[8:], f"{path}: {STATE_KEY}")
