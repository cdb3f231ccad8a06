"""Calibration text and a loaded model in, events out, an importance matrix at the end.

Read `collect` from top to bottom: the text is cut into chunks, chunks are computed side by side, what their
weights are multiplied with is summed, and from time to time everything is saved, so that a run which is cut
off at any moment is taken up by the next. The file is llama-imatrix's, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwq_convert.imatrix.collector import Collector, CollectorSettings, Stopped, Tally, Tokens
from qwq_convert.imatrix.file import ImportanceMatrix, merge, read_imatrix, write_imatrix
from qwq_convert.imatrix.resume import Collected, digest_of, model_digest, resume, save
from qwq_convert.imatrix.tensor import TESTED_VERSION
from qwq_convert.writing.lock import alone
from qwq_convert.writing.partial import partial_path
from qwq_local.errors import ConvertError

# Chunks shorter than this say little, and of the shortest llama.cpp computes too few rows at once to count.
LEAST_CHUNK = 32
# llama.cpp counts the bytes of a text, and the tokens that there is room for, in 32 bits with a sign.
MAX_TEXT_BYTES = 2**31 - 16
_NOTHING = ImportanceMatrix({}, {}, (), 0, CollectorSettings().chunk_size)


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A text to collect from and the name it goes by in the file."""

    name: str
    content: bytes


@dataclass(frozen=True, slots=True)
class ImatrixRequest:
    """What to collect and where to. Texts are read as one, in their order, with nothing between them.

    `earlier` are files whose sums are added first; `chunks` takes that many from the start of the text.
    """

    model: Path
    texts: tuple[CalibrationText, ...]
    out: Path
    earlier: tuple[Path, ...] = ()
    chunks: int | None = None
    save_every: int = 10
    settings: CollectorSettings = field(default_factory=CollectorSettings)


@dataclass(frozen=True, slots=True)
class Planned:
    """The text makes `n_chunks`; `chunks_done` are there from an earlier run; else why they are not."""

    n_chunks: int
    chunks_done: int
    n_tokens: int
    starts_over: str


@dataclass(frozen=True, slots=True)
class Progress:
    """So many tokens of all are computed."""

    tokens_done: int
    tokens_total: int


@dataclass(frozen=True, slots=True)
class Saved:
    """What there is so far is on the disk."""

    path: Path
    chunks_done: int
    n_chunks: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The run was stopped; `path` holds what there is, and nothing when no chunk is done."""

    path: Path
    chunks_done: int
    n_chunks: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The importance matrix is under its final name."""

    path: Path
    matrix: ImportanceMatrix


