"""`qwq imatrix`: collects an importance matrix for `qwq convert --imatrix` from calibration texts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from qwq_convert.imatrix.collector import CollectorSettings
from qwq_convert.imatrix.run import (
    CalibrationText,
    CollectionDone,
    CollectionInterrupted,
    CollectionPlanned,
    CollectionProgress,
    CollectionSaved,
    ImatrixEvent,
    ImatrixRequest,
    PreparedCollection,
    collect,
    merge_files,
    prepare,
)

from qwq_local.backend.make import model_file
from qwq_local.cli.environment import Environment, interrupts_stop, refuse_stdout
from qwq_local.cli.flags import ImatrixFlags
from qwq_local.engine.model import LoadedModel, LoadSettings, load_model
from qwq_local.errors import Aborted, AbortFlag, ExitStatus, UsageError
from qwq_local.machine.hardware import physical_cores
from qwq_local.models.architecture import check_architecture, model_name
from qwq_local.models.header import Header, read_header
from qwq_local.paths import directories
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import profile_folders, resolve
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import TOKENS, ProgressBar
from qwq_local.terminal.sanitizer import one_line

# Some 60 million tokens: days of work for a model of 32 billion parameters.
MAX_TEXT_BYTES = 256 << 20
STDIN = Path("-")


def collect_matrix(environment: Environment, flags: ImatrixFlags) -> int:
    """Collects a matrix or merges files; checks all input before the model loads. Returns the exit status."""
    if not flags.texts and not flags.earlier:
        raise UsageError("give a text to collect from, or files to merge with --in.")
    refuse_stdout(flags.out)
    path, profile = _find(environment, flags)
    header = read_header(path)
    shape = check_architecture(header)
    if flags.ctx > shape.context_length:
        raise UsageError(
            f"--ctx {flags.ctx:,} is more than the {shape.context_length:,} tokens the model was made for."
        )
    request = ImatrixRequest(
        model=path,
        texts=read_texts(environment, flags.texts or ()),
        out=flags.out or Path(f"{path.stem}.imatrix.gguf"),
        earlier=tuple(flags.earlier or ()),
        chunks=flags.chunks,
        save_every=flags.save_every,
        settings=CollectorSettings(
            flags.ctx, _threads(flags.threads, profile), flags.process_output, flags.parse_special
        ),
    )
    screen = ImatrixScreen(Output.of(environment.stderr, environment.variables), request)
    if not request.texts:
        screen.show(merge_files(request))
        return ExitStatus.ANSWERED
    loading = LoadSettings(profile.n_gpu_layers, profile.use_mmap)
    return _collect(prepare(request), header, loading, screen)


def read_texts(environment: Environment, paths: Sequence[Path]) -> tuple[CalibrationText, ...]:
    """The texts, byte for byte. Raises UsageError that names the one that cannot be read or is not text."""
    if paths.count(STDIN) > 1:
        raise UsageError("standard input (-) can be read once only.")
    return tuple(
        CalibrationText("standard input", _checked(_read_stdin(environment), "standard input"))
        if path == STDIN
        else CalibrationText(str(path), _checked(_read_file(path), str(path)))
        for path in paths
    )


class ImatrixScreen:
    """Shows progress on stderr: a bar on a terminal, lines elsewhere."""

    def __init__(self, output: Output, request: ImatrixRequest) -> None:
        self._output = output
        self._request = request
        self._bar: ProgressBar | None = None

    def show_loading(self, name: str, fraction: float) -> None:
        """Shows how much of the model is loaded."""
        self._draw(f"loading {one_line(name, 60)}", 1.0, fraction)

    def show(self, event: ImatrixEvent) -> None:
        """Shows one event."""
        match event:
            case CollectionPlanned():
                self.close()
                self._show_plan(event)
            case CollectionProgress(done, total):
                self._draw("collecting", total, done)
            case CollectionSaved(_, done, total):
                if not self._output.is_terminal:
                    self._say(f"{done:,} of {total:,} chunks are collected and saved.")
            case CollectionInterrupted():
                self.close()
                self._show_interruption(event)
            case CollectionDone():
                self.close()
                self._show_end(event)

    def close(self) -> None:
        """Erases the bar."""
        if self._bar is not None:
            self._bar.finish()
            self._bar = None

    def _show_plan(self, event: CollectionPlanned) -> None:
        if event.starts_over:
            self._say(f"{event.starts_over}: starting over.")
        names = ", ".join(text.name for text in self._request.texts)
        plan = f"{event.n_chunks:,} chunks of {self._request.settings.chunk_size:,} tokens from {names}"
        going_on = f"; {event.chunks_done:,} are there already" if event.chunks_done else ""
        self._say(f"{plan}{going_on}.")
        done = event.n_tokens // event.n_chunks * event.chunks_done
        self._draw("collecting", event.n_tokens, done)

    def _show_interruption(self, event: CollectionInterrupted) -> None:
        if event.chunks_done:
            self._say(
                f"stopped: {event.chunks_done:,} of {event.n_chunks:,} chunks are in {event.path}. "
                "The same command goes on from there."
            )
        else:
            self._say("stopped before the first chunks were done: nothing is saved.")

    def _show_end(self, event: CollectionDone) -> None:
        matrix, settings = event.matrix, self._request.settings
        self._say(
            f"{event.path}: {len(matrix.sums):,} weights, "
            f"{matrix.chunk_count:,} chunks of {matrix.chunk_size:,} tokens."
        )
        if self._request.texts and settings.process_output and "output.weight" not in matrix.sums:
            self._say("the model has no output layer apart from its embedding: nothing is collected for it.")

    def _say(self, text: str) -> None:
        self._output.write(f"{one_line(text, 2000)}\n")

    def _draw(self, label: str, total: float, done: float) -> None:
        if self._bar is None:
            unit = TOKENS if total > 1 else None
            self._bar = ProgressBar(self._output, label, total, time.monotonic, unit)
        self._bar.update(done)


def _collect(
    prepared: PreparedCollection, header: Header, loading: LoadSettings, screen: ImatrixScreen
) -> int:
    abort = AbortFlag()
    status = ExitStatus.ANSWERED
    with closing(screen), interrupts_stop(abort.set):
        try:
            model = _load(prepared.request.model, model_name(header), loading, abort, screen)
        except Aborted:
            return ExitStatus.INTERRUPTED
        with closing(model):
            for event in collect(prepared, model.handle, lambda: bool(abort)):
                screen.show(event)
                if isinstance(event, CollectionInterrupted):
                    status = ExitStatus.INTERRUPTED
    return status


def _load(
    path: Path, name: str, settings: LoadSettings, abort: AbortFlag, screen: ImatrixScreen
) -> LoadedModel:
    fractions = load_model(path, settings, abort)
    while True:
        try:
            screen.show_loading(name, next(fractions))
        except StopIteration as finished:
            model: LoadedModel = finished.value
            return model


def _find(environment: Environment, flags: ImatrixFlags) -> tuple[Path, Profile]:
    """The model's file and its profile; only the keys about loading matter here."""
    places = directories(environment.variables)
    folders = profile_folders(places)
    resolved = resolve(flags.model, None, folders, environment.variables, flags.settings or ())
    return model_file(flags.model, resolved, places), resolved.profile


def _threads(n_threads: int | None, profile: Profile) -> int:
    threads, n_cpus = n_threads or profile.threads, os.cpu_count() or 1
    if threads > n_cpus:
        raise UsageError(f"threads is {threads}, this machine has {n_cpus}: more would wait.")
    return threads or physical_cores()


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None


def _read_stdin(environment: Environment) -> bytes:
    if environment.stdin is None or environment.stdin_is_terminal:
        raise UsageError("- reads standard input, and nothing is piped in.")
    return environment.read_stdin(MAX_TEXT_BYTES + 1)


def _checked(raw: bytes, source: str) -> bytes:
    if len(raw) > MAX_TEXT_BYTES:
        raise UsageError(f"{source} is larger than {MAX_TEXT_BYTES >> 20} MiB. Give a part of it.")
    if (at := raw.find(b"\0")) >= 0:
        raise UsageError(f"{source} is not text: byte {at:,} is zero.")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{source} is not UTF-8 text: byte {error.start:,} is 0x{raw[error.start]:02x}."
        ) from None
    return raw
