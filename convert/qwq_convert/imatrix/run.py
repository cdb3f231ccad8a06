"""Collects an importance matrix from a calibration text and a loaded model as a sequence of events.

Read `collect` from top to bottom: the text is cut into chunks, chunks are computed side by side, and the
squares of activations are summed. The sums are saved from time to time, so that the next run can resume. The
file is llama-imatrix's, byte for byte.

OUT.partial is a usable importance matrix with one more key: a JSON text with the number of finished chunks,
the exact counts, and digests of model, text and options. Sums and state are in one file, so they never
disagree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwq_convert.disk import partial_path, write_errors
from qwq_convert.gguf_file import read_header
from qwq_convert.imatrix.collector import (
    TESTED_VERSION,
    ActivationSums,
    CollectionStopped,
    Collector,
    CollectorSettings,
    Tokens,
)
from qwq_convert.imatrix.file import ImportanceMatrix, merge, read_imatrix, write_imatrix
from qwq_convert.strict_json import Fields, parse_object
from qwq_local.errors import ConvertError
from qwq_local.files import lock_beside

# Shorter chunks carry little information, and of the shortest ones llama.cpp computes too few rows at once.
LEAST_CHUNK = 32
# llama.cpp counts the bytes of a text and the room for tokens in signed 32-bit numbers.
MAX_TEXT_BYTES = 2**31 - 16
STATE_KEY = "qwq.imatrix.state"
MAX_COUNT = 2**53
# The samples that a model's digest covers: all 65 GB would take minutes.
SAMPLES, SAMPLE_BYTES = 64, 2**16
_NOTHING = ImportanceMatrix({}, {}, (), 0, CollectorSettings().chunk_size)


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A text to collect from, and its name in the file."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class ImatrixRequest:
    """What to collect, and the file to write. The texts are joined in their order, with nothing between them.

    The sums of the `earlier` files are added first. `chunks` limits the run to the first chunks of the text.
    """

    model: Path
    texts: tuple[CalibrationText, ...]
    out: Path
    earlier: tuple[Path, ...] = ()
    chunks: int | None = None
    save_every: int = 10
    settings: CollectorSettings = field(default_factory=CollectorSettings)


@dataclass(frozen=True, slots=True)
class CollectionPlanned:
    """`chunks_done` of `n_chunks` are done by an earlier run; `starts_over` says why they are not used."""

    n_chunks: int
    chunks_done: int
    n_tokens: int
    starts_over: str


@dataclass(frozen=True, slots=True)
class CollectionProgress:
    """`tokens_done` of `tokens_total` are computed."""

    tokens_done: int
    tokens_total: int


@dataclass(frozen=True, slots=True)
class CollectionSaved:
    """The sums so far are on the disk."""

    path: Path
    chunks_done: int
    n_chunks: int


@dataclass(frozen=True, slots=True)
class CollectionInterrupted:
    """The run was stopped. `path` has the sums so far; there is no file when no chunk is done."""

    path: Path
    chunks_done: int
    n_chunks: int


@dataclass(frozen=True, slots=True)
class CollectionDone:
    """The importance matrix is written under its final name."""

    path: Path
    matrix: ImportanceMatrix


ImatrixEvent = (
    CollectionPlanned | CollectionProgress | CollectionSaved | CollectionInterrupted | CollectionDone
)


@dataclass(frozen=True, slots=True)
class PreparedCollection:
    """A request that was checked before the model is loaded."""

    request: ImatrixRequest
    text: bytes
    start: ImportanceMatrix
    identity: Mapping[str, str]

    def matrix(self, tally: ActivationSums) -> ImportanceMatrix:
        """The sums as a file has them."""
        chunk_size = self.request.settings.chunk_size
        counts = {name: np.array([count], np.float32) for name, count in tally.counts.items()}
        datasets = self.start.datasets + tuple(text.name for text in self.request.texts)
        # As llama-imatrix, count chunks by rows; very short steps have none.
        chunk_count = max(tally.counts.values(), default=0) // chunk_size
        return ImportanceMatrix(tally.sums, counts, datasets, chunk_count, chunk_size)


def prepare(request: ImatrixRequest) -> PreparedCollection:
    """Read and check everything that does not need the model. Raises ConvertError."""
    settings = request.settings
    if settings.chunk_size < LEAST_CHUNK:
        raise ConvertError(
            f"a chunk of {settings.chunk_size} tokens is too short. Take {LEAST_CHUNK} or more."
        )
    with _output_held(request.out):
        pass  # free now; `collect` checks again when the model is loaded
    start = merge(map(read_imatrix, request.earlier), settings.chunk_size) if request.earlier else _NOTHING
    # As llama-imatrix, drop the line end that editors put at the end of a file.
    text = b"".join(text.content for text in request.texts).removesuffix(b"\n")
    if len(text) > MAX_TEXT_BYTES:
        raise ConvertError(
            f"the texts have {len(text):,} bytes together, {MAX_TEXT_BYTES:,} are possible. Give fewer."
        )
    options = f"{TESTED_VERSION} {settings.chunk_size} {request.chunks} {settings.process_output} "
    identity = {
        "model": _model_digest(request.model),
        "text": _digest_of([text]),
        "options": _digest_of([options.encode(), str(settings.parse_special).encode()]),
        "files to merge": _digest_of(path.read_bytes() for path in request.earlier),
    }
    return PreparedCollection(request, text, start, identity)


def collect(
    prepared: PreparedCollection, model: Any, stop: Callable[[], bool]
) -> Generator[ImatrixEvent, None, None]:
    """Collect from a model that llama.cpp has loaded (its handle), and yield an event for each step.

    `stop` is called often. When it returns true, the finished chunks are saved and the last event is
    CollectionInterrupted. Raises ConvertError and DoesNotFit.
    """
    request, settings = prepared.request, prepared.request.settings
    with _output_held(request.out):
        with Collector(model, settings, stop) as collector:
            chunks = _cut(collector.tokenize(prepared.text), request)
            tally, done, starts_over = _start(prepared, len(chunks))
            yield CollectionPlanned(len(chunks), done, chunks.size, starts_over)
            saved = done
            try:
                while done < len(chunks):
                    group, added = chunks[done : done + settings.n_parallel], tally.copy()
                    tokens_done = done * settings.chunk_size
                    for n_tokens in collector.run(group, added):
                        tokens_done += n_tokens
                        yield CollectionProgress(tokens_done, chunks.size)
                    tally, done = added, done + len(group)
                    if done - saved >= request.save_every and done < len(chunks):
                        _save(prepared, tally, done)
                        saved = done
                        yield CollectionSaved(partial_path(request.out), done, len(chunks))
            except CollectionStopped:
                if done > saved:
                    _save(prepared, tally, done)
                yield CollectionInterrupted(partial_path(request.out), done, len(chunks))
                return
        yield _publish(request.out, prepared.matrix(tally))


def _publish(out: Path, matrix: ImportanceMatrix) -> CollectionDone:
    """Write the file under its final name and remove the partial one."""
    write_imatrix(out, matrix)
    partial_path(out).unlink(missing_ok=True)
    return CollectionDone(out, matrix)


def merge_files(request: ImatrixRequest) -> CollectionDone:
    """Merge the earlier files into one, without text and model, with the first one's chunk size."""
    with _output_held(request.out):
        return _publish(request.out, merge(map(read_imatrix, request.earlier)))


