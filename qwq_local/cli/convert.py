"""`qwq convert`: Hugging Face weights, or a float GGUF, to a GGUF of any type in one pass."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from qwq_convert.checkpoint import label_of
from qwq_convert.file_types import QuantType, find_file_type, find_tensor_type
from qwq_convert.ggml import QUANTIZABLE
from qwq_convert.key_values import Yarn, parse_override
from qwq_convert.pipeline import (
    ConversionDone,
    ConversionPlanned,
    ConversionRestarted,
    ConversionResumed,
    ConvertEvent,
    RowsWritten,
    TensorDone,
)
from qwq_convert.pipeline import convert as run
from qwq_convert.plan import (
    ConversionPlan,
    ConvertRequest,
    describe,
    open_source,
    plan_conversion,
    sizes,
)
from qwq_convert.quant_types import TypeOptions
from qwq_convert.quantizer import available_threads, estimate_seconds

from qwq_local.cli.environment import Environment, refuse_stdout
from qwq_local.cli.flags import ConvertFlags
from qwq_local.cli.local import default_profile, measured_fit
from qwq_local.cli.screen import WorkScreen
from qwq_local.errors import ConvertError, ExitStatus, UsageError
from qwq_local.hub.cache import find_snapshot, is_repository
from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import aligned_lines, one_line
from qwq_local.text import binary_size, plural, time_left
from qwq_local.wire import event_line, write_line

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_SIZE = re.compile(r"(\d{1,12})([KMG]?)B?", re.IGNORECASE)
_FLOAT_SUFFIX = re.compile(r"[-._](f32|f16|bf16)$", re.IGNORECASE)


def convert(environment: Environment, flags: ConvertFlags) -> int:
    """Lists the types, plans or converts, as the flags say. Raises QwqError."""
    source = find_source(flags.source)
    if flags.types:
        environment.print(*_type_lines(environment, source))
        return ExitStatus.ANSWERED
    request = _request_of(flags, source)
    if flags.dry_run:
        with open_source(source) as opened:
            environment.print(*_plan_lines(plan_conversion(opened, request), request))
        return ExitStatus.ANSWERED
    return _run(request, environment, jsonl=flags.jsonl)


def find_source(name: str) -> Path:
    """The folder or file that SOURCE names: a path, or a repository that was downloaded."""
    path = Path(name).expanduser()
    return find_snapshot(name) if not path.exists() and is_repository(name) else path


def _request_of(flags: ConvertFlags, source: Path) -> ConvertRequest:
    """The flags as a request. Raises UsageError or ConvertError for a value that cannot be read."""
    if not flags.file_type:
        raise UsageError("which type? Try Q4_K_M, or list them with --types.")
    refuse_stdout(flags.out)
    try:
        file_type = find_file_type(flags.file_type)
        overrides = tuple(parse_override(text) for text in flags.overrides or ())
    except ConvertError as error:
        raise UsageError(str(error)) from None
    output, embedding = flags.output_type, flags.embedding_type
    return ConvertRequest(
        source=source,
        file_type=file_type.name,
        out=flags.out or Path(f"{_default_stem(source)}-{file_type.name}.gguf"),
        threads=flags.threads,
        types=TypeOptions(
            patterns=tuple(_pattern(text) for text in flags.tensor_types or ()),
            output=None if output is None else _tensor_type("--output-tensor-type", output),
            embedding=None if embedding is None else _tensor_type("--token-embedding-type", embedding),
            pure=flags.pure,
            keep_output=flags.leave_output,
        ),
        overrides=overrides,
        yarn=None if flags.yarn is None else Yarn(flags.yarn),
        imatrix=flags.imatrix,
        split_max_bytes=None if flags.split is None else _parse_size(flags.split),
        allow_nonfinite=flags.allow_nonfinite,
    )


def _default_stem(source: Path) -> str:
    """What a file made from `source` is called before its type: the repository's or the folder's name."""
    if source.is_file():
        return _FLOAT_SUFFIX.sub("", re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", source.name)) or "model"
    return (label_of(source) or "model").rpartition("/")[2]


def _parse_size(text: str) -> int:
    """Bytes of a text such as 4G, 500M or 2000000000; decimal units, as gguf-split reads them."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise UsageError(f"--split-max-size {text[:40]!r}: expected a size such as 4G or 500M.")
    return int(match[1]) * UNITS[match[2].upper()]