ImatrixEvent = Planned | Progress | Saved | Interrupted | Finished


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request found good before the model is loaded."""

    request: ImatrixRequest
    text: bytes
    start: ImportanceMatrix
    identity: Mapping[str, str]

    def matrix(self, tally: Tally) -> ImportanceMatrix:
        """What the tally says as a file has it."""
        chunk_size = self.request.settings.chunk_size
        counts = {name: np.array([count], np.float32) for name, count in tally.counts.items()}
        datasets = self.start.datasets + tuple(text.name for text in self.request.texts)
        # As llama-imatrix: chunks are counted by rows, of which very short steps are passed over.
        chunk_count = max(tally.counts.values(), default=0) // chunk_size
        return ImportanceMatrix(tally.sums, counts, datasets, chunk_count, chunk_size)


def prepare(request: ImatrixRequest) -> Prepared:
    """Everything that can be known without the model, checked and read. Raises ConvertError."""
    settings = request.settings
    if settings.chunk_size < LEAST_CHUNK:
        raise ConvertError(
            f"a chunk of {settings.chunk_size} tokens is too short. Take {LEAST_CHUNK} or more."
        )
    with output_held(request.out):
        pass  # free now; `collect` makes sure when the model is loaded
    start = merge(map(read_imatrix, request.earlier), settings.chunk_size) if request.earlier else _NOTHING
    # llama-imatrix leaves out the line end that editors put at the end of a file.
    text = b"".join(text.content for text in request.texts).removesuffix(b"\n")
    if len(text) > MAX_TEXT_BYTES:
        raise ConvertError(
            f"the texts have {len(text):,} bytes together, {MAX_TEXT_BYTES:,} are possible. Give fewer."
        )
    options = f"{TESTED_VERSION} {settings.chunk_size} {request.chunks} {settings.process_output} "
    identity = {
        "model": model_digest(request.model),
        "text": digest_of([text]),
        "options": digest_of([options.encode(), str(settings.parse_special).encode()]),
        "files to merge": digest_of(path.read_bytes() for path in request.earlier),
    }
    return Prepared(request, text, start, identity)


def collect(prepared: Prepared, model: Any, stop: Callable[[], bool]) -> Generator[ImatrixEvent, None, None]:
    """Collect from a model that llama.cpp has loaded (its handle), telling of each step.

    `stop` is asked often; when true, the chunks done are saved and the last event is Interrupted. Raises
    ConvertError, DoesNotFit.
    """
    with output_held(prepared.request.out):
        yield from _collect(prepared, model, stop)


def _collect(prepared: Prepared, model: Any, stop: Callable[[], bool]) -> Generator[ImatrixEvent, None, None]:
    request, settings = prepared.request, prepared.request.settings
    with Collector(model, settings, stop) as collector:
        chunks = cut(collector.tokenize(prepared.text), request)
        tally, done, starts_over = _start(prepared, len(chunks))
        yield Planned(len(chunks), done, chunks.size, starts_over)
        saved = done
        try:
            while done < len(chunks):
                group, added = chunks[done : done + settings.n_parallel], tally.copy()
                tokens_done = done * settings.chunk_size
                for n_tokens in collector.run(group, added):
                    tokens_done += n_tokens
                    yield Progress(tokens_done, chunks.size)
                tally, done = added, done + len(group)
                if done - saved >= request.save_every and done < len(chunks):
                    _save(prepared, tally, done)
                    saved = done
                    yield Saved(partial_path(request.out), done, len(chunks))
        except Stopped:
            if done > saved:
                _save(prepared, tally, done)
            yield Interrupted(partial_path(request.out), done, len(chunks))
            return
    yield publish(request.out, prepared.matrix(tally))


def publish(out: Path, matrix: ImportanceMatrix) -> Finished:
    """Write the file under its final name and remove what was kept in case of a cut."""
    write_imatrix(out, matrix)
    partial_path(out).unlink(missing_ok=True)
    return Finished(out, matrix)


def merge_files(request: ImatrixRequest) -> Finished:
    """The earlier files alone as one file, without text and model; the first one's chunk size stays."""
    with output_held(request.out):
        return publish(request.out, merge(map(read_imatrix, request.earlier)))


@contextmanager
def output_held(out: Path) -> Iterator[None]:
    """Within the block `out` is free and no other run's. Raises ConvertError."""
    check_output(out)
    with alone(out):
        check_output(out)  # another run may have finished it meanwhile
        yield


def check_output(out: Path) -> None:
    """ConvertError unless `out` is free to take."""
    if out.exists() or out.is_symlink():
        raise ConvertError(f"{out}: exists already. Remove it or write to another name (-o).")
    if not out.parent.is_dir():
        raise ConvertError(f"{out.parent}: no such folder. Create it or write elsewhere (-o).")


def cut(tokens: Tokens, request: ImatrixRequest) -> Tokens:
    """The chunks of the text, one a row; what is left at its end is not used. ConvertError when none."""
    chunk_size = request.settings.chunk_size
    n_chunks = len(tokens) // chunk_size
    if not n_chunks:
        raise ConvertError(
            f"the text has {len(tokens):,} tokens, less than one chunk of {chunk_size:,}. "
            "Give more text or a smaller --ctx."
        )
    n_chunks = min(n_chunks, request.chunks or n_chunks)
    return tokens[: n_chunks * chunk_size].reshape(n_chunks, chunk_size)


def _start(prepared: Prepared, n_chunks: int) -> tuple[Tally, int, str]:
    """The sums to go on from, how many chunks are in them, and why not those of an earlier run."""
    saved, reason = resume(prepared.request.out, prepared.identity)
    if saved is not None and saved.chunks_done <= n_chunks:
        sums = {name: sums.copy() for name, sums in saved.matrix.sums.items()}
        return Tally(sums, dict(saved.counts)), saved.chunks_done, ""
    start = prepared.start
    counts = {name: round(float(count[0])) for name, count in start.counts.items()}
    return Tally({name: sums.copy() for name, sums in start.sums.items()}, counts), 0, reason


def _save(prepared: Prepared, tally: Tally, done: int) -> None:
    collected = Collected(prepared.matrix(tally), tally.counts, done)
    save(prepared.request.out, collected, prepared.identity)
