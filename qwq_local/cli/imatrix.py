"""`qwq imatrix`: collects an importance matrix for `qwq convert --imatrix` from calibration texts."""

from __future__ import annotations

import os
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
from qwq_local.cli.screen import WorkScreen, drained
from qwq_local.engine.model import LoadSettings, load_model
from qwq_local.errors import Aborted, AbortFlag, ExitStatus, UsageError
from qwq_local.machine.hardware import physical_cores
from qwq_local.models.architecture import check_architecture, model_name
from qwq_local.models.header import Header, read_header
from qwq_local.paths import directories
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import profile_folders, resolve
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import SHARE, TOKENS, WorkLine
from qwq_local.terminal.sanitizer import one_line
from qwq_local.utf8 import decode_utf8

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
        texts=_read_texts(environment, flags.texts or ()),
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


def _read_texts(environment: Environment, paths: Sequence[Path]) -> tuple[CalibrationText, ...]:
    """The texts, byte for byte. Raises UsageError that names the one that cannot be read or is not text."""
    if paths.count(STDIN) > 1:
        raise UsageError("standard input (-) can be read once only.")
    texts = []
    for path in paths:
        name = "standard input" if path == STDIN else str(path)
        raw = _read_stdin(environment) if path == STDIN else _read_file(path)
        if len(raw) > MAX_TEXT_BYTES:
            raise UsageError(f"{name} is larger than {MAX_TEXT_BYTES >> 20} MiB. Give a part of it.")
        decode_utf8(raw, name, MAX_TEXT_BYTES)
        texts.append(CalibrationText(name, raw))
    return tuple(texts)


class ImatrixScreen(WorkScreen):
    """Shows progress on stderr: a bar on a terminal, lines elsewhere."""

    def __init__(self, output: Output, request: ImatrixRequest) -> None:
        super().__init__(output)
        self._request = request

    def show(self, event: ImatrixEvent) -> None:
        """Shows one event."""
        match event:
            case CollectionPlanned():
                self._show_plan(event)
            case CollectionProgress(done, total):
                self.draw("collecting", total, done)
            case CollectionSaved(_, done, total):
                if not self._output.is_terminal:
                    self.say(f"{done:,} of {total:,} chunks are collected and saved.")
            case CollectionInterrupted(path, 0):
                self.say("stopped before the first chunks were done: nothing is saved.")
            case CollectionInterrupted(path, done, total):
                kept = f"{done:,} of {total:,} chunks are in {path}"
                self.say(f"stopped: {kept}. The same command goes on from there.")
            case CollectionDone():
                self._show_end(event)

    def draw(self, label: str, total: float, done: float) -> None:
        """Draws the bar: amounts are tokens, or parts of 1."""
        if self._line is None:
            unit = TOKENS if total > 1 else SHARE
            self._line = WorkLine(self._output, total, self._clock, done, unit, is_logged=False)
        self._line.update(label, done)

    def close(self) -> None:
        """Erases the bar: the next work draws its own."""
        super().close()
        self._line = None

    def _show_plan(self, event: CollectionPlanned) -> None:
        if event.starts_over:
            self.say(f"{event.starts_over}: starting over.")
        names = ", ".join(text.name for text in self._request.texts)
        plan = f"{event.n_chunks:,} chunks of {self._request.settings.chunk_size:,} tokens from {names}"
        going_on = f"; {event.chunks_done:,} are there already" if event.chunks_done else ""
        self.say(f"{plan}{going_on}.")
        self.draw("collecting", event.n_tokens, event.n_tokens // event.n_chunks * event.chunks_done)

    def _show_end(self, event: CollectionDone) -> None:
        matrix, settings = event.matrix, self._request.settings
        chunks = f"{matrix.chunk_count:,} chunks of {matrix.chunk_size:,} tokens"
        self.say(f"{event.path}: {len(matrix.sums):,} weights, {chunks}.")
        if self._request.texts and settings.process_output and "output.weight" not in matrix.sums:
            self.say("the model has no output layer apart from its embedding: nothing is collected for it.")


def _collect(
    prepared: PreparedCollection, header: Header, loading: LoadSettings, screen: ImatrixScreen
) -> int:
    abort = AbortFlag()
    status = ExitStatus.ANSWERED
    label = f"loading {one_line(model_name(header), 60)}"
    with closing(screen), interrupts_stop(abort.set):
        try:
            fractions = load_model(prepared.request.model, loading, abort)
            model = drained(fractions, lambda done: screen.draw(label, 1.0, done))
        except Aborted:
            return ExitStatus.INTERRUPTED
        with closing(model):
            for event in collect(prepared, model.handle, lambda: bool(abort)):
                screen.show(event)
                if isinstance(event, CollectionInterrupted):
                    status = ExitStatus.INTERRUPTED
    return status


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