def _plan_lines(plan: ConversionPlan, request: ConvertRequest) -> Iterator[str]:
    """What a conversion will do: each tensor's type and size, then the files, the space and the time."""
    yield from aligned_lines(
        [
            (
                one_line(tensor.name, 60),
                " x ".join(map(str, tensor.shape)),
                f"{tensor.source.dtype} -> {tensor.kind.name}",
                binary_size(tensor.n_bytes, 2),
            )
            for tensor in plan.tensors
        ],
        right=(1, 3),
    )
    kinds = Counter(tensor.kind.name for tensor in plan.tensors).most_common()
    tensors = plural(len(plan.tensors), "tensor")
    yield f"{tensors}: {', '.join(f'{count:,} {kind}' for kind, count in kinds)}."
    names = one_line(_and_more([file.path for file in plan.files]), 1000)
    yield f"{names}: {plan.n_bytes:,} bytes ({binary_size(plan.n_bytes, 2)}), nothing else is written."
    threads = min(request.threads or available_threads(), available_threads())
    left = time_left(estimate_seconds(plan, threads))
    yield f"About {left} of quantizing on {threads} cores here; a slow disk adds to it."


def _type_lines(environment: Environment, source: Path) -> Iterator[str]:
    """Every file type with its size for the source, then what the column FITS means. Raises ConvertError."""
    with open_source(source) as opened:
        model = describe(opened)
    fit = measured_fit(default_profile(environment.variables).profile)
    rows = [("TYPE", "BITS", "SIZE", "FITS", "IMATRIX")]
    for row in sizes(model):
        if row.n_bytes is None:
            rows.append((row.name, "-", "-", "-", "not for this model's shapes"))
            continue
        context = fit.context(row.n_bytes, model.shape)
        fits = f"{context:,}" if context else "no"
        needed = "needed" if row.needs_imatrix else ""
        rows.append((row.name, f"{row.bits_per_weight:.2f}", binary_size(row.n_bytes, 2), fits, needed))
    yield from aligned_lines(rows, right=(1, 2, 3))
    place = f"{fit.place} with {binary_size(fit.free_bytes, 2)} free"
    yield f"FITS: tokens of context beside the weights in {place}, {fit.kv_type} KV cache."


def _and_more(names: Sequence[object]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else str(names[0])


class ConvertScreen(WorkScreen):
    """Shows the events of a conversion on stderr."""

    _total = 0
    _done = 0

    def show(self, event: ConvertEvent) -> None:
        """Shows one event."""
        match event:
            case ConversionPlanned(_, total, unweighted):
                self._total = total
                if unweighted:
                    self.say(f"the importance matrix lacks {_and_more(unweighted)}: quantized without.")
            case ConversionRestarted(path):
                self.say(f"{path} was of another conversion or an older source: starting over.")
            case ConversionResumed(count, done):
                self._done = done
                self.say(f"going on: {count:,} tensors ({binary_size(done, 2)}) are there already.")
            case RowsWritten(name, done, _):
                if self._line is None:
                    self.start(self._total, self._done)
                self.update(name, done)
            case TensorDone(name, _, _, _, _, n_nonfinite) if n_nonfinite:
                self.say(f"{name}: weights that are no numbers: {n_nonfinite:,}.")
            case ConversionDone(paths, n_bytes):
                self.say(f"{_and_more(paths)}: {binary_size(n_bytes, 2)}, whole and checked.")


def _run(request: ConvertRequest, environment: Environment, *, jsonl: bool) -> int:
    screen = ConvertScreen(Output.of(environment.stderr, environment.variables))
    n_kept = n_all = 0
    try:
        with closing(run(request)) as events:
            for event in events:
                match event:
                    case ConversionPlanned():
                        n_all = event.count
                    case ConversionResumed(n_kept, _) | TensorDone(_, n_kept):
                        pass
                if not jsonl:
                    screen.show(event)
                elif not isinstance(event, RowsWritten):
                    write_line(environment.stdout, event_line(event))
    except BaseException:
        screen.close()
        if n_kept:
            screen.say(f"{n_kept:,} of {n_all:,} tensors are kept: the same command goes on from there.")
        raise
    return ExitStatus.ANSWERED


def _pattern(text: str) -> tuple[re.Pattern[str], QuantType]:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--tensor-type {text[:60]!r}: expected REGEX=TYPE, such as ffn_down=Q6_K.")
    kind = _tensor_type("--tensor-type", name)
    try:
        # In lower case, as llama-quantize does: tensor names are.
        compiled = re.compile(pattern.lower())
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"--tensor-type {pattern[:60]!r}: no regular expression ({error}).") from None
    return compiled, kind


def _tensor_type(flag: str, name: str) -> QuantType:
    kind = find_tensor_type(name)
    if kind not in QUANTIZABLE:
        known = ", ".join(kind.name for kind in QUANTIZABLE)
        raise UsageError(f"{flag} {name[:40]!r}: unknown type of a tensor. Choose from {known}.")
    return kind
