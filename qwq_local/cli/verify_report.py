"""Where the results of `qwq verify` go: lines and a table for a person, lines of JSON for a program."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwq_convert.tokenizer_check import TokenizerReport
from qwq_convert.verification import BytesVerified, TypeReport

from qwq_local.cli.environment import Environment
from qwq_local.terminal.output import Output
from qwq_local.terminal.progress import ProgressBar, Unit
from qwq_local.terminal.sanitizer import one_line
from qwq_local.wire import object_line, write_line

BYTES = Unit("GB", lambda amount: f"{amount / 1e9:,.2f}", lambda rate: f"{rate / 1e9:,.2f} GB/s")
MAX_DIFFERENCES = 20


@dataclass(frozen=True, slots=True)
class Sound:
    """A file that is whole, with what was looked at: `types` are tensors by type, most first."""

    path: Path
    n_files: int
    n_tensors: int
    n_bytes: int
    n_tokens: int
    types: Mapping[str, int]


class Report(Protocol):
    """Takes results one after the other."""

    def progress(self, doing: str, progress: BytesVerified | None) -> None:
        """How far the work called `doing` is; None when it is over."""

    def notice(self, text: str) -> None:
        """A line about something that is no damage."""

    def sound(self, sound: Sound) -> None:
        """The file itself is sound."""

    def weights(self, reports: Sequence[TypeReport]) -> None:
        """How far the weights are from their source."""

    def tokenizer(self, report: TokenizerReport) -> None:
        """How the tokenizers agree."""

    def close(self) -> None:
        """Take away what is drawn; closing twice is harmless."""


class TextReport:
    """Results on stdout as text; progress and notices on stderr."""

    def __init__(self, environment: Environment) -> None:
        self._stdout = environment.stdout
        self._stderr = environment.stderr
        self._output = Output.of(environment.stderr, environment.variables)
        self._bar: ProgressBar | None = None

    def progress(self, doing: str, progress: BytesVerified | None) -> None:
        """Draw a bar, or take it away."""
        if progress is None:
            self.close()
            return
        if self._bar is None:
            self._bar = ProgressBar(self._output, doing, progress.bytes_total, time.monotonic, BYTES)
        self._bar.update(progress.bytes_done)

    def notice(self, text: str) -> None:
        """Write the line."""
        write_line(self._stderr, one_line(text, 500) + "\n")

    def sound(self, sound: Sound) -> None:
        """Write one line of what was checked."""
        types = ", ".join(f"{kind} {count}" for kind, count in sound.types.items())
        files = f" in {sound.n_files} files" if sound.n_files > 1 else ""
        text = (
            f"{sound.path}: sound. {sound.n_tensors} tensors ({types}), {sound.n_bytes:,} bytes{files}, "
            f"{sound.n_tokens:,} tokens; every block was read."
        )
        write_line(self._stdout, one_line(text, 2000) + "\n")

    def weights(self, reports: Sequence[TypeReport]) -> None:
        """Write a table with a row for each type."""
        for line in table_lines(reports):
            write_line(self._stdout, line + "\n")

    def tokenizer(self, report: TokenizerReport) -> None:
        """Write one line."""
        same = "the same tokens in llama.cpp and in the tokenizers library"
        if report.differences:
            same = f"{len(report.differences)} of them not {same}"
        text = f"tokenizer: {report.n_plain:,} texts and {report.n_special:,} with special tokens, {same}."
        write_line(self._stdout, text + "\n")

    def close(self) -> None:
        """Erase the bar."""
        if self._bar is not None:
            self._bar.finish()
            self._bar = None


class JsonReport:
    """Results as lines of JSON on stdout; the format is documented in docs/jsonl.md."""

    def __init__(self, environment: Environment) -> None:
        self._stdout = environment.stdout
        self._percent = -1

    def progress(self, doing: str, progress: BytesVerified | None) -> None:
        """Write how far it is, at most a hundred times."""
        if progress is None:
            self._percent = -1
            return
        percent = 100 * progress.bytes_done // max(1, progress.bytes_total)
        if percent > self._percent:
            self._percent = percent
            self._write(doing, dataclasses.asdict(progress))

    def notice(self, text: str) -> None:
        """Write the notice."""
        self._write("notice", {"text": text})

    def sound(self, sound: Sound) -> None:
        """Write what was checked."""
        self._write("sound", {**dataclasses.asdict(sound), "path": str(sound.path)})

    def weights(self, reports: Sequence[TypeReport]) -> None:
        """Write a line for each type."""
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
        """Write the counts and the first differences."""
        differences = [dataclasses.asdict(difference) for difference in report.differences[:MAX_DIFFERENCES]]
        counts = {"n_plain": report.n_plain, "n_special": report.n_special}
        fields = {**counts, "n_differences": len(report.differences), "differences": differences}
        self._write("tokenizer", fields)

    def close(self) -> None:
        """Nothing is drawn."""

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
