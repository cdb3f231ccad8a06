"""Several replies at once: tokens per second against llama-batched-bench, and the gap while a prompt is read.

    python bench/batch.py [--part rates|gap] [--pairs 3]

The peer is built from the library's own source, once, under bench/.work. Both decode 64 tokens after a shared
prompt of 128 on the standard model, with the same cells, batch and threads; ours also samples and runs whole
replies. Then one reply runs while a prompt of 8,000 tokens is read.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from compare import machine, pair_ratios, summary
from decode import SAMPLER, THREADS, load
from make_model import WORK, bench_model

from qwq_local.dialogue.control import Opening
from qwq_local.dialogue.reply import Reply, ReplySettings
from qwq_local.engine.api import ContextSettings
from qwq_local.engine.context import LlamaContext, Rows
from qwq_local.engine.library import TESTED_VERSION
from qwq_local.engine.model import LoadedModel
from qwq_local.engine.scheduler import PREFILL_GAP_S, GenerationJob, Scheduler, Submission
from qwq_local.errors import AbortFlag
from qwq_local.events import Event

N_PROMPT, N_DECODE = 128, 64
REPLIES = (1, 2, 4, 8)
N_CTX = 4096
N_LONG = 8000
CMAKE = ("-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF")
# As the Makefile builds the library: GCC 12.2 miscompiles AMX.
FLAGS = ("-DCMAKE_C_FLAGS=-mno-amx-int8", "-DCMAKE_CXX_FLAGS=-mno-amx-int8")


def batched_bench() -> Path:
    """llama-batched-bench of the tested version, built if it is not there."""
    build = WORK / f"llama.cpp-{TESTED_VERSION}"
    program = build / "bin" / "llama-batched-bench"
    if program.is_file():
        return program
    source = WORK / "source"
    if not list(source.glob("*.tar.gz")):
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        package = ["--no-binary", "llama-cpp-python", f"llama-cpp-python=={TESTED_VERSION}"]
        subprocess.run([*download, "--dest", source, *package], check=True)
    with tarfile.open(next(source.glob("*.tar.gz"))) as archive:
        archive.extractall(source, filter="data")
    vendor = next(source.glob("*/vendor/llama.cpp"))
    subprocess.run(["cmake", "-S", vendor, "-B", build, *CMAKE, *FLAGS], check=True, stdout=sys.stderr)
    target = ["--target", "llama-batched-bench", "--parallel", str(os.cpu_count() or 1)]
    subprocess.run(["cmake", "--build", build, *target], check=True, stdout=sys.stderr)
    return program


def peer_rate(program: Path, model: Path, n_replies: int) -> float:
    """Tokens per second of all sequences together, by the peer's own clock."""
    options = f"-c {N_CTX} -b 512 -ub 512 -t {THREADS} -tb {THREADS} -npp {N_PROMPT} -ntg {N_DECODE}"
    arguments = ["-m", str(model), *options.split(), "-npl", str(n_replies), "-pps", "-kvu", "-fa", "off"]
    output = subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
    columns = re.findall(r"^\|(.*)\|$", output, re.MULTILINE)
    names, values = columns[0].split("|"), columns[-1].split("|")
    return float(values[[name.strip() for name in names].index("S_TG t/s")])


class RowCountingContext(LlamaContext):
    """A context that records when each decode ended and how many rows and tokens it had."""

    def start(self) -> None:
        """Forget the records."""
        self.decodes: list[tuple[float, int, int]] = []

    def decode(self, rows: Sequence[Rows], abort: AbortFlag | None = None) -> list[int]:
        """Decode and record the time."""
        last_rows = super().decode(rows, abort)
        self.synchronize()
        self.decodes.append((time.perf_counter(), len(rows), sum(len(each.tokens) for each in rows)))
        return last_rows


def submit(
    scheduler: Scheduler, model: LoadedModel, prompt: tuple[int, ...], n_tokens: int, window: int
) -> Submission[Event]:
    """A reply that thinks for `n_tokens` and ends."""
    settings = ReplySettings(
        window, SAMPLER, thinking_budget=n_tokens, answer_reserve=32, max_tokens=1, loop_guard=False
    )
    job = GenerationJob(prompt, window, SAMPLER)
    return scheduler.submit(Reply(model.vocabulary, settings, Opening(prompt)), job)


