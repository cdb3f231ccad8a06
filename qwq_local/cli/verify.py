"""`qwq verify`: checks a GGUF, and compares it with the weights it was made from."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from qwq_convert.gguf_file import GgufHeader, read_parts
from qwq_convert.gguf_source import GgufSource
from qwq_convert.plan import Source, describe, open_source
from qwq_convert.tokenizer_check import TOKENIZER, TokenizerReport, TokenizersMissing, compare_tokenizers
from qwq_convert.verification import (
    BytesVerified,
    TypeReport,
    compare,
    surplus_bytes,
    verify_blocks,
    verify_placement,
)

from qwq_local.backend.make import model_file
from qwq_local.cli.convert import find_source
from qwq_local.cli.environment import Environment
from qwq_local.cli.flags import VerifyFlags
from qwq_local.engine.model import LoadSettings, drained, load_model
from qwq_local.errors import AbortFlag, ExitStatus, ModelFileError, UsageError
from qwq_local.machine.hardware import physical_cores
from qwq_local.models.architecture import check_completeness, notices
from qwq_local.models.header import header_of
from qwq_local.paths import directories
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import profile_folders, resolve
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import ProgressBar, Unit
from qwq_local.terminal.sanitizer import one_line
from qwq_local.wire import object_line, write_line

Value = TypeVar("Value")
BYTES = Unit("GB", lambda amount: f"{amount / 1e9:,.2f}", lambda rate: f"{rate / 1e9:,.2f} GB/s")
MAX_DIFFERENCES = 20


def verify(environment: Environment, flags: VerifyFlags) -> int:
    """Checks the file, and compares it with its source if given. Raises ModelFileError, ConvertError."""
    flags = _found(environment, flags)
    for path in (flags.file, flags.source):
        if path is not None and not path.exists():
            raise UsageError(f"{path}: no such file or folder.")
    threads = flags.threads or physical_cores()
    report = JsonReport(environment) if flags.jsonl else TextReport(environment)
    with closing(report):
        parts = read_parts(flags.file)
        sound = _check_file(parts, threads, report)
        if flags.source is None:
            report.sound(sound)
            return ExitStatus.ANSWERED
        with open_source(flags.source) as source:
            named = describe(source).tensors
            report.sound(sound)
            comparison = compare(parts, source.read, named, threads)
            problems = list(_judge_weights(flags, _watched(comparison, "comparing", report), report))
            problems += _judge_tokenizer(flags, parts[0], source, report)
        if problems:
            raise ModelFileError(" ".join(problems))
    return ExitStatus.ANSWERED


def _found(environment: Environment, flags: VerifyFlags) -> VerifyFlags:
    """The flags, with names of models and repositories replaced by their paths. Raises ModelNotFound."""
    file, source = flags.file, flags.source
    is_path = file.is_file() or file.suffix == ".gguf" or file.is_absolute()
    if not is_path:
        places = directories(environment.variables)
        resolved = resolve(DEFAULT_MODEL, None, profile_folders(places), environment.variables)
        file = model_file(str(file), resolved, places)
    return replace(flags, file=file, source=None if source is None else find_source(str(source)))


def _check_file(parts: Sequence[GgufHeader], threads: int, report: VerifyReport) -> SoundFile:
    header = header_of(parts)
    shape = check_completeness(header)
    for notice in notices(header):
        report.notice(f"{header.path}: {notice}")
    for part in parts:
        verify_placement(part)
        if surplus := surplus_bytes(part):
            report.notice(f"{part.path}: {surplus:,} bytes lie behind the last tensor.")
    _watched(verify_blocks(parts, threads), "verifying", report)
    tensors = [tensor for part in parts for tensor in part.tensors]
    return SoundFile(
        path=header.path,
        n_files=len(parts),
        n_tensors=len(tensors),
        n_bytes=sum(part.file_bytes for part in parts),
        n_tokens=shape.n_vocab,
        types=dict(Counter(tensor.kind.name for tensor in tensors).most_common()),
    )


def _judge_weights(flags: VerifyFlags, found: Sequence[TypeReport], report: VerifyReport) -> Iterator[str]:
    report.weights(found)
    for one in found:
        if not one.is_plausible:
            yield (
                f"{flags.file}: {one.worst} is off by {one.worst_deviation.relative_rms:.2%} of its source, "
                f"{one.kind.name} allows {one.limit:.2%}: it was not made from {flags.source} or is damaged. "
                "Convert it again."
            )


def _judge_tokenizer(
    flags: VerifyFlags, first: GgufHeader, source: Source, report: VerifyReport
) -> Iterator[str]:
    if isinstance(source, GgufSource):
        report.notice(
            f"{flags.source} is a GGUF: the tokenizer was not compared. Give the checkpoint's folder."
        )
        return
    tokenizer = source.document(TOKENIZER) or b""
    types = first.value("tokenizer.ggml.token_type")
    assert isinstance(types, list)
    model = drained(load_model(flags.file, LoadSettings(vocab_only=True), AbortFlag()))
    try:
        with closing(model):
            found = compare_tokenizers(model.vocabulary.encode_raw, tokenizer, [int(kind) for kind in types])
    except TokenizersMissing as missing:
        report.notice(str(missing))
        return
    report.tokenizer(found)
    if found.differences:
        yield f"{flags.file}: {_first_difference(found)} Convert it again from {flags.source}."


def _first_difference(found: TokenizerReport) -> str:
    first, total = found.differences[0], found.n_plain + found.n_special
    return (
        f"llama.cpp tokenizes {len(found.differences)} of {total:,} texts differently, first "
        f"{one_line(ascii(first.text), 60)} ({first.about}): {list(first.ids[:8])}, expected "
        f"{list(first.expected[:8])}."
    )


def _watched(work: Generator[BytesVerified, None, Value], doing: str, report: VerifyReport) -> Value:
    """Runs `work` and shows its progress. Returns its value."""
    with closing(work):
        while True:
            try:
                report.progress(doing, next(work))
            except StopIteration as finished:
                report.progress(doing, None)
                value: Value = finished.value
                return value


@dataclass(frozen=True, slots=True)
class SoundFile:
    """A file without damage, and what was checked. `types` counts tensors by type, most frequent first."""

    path: Path
    n_files: int
    n_tensors: int
    n_bytes: int
    n_tokens: int
    types: Mapping[str, int]


class VerifyReport(Protocol):
    """Takes results in order."""

    def progress(self, doing: str, progress: BytesVerified | None) -> None:
        """Shows how far the work called `doing` is; None when it is over."""

    def notice(self, text: str) -> None:
        """Shows a line about something that is not damage."""

    def sound(self, sound: SoundFile) -> None:
        """Shows that the file itself is sound."""

    def weights(self, reports: Sequence[TypeReport]) -> None:
        """Shows how far the weights are from their source."""

    def tokenizer(self, report: TokenizerReport) -> None:
        """Shows whether the tokenizers agree."""

    def close(self) -> None:
        """Erases what is drawn. Closing twice is harmless."""


class TextReport:
    """Results on stdout as text; progress and notices on stderr."""

    def __init__(self, environment: Environment) -> None:
        self._stdout = environment.stdout
        self._stderr = environment.stderr
        self._output = Output.of(environment.stderr, environment.variables)
        self._bar: ProgressBar | None = None

    def progress(self, doing: str, progress: BytesVerified | None) -> None:
        """Draws the bar, or erases it."""
        if progress is None:
            self.close()
            return
        if self._bar is None:
            self._bar = ProgressBar(self._output, doing, progress.bytes_total, time.monotonic, BYTES)
        self._bar.update(progress.bytes_done)

    def notice(self, text: str) -> None:
        """Writes the line."""
        write_line(self._stderr, one_line(text, 500) + "\n")

    def sound(self, sound: SoundFile) -> None:
        """Writes one line of what was checked."""
        types = ", ".join(f"{kind} {count}" for kind, count in sound.types.items())
        files = f" in {sound.n_files} files" if sound.n_files > 1 else ""
        text = (
            f"{sound.path}: sound. {sound.n_tensors} tensors ({types}), {sound.n_bytes:,} bytes{files}, "
            f"{sound.n_tokens:,} tokens; every block was read."
        )
        write_line(self._stdout, one_line(text, 2000) + "\n")

    def weights(self, reports: Sequence[TypeReport]) -> None:
        """Writes a table with a row for each type."""
        for line in table_lines(reports):
            write_line(self._stdout, line + "\n")

    def tokenizer(self, report: TokenizerReport) -> None:
        """Writes one line."""
        same = "the same tokens in llama.cpp and in the tokenizers library"
        if report.differences:
            same = f"{len(report.differences)} of them not {same}"
        text = f"tokenizer: {report.n_plain:,} texts and {report.n_special:,} with special tokens, {same}."
        write_line(self._stdout, text + "\n")

    def close(self) -> None:
        """Erases the bar."""
        if self._bar is not None:
            self._bar.finish()
            self._bar = None


class JsonReport:
    """Results as lines of JSON on stdout; the format is documented in docs/jsonl.md."""

    def __init__(self, environment: Environment) -> None:
        self._stdout = environment.stdout
        self._percent = -1

    def progress(self, doing: str, progress: BytesVerified | None) -> None:
        """Writes the progress, at most a hundred times."""
        if progress is None:
            self._percent = -1
            return
        percent = 100 * progress.bytes_done // max(1, progress.bytes_total)
        if percent > self._percent:
            self._percent = percent
            self._write(doing, dataclasses.asdict(progress))

    def notice(self, text: str) -> None:
        """Writes the notice."""
        self._write("notice", {"text": text})

    def sound(self, sound: SoundFile) -> None:
        """Writes what was checked."""
        self._write("sound", {**dataclasses.asdict(sound), "path": str(sound.path)})

    def weights(self, reports: Sequence[TypeReport]) -> None:
        """Writes a line for each type."""
        for report in reports:
            fields = {
                "type": report.kind.name,
                "n_tensors": report.n_tensors,
                "relative_rms": _finite(report.total.relative_rms),
                "max_abs": report.total.max_abs,
                "worst": report.worst,
                "worst_relative_rms": _finite(report.worst_deviation.relative_rms),
                "limit": report.limit,
                "is_plausible": report.is_plausible,
            }
            self._write("weights", fields)

    def tokenizer(self, report: TokenizerReport) -> None:
        """Writes the counts and the first differences."""
        differences = [dataclasses.asdict(difference) for difference in report.differences[:MAX_DIFFERENCES]]
        counts = {"n_plain": report.n_plain, "n_special": report.n_special}
        fields = {**counts, "n_differences": len(report.differences), "differences": differences}
        self._write("tokenizer", fields)

    def close(self) -> None:
        """Does nothing: nothing is drawn."""

    def _write(self, event: str, fields: Mapping[str, object]) -> None:
        write_line(self._stdout, object_line(event, fields))


def table_lines(reports: Sequence[TypeReport]) -> Iterator[str]:
    """The reports as aligned lines: type, tensors, relative RMS error and its limit, largest error, worst."""
    rows = [("TYPE", "TENSORS", "REL RMS", "LIMIT", "MAX ERROR", "WORST TENSOR")]
    for report in reports:
        worst = f"{one_line(report.worst, 63)} ({report.worst_deviation.relative_rms:.3%})"
        rows.append(
            (
                report.kind.name,
                f"{report.n_tensors:,}",
                f"{report.total.relative_rms:.3%}",
                f"{report.limit:.2%}",
                f"{report.total.max_abs:.3g}",
                worst if report.total.max_abs else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for kind, *figures, worst in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        yield "  ".join([kind.ljust(widths[0]), *cells, worst]).rstrip()


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
