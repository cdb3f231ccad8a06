"""Start-up: `qwq --help` against `import typer`, and the first token against a minimal script on `Llama`.

    python bench/startup.py [--pairs 11]

Every figure is the wall time of a whole process, in alternating pairs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from compare import machine, pair_ratios, summary

from qwq_local.models.store import converted_miniature

QUESTION = "How many r's are in the word strawberry?"
WORK = Path(__file__).resolve().parent / ".work"
MINIMAL = """
import sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False)
messages = [{"role": "user", "content": sys.argv[2]}]
for chunk in llama.create_chat_completion(messages, temperature=0.6, top_k=40, top_p=0.95, stream=True):
    if chunk["choices"][0]["delta"].get("content"):
        print("first token", flush=True)
        break
"""


def wall_time(*command: str) -> Callable[[], float]:
    """Runs the command to its end; returns seconds."""

    def run() -> float:
        began = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        return time.perf_counter() - began

    return run


def time_to(marker: bytes, *command: str) -> Callable[[], float]:
    """Seconds from the start of the command to the first line of its output with the marker."""

    def run() -> float:
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if marker in line:
                    elapsed = time.perf_counter() - began
                    process.kill()
                    return elapsed
        raise SystemExit(f"{command[0]} never wrote {marker!r}")

    return run


def main() -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=11)
    pairs = parser.parse_args().pairs
    qwq = str(Path(sys.executable).with_name("qwq"))
    print(machine(), flush=True)
    help_time, typer_time = wall_time(qwq, "--help"), wall_time(sys.executable, "-c", "import typer")
    help_time(), typer_time()
    ratios = pair_ratios(help_time, typer_time, pairs)
    print(summary("qwq --help / python -c 'import typer'", ratios, "at most 1.5"), flush=True)
    model = str(converted_miniature(WORK, "Q8_0"))
    ask = time_to(
        b'"event":"thinking"',
        qwq,
        "ask",
        "--jsonl",
        "--model",
        model,
        "--set",
        "n_ctx=1024",
        "--set",
        "native_window=1024",
        QUESTION,
    )
    script = time_to(b"first token", sys.executable, "-c", MINIMAL, model, QUESTION)
    print(
        f"first token: qwq ask {min(ask(), ask()):.2f} s, a script on Llama {min(script(), script()):.2f} s"
    )
    print(summary("time to first token, qwq ask / script", pair_ratios(ask, script, pairs), "no bound"))


if __name__ == "__main__":
    main()
