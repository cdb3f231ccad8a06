"""`qwq pull` on loopback: against huggingface_hub and curl, and `--convert` against download-then-convert.

    python bench/pull.py [--gigabytes 2] [--pairs 5] [--no-convert]

The hub is a separate process that sends files by sendfile. qwq verifies the sha256, the others do not. Each
run starts with an empty cache. CPU seconds are those of the client process. The model to convert is random,
about 1.2 GB of BF16 in 6 shards; peak disk is sampled every 20 ms.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from compare import machine, pair_ratios, summary
from make_weights import write_weights

ROOT = Path(__file__).resolve().parent
WORK = ROOT / ".work" / "pull"
NAME = "model-Q8_0.gguf"
SNAPSHOT = "from huggingface_hub import snapshot_download; print(snapshot_download('owner/model'))"
TWO_STEPS = 'folder=$("$0" -c "$1") && "$0" -m qwq_local convert "$folder" Q8_0 -o out.gguf'
QWQ = [sys.executable, "-m", "qwq_local"]
HUB_CLIENT = f"from huggingface_hub import hf_hub_download; hf_hub_download('owner/model', '{NAME}')"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A hub for the files of a folder; its address."""
    command = [sys.executable, str(ROOT / "loopback_hub.py"), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def client_environment(url: str) -> dict[str, str]:
    """The environment of a client with an empty cache."""
    places = {name: str(WORK / "client" / name) for name in ("HF_HOME", "QWQ_CACHE_DIR", "QWQ_DATA_DIR")}
    sources = os.pathsep.join(str(ROOT.parent / folder) for folder in (".", "convert"))
    return {**os.environ, **places, "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": sources}


def timed(command: list[str], url: str, cpu: list[float], n_bytes: int = 0) -> Callable[[], float]:
    """Runs the command with an empty cache; returns wall seconds and adds CPU seconds to the list.

    Ends the bench if the command left no file of `n_bytes`: a failure would look fast.
    """

    def run() -> float:
        shutil.rmtree(WORK / "client", ignore_errors=True)
        (WORK / "client").mkdir()
        before, began = _cpu_s(), time.perf_counter()
        subprocess.run(
            command, env=client_environment(url), check=False, capture_output=True, cwd=WORK / "client"
        )
        elapsed = time.perf_counter() - began
        cpu.append(_cpu_s() - before)
        if n_bytes and all(path.stat().st_size != n_bytes for path in (WORK / "client").rglob("*")):
            sys.exit(f"{command} did not bring the file")
        return elapsed

    return run


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def compare_downloads(gigabytes: float, pairs: int) -> None:
    """Print the ratios of rates and the CPU seconds per GB."""
    folder = WORK / "file"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    n_bytes = int(gigabytes * 1000) * 10**6
    if not path.exists() or path.stat().st_size != n_bytes:
        with path.open("wb") as file:
            # qwq looks at the first bytes of a file before it downloads it.
            file.write(b"GGUF" + os.urandom(10**6 - 4))
            for _ in range(int(gigabytes * 1000) - 1):
                file.write(os.urandom(10**6))
    with serving(folder) as url:
        commands = {
            "qwq pull": [*QWQ, "pull", "--repo", "owner/model", "--file", NAME],
            "huggingface_hub": [sys.executable, "-c", HUB_CLIENT],
            "curl": ["curl", "-s", "-o", "out", f"{url}/owner/model/resolve/main/{NAME}"],
        }
        cpu: dict[str, list[float]] = {name: [] for name in commands}
        runs = {name: timed(command, url, cpu[name], n_bytes) for name, command in commands.items()}
        for other, bound in (("huggingface_hub", "at least 0.9"), ("curl", "no bound")):
            ratios = pair_ratios(runs[other], runs["qwq pull"], pairs)
            print(summary(f"rate of qwq pull / rate of {other}, {gigabytes:g} GB", ratios, bound), flush=True)
    for name, seconds in cpu.items():
        print(
            f"{name}: {min(seconds) / gigabytes:.2f} CPU seconds per GB (best of {len(seconds)})", flush=True
        )


def compare_conversions() -> None:
    """Print wall time and peak disk of both ways."""
    folder = WORK / "weights"
    if not folder.exists():
        write_weights(folder)
    with serving(folder) as url:
        ways = {
            "download, then convert": ["sh", "-c", TWO_STEPS, sys.executable, SNAPSHOT],
            "pull --convert": [*QWQ, "pull", "--repo", "owner/model", "--convert", "Q8_0", "-o", "out.gguf"],
        }
        for name, command in ways.items():
            run, peak = timed(command, url, []), _Peak()
            shutil.rmtree(WORK / "client", ignore_errors=True)
            with peak:
                elapsed = run()
            out = WORK / "client" / "out.gguf"
            size = out.stat().st_size if out.exists() else 0
            print(
                f"{name}: {elapsed:.1f} s, peak disk {peak.n_bytes / 1e9:.2f} GB, output {size / 1e9:.2f} GB",
                flush=True,
            )
    shards = sorted((path.stat().st_size for path in folder.glob("*.safetensors")), reverse=True)
    print(f"weights {sum(shards) / 1e9:.2f} GB, the two largest shards {sum(shards[:2]) / 1e9:.2f} GB")


class _Peak:
    """The peak of the bytes that the client's folder takes on the disk during the block."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.n_bytes = max(self.n_bytes, _disk_bytes(WORK / "client"))


def _disk_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def main() -> None:
    """Run both comparisons and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--no-convert", action="store_true")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    compare_downloads(arguments.gigabytes, arguments.pairs)
    if not arguments.no_convert:
        compare_conversions()
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
