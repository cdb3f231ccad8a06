"""Long contexts: prefill and decode rate 1k to 32k tokens deep, ours against a bare loop of the library.

    python bench/long.py [--depths 1024 4096 16384 32768] [--pairs 5] [--model standard]

It first times planning and loading the model. Everything runs in this process: the same context, batch
and threads for both, in alternating pairs. The context is filled to the depth once. Each contestant then
reads 512 more tokens and, separately, samples some; the tokens it added are removed afterwards.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from compare import machine, pair_ratios, summary
from decode import THREADS, TimedContext, bare_rate, load, read, reply_rate
from make_model import bench_model

from qwq_local.backend.planner import Planner
from qwq_local.engine.api import ContextSettings
from qwq_local.engine.library import library
from qwq_local.machine.hardware import this_machine
from qwq_local.profiles.keys import Profile

DEPTHS = (1024, 4096, 16_384, 32_768)
N_PREFILL, N_BATCH = 512, 512
ROOM = 1024


def our_prefill_rate(context: TimedContext, tokens: Sequence[int], depth: int) -> float:
    """Tokens per second of `prefill` from the depth on, the search for the common prefix included."""
    began = time.perf_counter()
    read(context, tokens[: depth + N_PREFILL])
    elapsed = time.perf_counter() - began
    context.sequences[0].truncate(depth)
    return N_PREFILL / elapsed


def bare_prefill_rate(context: TimedContext, tokens: Sequence[int], depth: int) -> float:
    """The same by llama_decode alone."""
    lib, handle = library(), context.handle
    batch = (ctypes.c_int32 * N_BATCH)()
    began = time.perf_counter()
    for start in range(depth, depth + N_PREFILL, N_BATCH):
        batch[:] = list(tokens[start : start + N_BATCH])
        lib.llama_decode(handle, lib.llama_batch_get_one(batch, N_BATCH))
    lib.llama_synchronize(handle)
    elapsed = time.perf_counter() - began
    lib.llama_memory_seq_rm(lib.llama_get_memory(handle), 0, depth, -1)
    return N_PREFILL / elapsed


def compare_at(context: TimedContext, tokens: Sequence[int], depth: int, pairs: int, n_decode: int) -> None:
    """Print both comparisons at one depth."""
    read(context, tokens[:depth])
    our_prefill_rate(context, tokens, depth), bare_prefill_rate(context, tokens, depth)  # warm up
    prefill = pair_ratios(
        lambda: our_prefill_rate(context, tokens, depth),
        lambda: bare_prefill_rate(context, tokens, depth),
        pairs,
    )
    print(summary(f"prefill at {depth:,} tokens, ours / bare", prefill, "at least 0.97"), flush=True)
    prompt = tokens[:depth]

    def our_decode() -> float:
        rate = reply_rate(context, prompt, n_decode)
        context.sequences[0].truncate(depth)
        return rate

    decode = pair_ratios(our_decode, lambda: bare_rate(context, prompt, n_decode), pairs)
    print(summary(f"decode at {depth:,} tokens, turn / bare", decode, "at least 0.97"), flush=True)
    rates = our_prefill_rate(context, tokens, depth), our_decode()
    print(f"at {depth:,} tokens: prefill {rates[0]:.1f}, decode {rates[1]:.1f} tokens/s", flush=True)


def planning_times(path: Path, runs: int) -> tuple[list[float], float]:
    """Seconds of a whole plan, with devices and dry run, and of loading the model once."""
    profile = Profile(native_window=32_768, yarn_origin=32_768, yarn_factors=(1.0, 2.0, 4.0))
    times = []
    for _ in range(runs):
        with closing(Planner(path, profile)) as planner:
            began = time.perf_counter()
            planner.plan(12_000)
            times.append(time.perf_counter() - began)
    began = time.perf_counter()
    load(path).close()
    return times, time.perf_counter() - began


def main() -> None:
    """Run the chosen depths and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--decode", type=int, default=32, help="tokens to sample")
    parser.add_argument("--model", default="standard", choices=("standard", "wide"))
    arguments = parser.parse_args()
    path = bench_model(arguments.model)
    print(f"{machine()}; {path.name}, {THREADS} threads", flush=True)
    this_machine()  # finding the devices the first time loads the library, which a run does anyway
    times, loading = planning_times(path, max(5, arguments.pairs))
    print(
        f"planning: median {1e3 * statistics.median(times):.1f} ms, {1e3 * min(times):.1f} to "
        f"{1e3 * max(times):.1f} (under 50); loading the model {1e3 * loading:.0f} ms",
        flush=True,
    )
    model = load(path)
    tokens = [token % 5000 + 100 for token in range(max(arguments.depths) + N_PREFILL)]
    settings = ContextSettings(
        max(arguments.depths) + ROOM, N_BATCH, N_BATCH, flash_attention=True, threads=THREADS
    )
    with closing(model), closing(TimedContext(model, settings)) as context:
        for depth in sorted(arguments.depths):
            compare_at(context, tokens, depth, arguments.pairs, arguments.decode)


if __name__ == "__main__":
    main()
