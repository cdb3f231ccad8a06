"""`qwq verify`: checks a GGUF, and compares it with the weights it was made from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

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
from qwq_local.cli.local import default_profile
from qwq_local.cli.screen import WorkScreen, drained
from qwq_local.engine.model import LoadSettings, load_model
from qwq_local.errors import AbortFlag, ExitStatus, ModelFileError, UsageError
from qwq_local.machine.hardware import physical_cores
from qwq_local.models.architecture import check_completeness, notices
from qwq_local.models.header import header_of
from qwq_local.paths import directories
from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import aligned_lines, one_line
from qwq_local.wire import json_line, plain, write_line

Value = TypeVar("Value")
MAX_DIFFERENCES = 20


def verify(environment: Environment, flags: VerifyFlags) -> int:
    """Checks the file, and compares it with its source if given. Raises ModelFileError, ConvertError."""
    flags = _found(environment, flags)
    for path in (flags.file, flags.source):
        if path is not None and not path.exists():
            raise UsageError(f"{path}: no such file or folder.")
    threads = flags.threads or physical_cores()
    report = VerifyReport(environment, jsonl=flags.jsonl)
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
            problems = list(_judge_weights(flags, report.watched(comparison, "comparing"), report))
            problems += _judge_tokenizer(flags, parts[0], source, report)
        if problems:
            raise ModelFileError(" ".join(problems))
    return ExitStatus.ANSWERED


def _found(environment: Environment, flags: VerifyFlags) -> VerifyFlags:
    """The flags, with names of models and repositories replaced by their paths. Raises ModelNotFound."""
    file, source = flags.file, flags.source
    is_path = file.is_file() or file.suffix == ".gguf" or file.is_absolute()
    if not is_path:
        variables = environment.variables
        file = model_file(str(file), default_profile(variables), directories(variables))
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
    report.watched(verify_blocks(parts, threads), "verifying")
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
    model = drained(load_model(flags.file, LoadSettings(vocab_only=True), AbortFlag()), lambda _: None)
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


@dataclass(frozen=True, slots=True)
class SoundFile:
    """A file without damage, and what was checked. `types` counts tensors by type, most frequent first."""

    path: Path
    n_files: int
    n_tensors: int
    n_bytes: int
    n_tokens: int
    types: Mapping[str, int]


class VerifyReport(WorkScreen):
    """Takes results: as text on stdout, progress and notices on stderr; or as lines of JSON on stdout.

    docs/jsonl.md describes the lines.
    """

    def __init__(self, environment: Environment, *, jsonl: bool) -> None:
        super().__init__(Output.of(environment.stderr, environment.variables))
        self._environment = environment
        self._jsonl = jsonl

    def watched(self, work: Generator[BytesVerified, None, Value], doing: str) -> Value:
        """Runs `work` and shows its progress, in JSON at most a hundred times. Returns its value."""
        shown = -1

        def show(progress: BytesVerified) -> None:
            nonlocal shown
            percent = 100 * progress.bytes_done // max(1, progress.bytes_total)
            if self._jsonl and percent > shown:
                self._write(doing, progress)
            elif not self._jsonl:
                if shown < 0:
                    self.start(progress.bytes_total)
                self.update(doing, progress.bytes_done)
            shown = max(shown, percent)

        with closing(work):
            value = drained(work, show)
        self.close()
        return value

    def notice(self, text: str) -> None:
        """Shows a line about something that is not damage."""
        if self._jsonl:
            self._write("notice", {"text": text})
        else:
            self.say(text)

    def sound(self, sound: SoundFile) -> None:
        """Shows that the file itself is sound."""
        types = ", ".join(f"{kind} {count}" for kind, count in sound.types.items())
        files = f" in {sound.n_files} files" if sound.n_files > 1 else ""
        text = (
            f"{sound.path}: sound. {sound.n_tensors} tensors ({types}), {sound.n_bytes:,} bytes{files}, "
            f"{sound.n_tokens:,} tokens; every block was read."
        )
        self._result("sound", sound, text)

    def weights(self, reports: Sequence[TypeReport]) -> None:
        """Shows how far the weights are from their source, each type on a line."""
        if not self._jsonl:
            self._environment.print(*_table_lines(reports))
            return
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
        """Shows whether the tokenizers agree; in JSON with the first differences."""
        same = "the same tokens in llama.cpp and in the tokenizers library"
        if report.differences:
            same = f"{len(report.differences)} of them not {same}"
        text = f"tokenizer: {report.n_plain:,} texts and {report.n_special:,} with special tokens, {same}."
        fields = {
            "n_plain": report.n_plain,
            "n_special": report.n_special,
            "n_differences": len(report.differences),
            "differences": report.differences[:MAX_DIFFERENCES],
        }
        self._result("tokenizer", fields, text)

    def _result(self, event: str, fields: object, text: str) -> None:
        if self._jsonl:
            self._write(event, fields)
        else:
            self._environment.print(one_line(text, 2000))

    def _write(self, event: str, fields: object) -> None:
        shown = plain(fields)
        assert isinstance(shown, dict)
        write_line(self._environment.stdout, json_line({"event": event, **shown}))


def _table_lines(reports: Sequence[TypeReport]) -> Iterator[str]:
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
    return aligned_lines(rows, right=(1, 2, 3, 4))


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