@contextmanager
def _output_held(out: Path) -> Iterator[None]:
    """Within the block the name `out` is free and locked for other runs. Raises ConvertError."""
    _check_output(out)
    with ExitStack() as held:
        with write_errors(out):
            held.enter_context(lock_beside(out))
        _check_output(out)  # another run may have finished it meanwhile
        yield


def _check_output(out: Path) -> None:
    """Raises ConvertError when the name `out` is taken or its folder is missing."""
    if out.exists() or out.is_symlink():
        raise ConvertError(f"{out}: exists already. Remove it or write to another name (-o).")
    if not out.parent.is_dir():
        raise ConvertError(f"{out.parent}: no such folder. Create it or write elsewhere (-o).")


def _cut(tokens: Tokens, request: ImatrixRequest) -> Tokens:
    """The chunks of the text, one per row; a shorter rest is not used. Raises ConvertError for none."""
    chunk_size = request.settings.chunk_size
    n_chunks = len(tokens) // chunk_size
    if not n_chunks:
        raise ConvertError(
            f"the text has {len(tokens):,} tokens, less than one chunk of {chunk_size:,}. "
            "Give more text or a smaller --ctx."
        )
    n_chunks = min(n_chunks, request.chunks or n_chunks)
    return tokens[: n_chunks * chunk_size].reshape(n_chunks, chunk_size)


def _start(prepared: PreparedCollection, n_chunks: int) -> tuple[ActivationSums, int, str]:
    """The sums to start with, the number of chunks in them, and why an earlier run is not continued.

    The reason is empty when there was no earlier run. No content of its file raises an error.
    """
    path, reason = partial_path(prepared.request.out), ""
    try:
        if path.exists():
            matrix, state = read_imatrix(path), _read_state(path)
            made_of, counts = state.optional_object("identity"), state.optional_object("counts")
            if made_of is None or counts is None:
                state.fail("identity and counts are missing.")
            others = [part for part, it in prepared.identity.items() if made_of.optional_text(part) != it]
            exact = {name: counts.integer(name, 0, MAX_COUNT) for name in matrix.counts}
            if any(np.float32(count) != matrix.counts[name][0] for name, count in exact.items()):
                state.fail("its counts are not those of its sums.")
            if not others:
                done = state.integer("chunks_done", 0, n_chunks)
                return ActivationSums(dict(matrix.sums), exact), done, ""
            reason = f"{path} was collected with other {others[0]}"
    except ConvertError as error:
        reason = f"what an earlier run left cannot be used ({error})"
    start = prepared.start
    exact = {name: round(float(count[0])) for name, count in start.counts.items()}
    return ActivationSums(dict(start.sums), exact), 0, reason


def _save(prepared: PreparedCollection, tally: ActivationSums, done: int) -> None:
    """Save the sums so far. The counts are exact, where the file's floats may not be."""
    state = {"chunks_done": done, "counts": tally.counts, "identity": dict(prepared.identity)}
    note = (STATE_KEY, json.dumps(state))
    write_imatrix(partial_path(prepared.request.out), prepared.matrix(tally), note)


def _model_digest(path: Path) -> str:
    """A digest of a model file's length and of samples from all over it, its start included."""
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


def _digest_of(parts: Iterable[bytes]) -> str:
    """A digest of byte strings, each with its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\0".encode())
        digest.update(part)
    return digest.hexdigest()


def _read_state(path: Path) -> Fields:
    text = read_header(path).get(STATE_KEY)
    if not isinstance(text, str):
        raise ConvertError(f"{path}: has no {STATE_KEY}.")
    return parse_object(text.encode(), f"{path}: {STATE_KEY}")