def our_rate(context: RowCountingContext, model: LoadedModel, n_replies: int) -> float:
    """Tokens per second of all replies together, over the steps in which all of them decode one token."""
    prompt = tuple(token % 5000 + 100 for token in range(N_PROMPT))
    for sequence in context.sequences:
        sequence.truncate(0)
    context.start()
    with closing(Scheduler(context)) as scheduler:
        replies = [submit(scheduler, model, prompt, N_DECODE + 16, 400) for _ in range(n_replies)]
        for reply in replies:
            for _ in reply:
                pass
    times = [ended for ended, n_rows, n_tokens in context.decodes if n_rows == n_tokens == n_replies]
    times = times[:N_DECODE]
    if len(times) < N_DECODE // 2:
        raise SystemExit(f"only {len(times)} steps had {n_replies} replies; try another seed")
    return n_replies * (len(times) - 1) / (times[-1] - times[0])


def compare_rates(pairs: int) -> None:
    """Print the ratio at each number of replies."""
    program, path = batched_bench(), bench_model()
    print(f"{machine()}; {path.name}, {THREADS} threads, {N_DECODE} tokens each", flush=True)
    model = load(path)
    for n_replies in REPLIES:
        compare_at(model, program, path, n_replies, pairs)
    model.close()


def compare_at(model: LoadedModel, program: Path, path: Path, n_replies: int, pairs: int) -> None:
    """Print the ratio at one number of replies."""
    settings = ContextSettings(N_CTX, flash_attention=False, threads=THREADS, n_slots=n_replies)
    rates: list[float] = []
    with closing(RowCountingContext(model, settings)) as context:
        our_rate(context, model, n_replies)  # warm up

        def ours() -> float:
            rates.append(our_rate(context, model, n_replies))
            return rates[-1]

        ratios = pair_ratios(ours, lambda: peer_rate(program, path, n_replies), pairs)
    print(summary(f"{n_replies} at once, ours / llama-batched-bench", ratios, "at least 0.95"))
    print(f"  ours: {statistics.median(rates):.1f} tokens/s together", flush=True)


def measure_gap() -> None:
    """Print the largest gap of a running reply while a long prompt is read, and both reading speeds."""
    path = bench_model()
    print(f"{machine()}; {path.name}, {THREADS} threads, a prompt of {N_LONG:,} tokens", flush=True)
    model = load(path)
    window = N_LONG + 512
    settings = ContextSettings(window + 4096, flash_attention=False, threads=THREADS, n_slots=2)
    book = tuple(token % 5000 + 100 for token in range(N_LONG))
    with closing(model), closing(RowCountingContext(model, settings)) as context:
        context.start()
        with closing(Scheduler(context)) as scheduler:
            began = time.perf_counter()
            list(submit(scheduler, model, book, 1, window))
            alone = N_LONG / (time.perf_counter() - began)
        context.sequences[0].truncate(0)
        with closing(Scheduler(context)) as scheduler:
            running = submit(scheduler, model, (5, 6, 7), 3000, 4000)
            while len(running.generation.generated) < 8:
                next(running)
            reading = submit(scheduler, model, book, 1, window)
            context.start()
            began = time.perf_counter()
            times = [began]
            n_before = len(running.generation.generated)
            while not reading.generation.generated and not running.is_done:
                next(running)
                if len(running.generation.generated) > n_before:
                    n_before = len(running.generation.generated)
                    times.append(time.perf_counter())
            beside = N_LONG / (time.perf_counter() - began)
            reading.close()
            running.close()
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    print(
        f"largest gap {max(gaps):.3f} s, median {statistics.median(gaps):.3f} s of {len(gaps)} "
        f"(at most {2 * PREFILL_GAP_S} s)\n"
        f"reading {beside:.1f} tokens/s beside the reply, {alone:.1f} alone, ratio {beside / alone:.3f}",
        flush=True,
    )


def main() -> None:
    """Run the chosen parts and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=("rates", "gap"), action="append")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    parts = arguments.part or ["rates", "gap"]
    if "rates" in parts:
        compare_rates(arguments.pairs)
    if "gap" in parts:
        measure_gap()


if __name__ == "__main__":
    main()
