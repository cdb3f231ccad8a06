"""Decode speed in the REPL, on a real pseudo-terminal, against `qwq ask > /dev/null`.

    python bench/repl.py [--tokens 256] [--pairs 5] [--think excerpt|tail|full|off] [--size 80x24]

Both are whole processes on the standard model (bench/make_model.py) with the same question, seed, sampler,
context and threads; half of the tokens are thinking, half the answer. Rates are sampled tokens per second of
decode: the REPL's from its history, the other's from --stats. Nothing but a reader of bytes is at the other
end of the terminal, so a terminal emulator costs nothing here.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import select
import shutil
import statistics
import struct
import subprocess
import sys
import termios
from pathlib import Path

from compare import machine, pair_ratios, summary
from make_model import WORK, bench_model

from qwq_local.history.archive import FILE, Archive
from qwq_local.machine.hardware import physical_cores

PLACES = WORK / "repl"
QUESTION = "Write a long text about a fox, a dog and a river."
READY = b"\x1b[?2004h"  # bracketed paste is switched on: the prompt is there
RATE = re.compile(r"answer [\d,]+ tok in [\d.]+ s, ([\d.]+) tok/s")
SILENCE_S = 300.0


class Repl:
    """A `qwq chat` on a pseudo-terminal of its own. Its output is read and dropped."""

    def __init__(self, flags: list[str], size: tuple[int, int]) -> None:
        self._own, theirs = pty.openpty()
        columns, rows = size
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qwq_local", "chat", *flags],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment(),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def ask(self, question: str) -> None:
        """Enter the question and type ahead the command that leaves."""
        self._read_until(READY)
        os.write(self._own, f"{question}\r".encode())
        os.write(self._own, b"/exit\r")
        self._read_until(None)
        if self._process.wait():
            raise SystemExit(f"the REPL ended with {self._process.returncode}")

    def close(self) -> None:
        """Kill it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._own)

    def _read_until(self, marker: bytes | None) -> None:
        """Read up to a marker, or to the end."""
        seen = b""
        while marker is None or marker not in seen:
            ready, _, _ = select.select([self._own], [], [], SILENCE_S)
            if not ready:
                raise SystemExit(f"the REPL wrote nothing for {SILENCE_S:.0f} s: {seen[-500:]!r}")
            try:
                read = os.read(self._own, 1 << 16)
            except OSError:  # Linux: the other side is closed
                read = b""
            if not read:
                if marker is not None:
                    raise SystemExit(f"the REPL ended before its prompt: {seen[-500:]!r}")
                return
            seen = (seen + read)[-4096:]


def environment() -> dict[str, str]:
    """An environment in which no file of the user is read or written."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("QWQ_", "NO_COLOR"))}
    places = {
        name: str(PLACES / name.lower()) for name in ("QWQ_CACHE_DIR", "QWQ_DATA_DIR", "QWQ_CONFIG_DIR")
    }
    return {**kept, **places, "TERM": "xterm-256color"}


def flags_for(model: Path, n_tokens: int) -> list[str]:
    """The flags of both."""
    settings = {
        "thinking_budget": n_tokens // 2,
        "max_tokens": n_tokens - n_tokens // 2,
        "answer_reserve": n_tokens,
        "n_ctx": 2048,
        "loop_guard": "off",
        "kv_store": 0,
        "threads": physical_cores(),
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["-m", str(model), "--seed", "1", *sets]


def ask_rate(flags: list[str]) -> float:
    """Tokens per second of `qwq ask > /dev/null`."""
    ran = subprocess.run(
        [sys.executable, "-m", "qwq_local", "ask", "--stats", *flags, QUESTION],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        check=False,
    )
    found = RATE.search(ran.stderr)
    if found is None:
        raise SystemExit(f"qwq ask ended with {ran.returncode}: {ran.stderr[-500:]}")
    return float(found[1])


def repl_rate(flags: list[str], size: tuple[int, int], n_tokens: int) -> float:
    """Tokens per second of the same turn in the REPL, from its history."""
    history = PLACES / "qwq_data_dir"
    shutil.rmtree(history, ignore_errors=True)
    repl = Repl(flags, size)
    try:
        repl.ask(QUESTION)
    finally:
        repl.close()
    with Archive.open(history / FILE) as archive:
        record = archive.latest()
        turns = archive.path(record.id) if record else []
    if len(turns) != 1:
        raise SystemExit(f"the history holds {len(turns)} turns, not one")
    stats = turns[0].stats
    if (sampled := stats.thinking_tokens + stats.answer_tokens) < n_tokens - 8:
        raise SystemExit(f"the random model ended after {sampled} tokens; try another --tokens")
    return stats.decode_rate


def main() -> None:
    """Run the pairs and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--think", choices=("off", "excerpt", "tail", "full"), default="full")
    parser.add_argument("--size", default="80x24", metavar="COLUMNSxROWS")
    arguments = parser.parse_args()
    columns, rows = map(int, arguments.size.split("x"))
    model = bench_model()
    flags = flags_for(model, arguments.tokens)
    chat = [*flags, "--think", arguments.think]
    print(
        f"{machine()}\n{model.name}, {physical_cores()} threads, {arguments.tokens} tokens, half of them "
        f"thinking ({arguments.think}), {columns}x{rows}",
        flush=True,
    )
    ours, theirs = [], []

    def ours_once() -> float:
        ours.append(repl_rate(chat, (columns, rows), arguments.tokens))
        return ours[-1]

    def theirs_once() -> float:
        theirs.append(ask_rate(flags))
        return theirs[-1]

    ours_once(), theirs_once()  # warm up: the file in memory, the folders made
    ours.clear()
    theirs.clear()
    ratios = pair_ratios(ours_once, theirs_once, arguments.pairs)
    print(summary("decode, the REPL / qwq ask > /dev/null", ratios, "at least 0.95"))
    print(
        f"REPL {statistics.median(ours):.1f}, qwq ask {statistics.median(theirs):.1f} tokens/s, medians",
        flush=True,
    )
    shutil.rmtree(PLACES, ignore_errors=True)


if __name__ == "__main__":
    main()
