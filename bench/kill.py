"""Measures how much of a thought is lost when its process is killed with SIGKILL.

    python bench/kill.py [--kills 20] [--busy 2]

A process records a turn into a history on the disk, as `qwq chat` does while it streams. It writes the time a
hundred times a second and is killed at a random moment. The last time in the history is compared with
that of the kill. Meanwhile `--busy` other processes compute.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from compare import machine

from qwq_local.events import Thinking
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnStart

PIECES_PER_S = 100


def think(path: Path) -> None:
    """Record a thought that never ends."""
    archive = Archive.open(path)
    conversation = archive.begin("a model", "default", "")
    recorder = archive.begin_turn(TurnStart(conversation, None, "Why?", "Why?"))
    recorder.feed(Thinking("0\n"))
    print("thinking", flush=True)
    while True:
        time.sleep(1 / PIECES_PER_S)
        recorder.feed(Thinking(f"{time.monotonic()}\n"))


def lost_s(path: Path, after_s: float) -> float:
    """Seconds of the thought that are lost when the process is killed `after_s` seconds into it."""
    with subprocess.Popen([sys.executable, __file__, "--think", path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(after_s)
        process.kill()
        killed = time.monotonic()
    with Archive.open(path) as archive:
        thought = archive.path(1)[0].thinking
    return killed - float(thought.split()[-1])


@contextmanager
def busy() -> Iterator[None]:
    """A process that computes while the block runs."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def main() -> None:
    """Kill processes and print the seconds that were lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--busy", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--think", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.think:
        return think(flags.think)
    print(machine())
    moments = random.Random(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for _ in range(flags.busy):
            stack.enter_context(busy())
        paths = (Path(folder) / f"{number}.sqlite3" for number in itertools.count())
        lost = [lost_s(next(paths), moments.uniform(1.5, 4.0)) for _ in range(flags.kills)]
    print(f"lost of a thought, {flags.busy} processes computing beside it, {flags.kills} kills:")
    print(f"median {statistics.median(lost):.2f} s, most {max(lost):.2f} s (at most 1)")
    return None


if __name__ == "__main__":
    main()
