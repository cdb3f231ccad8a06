"""Prefill once: the time to the first token of a second question about a file, against the first question.

    python bench/prefix.py [--tokens 8000] [--pairs 5] [--kv f16]

Each time is from the start of `qwq ask` to its first token of thinking, with loading, on the standard model
(bench/make_model.py). The first of a pair finds an empty store, the second an entry. The script also compares
the bytes on disk for one token with keys, values and 16 bytes for the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from os import environ
from pathlib import Path

from compare import machine, summary
from make_model import SHAPES, WORK, bench_model

from qwq_local.engine.kv_store import kv_folder
from qwq_local.engine.model import LoadSettings, drained, load_model
from qwq_local.errors import AbortFlag

CACHE = WORK / "prefix"
QUESTIONS = ("What does the fox do?", "How many dogs are there on the last day?")
BYTES_OF_A_VALUE = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
HEADS_OF_64 = 64
BESIDE = 16


@dataclass(frozen=True, slots=True)
class Timed:
    """One process: seconds to its first token, seconds from answer to exit, and prompt tokens computed."""

    first_token_s: float
    keeping_s: float
    prompt_tokens: int
    computed: int


def text_of(model: Path, n_tokens: int) -> str:
    """A text of `n_tokens` tokens that does not repeat itself."""
    settings = LoadSettings(vocab_only=True)
    with closing(drained(load_model(model, settings, AbortFlag()))) as loaded:
        text = " ".join(f"on day {i} the fox jumps over {i * i} lazy dogs" for i in range(n_tokens))
        tokens = loaded.vocabulary.encode_text(text)[:n_tokens]
        return b"".join(map(loaded.vocabulary.piece, tokens)).decode()


def ask(model: Path, file: Path, question: str, kv_type: str) -> Timed:
    """Ask in a new process for one token."""
    settings = ("temperature=0", "thinking_budget=8", "answer_reserve=64", "max_tokens=1", "loop_guard=off")
    command = [sys.executable, "-m", "qwq_local", "ask", "--jsonl", "-m", str(model), "-f", str(file)]
    for setting in (*settings, f"kv_type={kv_type}"):
        command += ["--set", setting]
    began = time.perf_counter()
    first_token = answered = 0.0
    stats: dict[str, int] = {}
    variables = {**environ, "QWQ_CACHE_DIR": str(CACHE)}
    with subprocess.Popen([*command, question], stdout=subprocess.PIPE, env=variables) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not first_token and b'"event":"thinking"' in line:
                first_token = time.perf_counter()
            if b'"event":"finished"' in line:
                answered, stats = time.perf_counter(), json.loads(line)["stats"]
    ended = time.perf_counter()
    prompt_tokens = stats["prompt_tokens"]
    return Timed(first_token - began, ended - answered, prompt_tokens, prompt_tokens - stats["cached_tokens"])


def main() -> None:
    """Run the pairs and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--kv", choices=BYTES_OF_A_VALUE, default="f16")
    arguments = parser.parse_args()
    model, file = bench_model(), WORK / "prefix.txt"
    file.write_text(text_of(model, arguments.tokens))
    print(f"{machine()}\n{model.name}, {arguments.tokens:,} tokens, {arguments.kv} KV", flush=True)
    ratios, pairs = [], []
    for _ in range(arguments.pairs):
        shutil.rmtree(CACHE / "kv", ignore_errors=True)
        pair = [ask(model, file, question, arguments.kv) for question in QUESTIONS]
        ratios.append(pair[1].first_token_s / pair[0].first_token_s)
        pairs.append(pair)
    for name, number in (("first", 0), ("second", 1)):
        runs = [pair[number] for pair in pairs]
        first_token_s = statistics.median(run.first_token_s for run in runs)
        keeping_s = statistics.median(run.keeping_s for run in runs)
        print(
            f"{name} question: {first_token_s:.2f} s to the first token, {runs[0].computed:,} of "
            f"{runs[0].prompt_tokens:,} tokens computed, {keeping_s:.2f} s from the answer to the end"
        )
    print(summary("time to the first token, second / first", ratios, "at most 0.15"))
    (entry,) = kv_folder(CACHE).entries()
    shape = SHAPES["standard"]
    values = 2 * shape.layers * shape.kv_heads * HEADS_OF_64
    formula = values * BYTES_OF_A_VALUE[arguments.kv] + BESIDE
    per_token = entry.file_bytes / entry.record.n_tokens
    print(f"bytes kept of a token: {per_token:,.1f}, by the formula {formula:,.0f}")
    shutil.rmtree(CACHE)


if __name__ == "__main__":
    main()
