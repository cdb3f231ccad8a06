"""Our one pass against the classic two steps, on QwQ-32B's own shapes.

    python bench/convert.py [--layers 1] [--runs 3] [--types Q8_0 Q4_K_M Q6_K]

The checkpoint has `--layers` layers and the whole vocabulary: 4.1 GB of bfloat16 with one layer, 5.1 GB
with two, in several shards. The classic way is our BF16 conversion, then llama_model_quantize on as many
threads. Each run is a process of its own; its output is removed before the next one.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path

from compare import machine
from make_model import WORK, Shape, tensor_shapes, write_checkpoint
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest

THREADS = os.cpu_count() or 1
N_SHARDS = 4
# QwQ-32B, except for the number of layers.
SHAPE = partial(Shape, hidden=5120, intermediate=27648, kv_heads=8, head_dim=128)
WATCH_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall and processor seconds; the peaks of anonymous memory and of disk use, in bytes."""

    wall_s: float
    cpu_s: float
    anonymous_bytes: int
    disk_bytes: int

    @property
    def busy(self) -> float:
        """The share of the threads' time that was processor time."""
        return self.cpu_s / (self.wall_s * THREADS)


class Watch(threading.Thread):
    """Records the peaks of this process's anonymous memory and of a folder's disk use."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self._ended = threading.Event()
        self.anonymous_bytes = self.disk_bytes = 0

    def run(self) -> None:
        while not self._ended.wait(WATCH_EVERY_S):
            self.look()

    def look(self) -> None:
        """Record the use at this moment."""
        status = Path("/proc/self/status").read_text()
        kilobytes = int(status.split("RssAnon:")[1].split()[0])
        self.anonymous_bytes = max(self.anonymous_bytes, kilobytes * 1024)
        # One listing, so that a file that is renamed meanwhile is not counted twice.
        with suppress(FileNotFoundError):
            taken = sum(path.stat().st_blocks * 512 for path in self._folder.iterdir())
            self.disk_bytes = max(self.disk_bytes, taken)

    def stop(self) -> None:
        """Record the use a last time."""
        self._ended.set()
        self.join()
        self.look()


def run_one(step: str, source: Path, file_type: str, out: Path) -> Cost:
    """Run one step in this process and print its cost: `ours`, or `quantize` of a GGUF."""
    watch = Watch(out.parent)
    before = {path: path.stat().st_blocks * 512 for path in out.parent.iterdir()}
    watch.start()
    start, cpu = time.perf_counter(), time.process_time()
    if step == "ours":
        run_conversion(ConvertRequest(source, file_type, out, threads=THREADS))
    else:
        quantize(source, file_type, out)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    watch.stop()
    return Cost(wall_s, cpu_s, watch.anonymous_bytes, watch.disk_bytes - sum(before.values()))


def quantize(source: Path, file_type: str, out: Path) -> None:
    """llama.cpp's own quantizer; the file is synced to the disk, as ours is."""
    import llama_cpp
    from qwq_convert.file_types import FILE_TYPES

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[file_type].number
    parameters.nthread = THREADS
    if llama_cpp.llama_model_quantize(bytes(source), bytes(out), parameters) != 0:
        raise SystemExit(f"llama_model_quantize failed on {source}")
    with out.open("rb") as file:
        os.fsync(file.fileno())


def measured(step: str, source: Path, file_type: str, out: Path) -> Cost:
    """The cost of one step, run in its own process."""
    command = [sys.executable, __file__, "--one", step, str(source), file_type, str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return Cost(**json.loads(result.stdout))


def compare(source: Path, file_type: str, runs: int, folder: Path) -> list[float]:
    """Run both ways in alternating order and print their costs; returns our wall times."""
    ours, classic, steps = [], [], []
    out, between = folder / "out.gguf", folder / "bf16.gguf"
    for number in range(runs):
        for way in ("ours", "classic") if number % 2 == 0 else ("classic", "ours"):
            if way == "ours":
                ours.append(measured("ours", source, file_type, out))
            else:
                first = measured("ours", source, "BF16", between)
                second = measured("quantize", between, file_type, out)
                classic.append((first, second))
            kept = out.stat().st_size
            out.unlink()
            between.unlink(missing_ok=True)
    steps = [mine.wall_s / theirs[1].wall_s for mine, theirs in zip(ours, classic, strict=True)]
    whole = [
        mine.wall_s / sum(step.wall_s for step in theirs) for mine, theirs in zip(ours, classic, strict=True)
    ]
    print(f"{file_type}: ours {spread([cost.wall_s for cost in ours], 's')}")
    print(f"  / llama_model_quantize alone: {spread(steps)}; / the classic way: {spread(whole)}")
    print(f"  threads busy: {spread([100 * cost.busy for cost in ours], '%')}")
    memory = max(cost.anonymous_bytes for cost in ours) / 2**20
    disk = max(cost.disk_bytes for cost in ours) / kept
    print(f"  most anonymous memory {memory:.0f} MiB, most disk {disk:.4f} of the output", flush=True)
    return [cost.wall_s for cost in ours]


def growth(layers: int, times: list[float], file_type: str, folder: Path) -> str:
    """Time per weight with two numbers of layers."""
    other = 2 if layers == 1 else 1
    out = folder / "more.gguf"
    more = []
    for _ in times:
        more.append(measured("ours", checkpoint(other), file_type, out).wall_s)
        out.unlink()
    per = [
        1e9 * statistics.median(times) / n_parameters(layers),
        1e9 * statistics.median(more) / n_parameters(other),
    ]
    return (
        f"{file_type}: {per[0]:.2f} s for a billion weights with {layers} layer(s), "
        f"{per[1]:.2f} s with {other}, ratio {per[1] / per[0]:.3f}"
    )


def spread(values: list[float], unit: str = "") -> str:
    """Median and range."""
    middle, low, high = statistics.median(values), min(values), max(values)
    digits = 3 if not unit else 1
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}){' ' + unit if unit else ''}"


def checkpoint(layers: int) -> Path:
    """The synthetic checkpoint with this number of layers; written if it does not exist."""
    folder = WORK / f"qwq-32b-{layers}-layers"
    if not folder.is_dir():
        beside = folder.with_suffix(".new")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write_checkpoint(beside, SHAPE(layers), N_SHARDS)
        beside.rename(folder)
    return folder


def n_parameters(layers: int) -> int:
    """The number of weights in the synthetic checkpoint."""
    return sum(prod(dims) for dims in tensor_shapes(SHAPE(layers)).values())


def main() -> None:
    """Compare for each type, then measure how time grows with the layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q6_K", "Q4_K_M"])
    parser.add_argument("--growth", default="Q4_K_M", help="the type whose time is taken with 1 and 2 layers")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        step, source, file_type, out = options.one
        print(json.dumps(asdict(run_one(step, Path(source), file_type, Path(out)))))
        return
    print(machine())
    folder = WORK / "convert"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = checkpoint(options.layers)
    print(f"{options.layers} layer(s), {n_parameters(options.layers):,} weights, {THREADS} threads")
    times = {name: compare(source, name, options.runs, folder) for name in options.types}
    if options.growth in times:
        print(growth(options.layers, times[options.growth], options.growth, folder))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
