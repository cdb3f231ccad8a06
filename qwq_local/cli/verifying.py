"""How `qwq verify` works: a file and its source in, results to the screen or as lines of JSON, status out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
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

from qwq_local.cli.backends import model_file
from qwq_local.cli.converting import find_source
from qwq_local.cli.environment import Environment, process_environment
from qwq_local.cli.pipes import closed_pipes_end_it, forgiving
from qwq_local.cli.verify_report import JsonReport, Report, Sound, TextReport
from qwq_local.engine.api import AbortFlag
from qwq_local.engine.library import divert_stderr
from qwq_local.engine.model import LoadSettings, drained, load_model
from qwq_local.errors import ExitStatus, ModelFileError, UsageError
from qwq_local.machine.here import physical_cores
from qwq_local.models.completeness import check_completeness, notices
from qwq_local.models.header import header_of
from qwq_local.paths import directories
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import profile_folders, resolve
from qwq_local.terminal.sanitizer import one_line

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Asked:
    """The arguments and flags of `qwq verify`."""

    file: Path
    source: Path | None = None
    threads: int | None = None
    jsonl: bool = False


def verify(asked: Asked) -> int:
    """Check what was asked, in the real surroundings; the exit status."""
    # libggml prints every damaged block to the error stream; what it says comes out in one line of ours.
    sys.stderr = forgiving(divert_stderr())
    with closed_pipes_end_it():
        return verify_in(process_environment(), asked)


def verify_in(environment: Environment, asked: Asked) -> int:
    """Check the file, and against its source when one is given; 0, or ModelFileError or ConvertError."""
    asked = _found(environment, asked)
    for path in (asked.file, asked.source):
        if path is not None and not path.exists():
            raise UsageError(f"{path}: no such file or folder.")
    threads = asked.threads or physical_cores()
    report = JsonReport(environment) if asked.jsonl else TextReport(environment)
    with closing(report):
        parts = read_parts(asked.file)
        sound = _check_file(parts, threads, report)
        if asked.source is None:
            report.sound(sound)
            return ExitStatus.ANSWERED
        with open_source(asked.source) as source:
            named = describe(source).tensors
            report.sound(sound)
            comparison = compare(parts, source.read, named, threads)
            problems = list(_judge_weights(asked, _watched(comparison, "comparing", report), report))
            problems += _judge_tokenizer(asked, parts[0], source, report)
        if problems:
            raise ModelFileError(" ".join(problems))
    return ExitStatus.ANSWERED


def _found(environment: Environment, asked: Asked) -> Asked:
    """The same with the file of a model's name and the folder of a repository. Raises ModelNotFound."""
    file, source = asked.file, asked.source
    is_path = file.is_file() or file.suffix == ".gguf" or file.is_absolute()
    if not is_path:
        places = directories(environment.variables)
        resolved = resolve(DEFAULT_MODEL, None, profile_folders(places), environment.variables)
        file = model_file(str(file), resolved, places)
    return replace(asked, file=file, source=None if source is None else find_source(str(source)))


def _check_file(parts: Sequence[GgufHeader], threads: int, report: Report) -> Sound:
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
    return Sound(
        path=header.path,
        n_files=len(parts),
        n_tensors=len(tensors),
        n_bytes=sum(part.file_bytes for part in parts),
        n_tokens=shape.n_vocab,
        types=dict(Counter(tensor.kind.name for tensor in tensors).most_common()),
    )


def _judge_weights(asked: Asked, found: Sequence[TypeReport], report: Report) -> Iterator[str]:
    report.weights(found)
    for one in found:
        if not one.is_plausible:
            yield (
                f"{asked.file}: {one.worst} is off by {one.worst_deviation.relative_rms:.2%} of its source, "
                f"{one.kind.name} allows {one.limit:.2%}: it was not made from {asked.source} or is damaged. "
                "Convert it again."
            )


def _judge_tokenizer(asked: Asked, first: GgufHeader, source: Source, report: Report) -> Iterator[str]:
    if isinstance(source, GgufSource):
        report.notice(
            f"{asked.source} is a GGUF: the tokenizer was not compared. Give the checkpoint's folder."
        )
        return
    tokenizer = source.document(TOKENIZER) or b""
    types = first.value("tokenizer.ggml.token_type")
    assert isinstance(types, list)
    model = drained(load_model(asked.file, LoadSettings(vocab_only=True), AbortFlag()))
    try:
        with closing(model):
            found = compare_tokenizers(model.vocabulary.encode_raw, tokenizer, [int(kind) for kind in types])
    except TokenizersMissing as missing:
        report.notice(str(missing))
        return
    report.tokenizer(found)
    if found.differences:
        yield f"{asked.file}: {_first_difference(found)} Convert it again from {asked.source}."


def _first_difference(found: TokenizerReport) -> str:
    first, total = found.differences[0], found.n_plain + found.n_special
    return (
        f"llama.cpp tokenizes {len(found.differences)} of {total:,} texts differently, first "
        f"{one_line(ascii(first.text), 60)} ({first.about}): {list(first.ids[:8])}, expected "
        f"{list(first.expected[:8])}."
    )


def _watched(work: Generator[BytesVerified, None, Value], doing: str, report: Report) -> Value:
    """The value of `work`, its progress shown while it goes on."""
    with closing(work):
        while True:
            try:
                report.progress(doing, next(work))
            except StopIteration as finished:
                report.progress(doing, None)
                value: Value = finished.value
                return value
