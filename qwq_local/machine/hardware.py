"""This computer: its devices, memory and cores, and a GPU that the installed library cannot use."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwq_local.engine.devices import list_devices, offload_devices
from qwq_local.engine.library import TESTED_VERSION
from qwq_local.planning.memory import DeviceKind, Machine

_CPU_FOLDER = Path("/sys/devices/system/cpu")
_KIB = 1024
_LINE = re.compile(r"^(?P<key>[\w()]+):\s+(?P<kib>\d+) kB", re.MULTILINE)
_PAGE_SIZE = re.compile(r"page size of (\d+) bytes")
_PAGES = re.compile(r"^Pages (free|inactive|speculative|purgeable):\s+(\d+)\.", re.MULTILINE)
# Version 1 writes a huge number where version 2 writes "max".
_NO_LIMIT = 1 << 60
_TOOL_TIMEOUT_S = 5
_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU, and the build of llama-cpp-python for it."""

    name: str
    build: str


CUDA, METAL, ROCM = Gpu("an NVIDIA GPU", "cu124"), Gpu("an Apple GPU", "metal"), Gpu("an AMD GPU", "rocm72")


@dataclass(frozen=True, slots=True)
class SystemMemory:
    """Bytes in all, and bytes that programs can use without swapping."""

    total: int
    available: int


def this_machine() -> Machine:
    """This computer now; free memory changes from moment to moment."""
    gpus = offload_devices()
    if (memory := system_memory()) is None:
        # ggml reports all memory as free, so half counts.
        totals = [device.total_bytes for device in list_devices() if device.kind is DeviceKind.CPU]
        memory = SystemMemory(max(totals, default=0), max(totals, default=0) // 2)
    return Machine(
        name="this machine",
        gpus=gpus,
        memory_bytes=memory.total,
        available_bytes=memory.available,
        cores=physical_cores(),
        is_unified=sys.platform == "darwin" or any(gpu.kind is DeviceKind.INTEGRATED for gpu in gpus),
    )


def system_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> SystemMemory | None:
    """The memory of this system, within the limits of its control groups; None on unknown systems."""
    if sys.platform == "darwin":
        return memory_of_mac(_output("sysctl", "-n", "hw.memsize"), _output("vm_stat"))
    try:
        fields = {match["key"]: int(match["kib"]) for match in _LINE.finditer((proc / "meminfo").read_text())}
        total, available = fields["MemTotal"] * _KIB, fields["MemAvailable"] * _KIB
    except (OSError, KeyError, ValueError):
        return None
    for limit, left in _group_limits(proc, groups):
        total, available = min(total, limit), min(available, left)
    return SystemMemory(total, max(0, available))


def _group_limits(proc: Path, groups: Path) -> Iterator[tuple[int, int]]:
    """The limit and the rest of it, for every control group of this process, outer ones included."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            names, root = ("memory.max", "memory.current"), groups
        elif "memory" in controllers.split(","):
            names, root = ("memory.limit_in_bytes", "memory.usage_in_bytes"), groups / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        while folder != root.parent:
            if (found := _limit_of(folder, *names)) is not None:
                yield found
            folder = folder.parent


def _limit_of(folder: Path, limit_name: str, usage_name: str) -> tuple[int, int] | None:
    try:
        limit = int((folder / limit_name).read_text())
        usage = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    if limit >= _NO_LIMIT:
        return None
    # Pages of files that were read once count as used, but the kernel frees them first.
    reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
    return limit, limit - max(0, usage - reclaimable)


def memory_of_mac(total: str, pages: str) -> SystemMemory | None:
    """The memory of a Mac, from the output of `sysctl -n hw.memsize` and `vm_stat`; None for other text."""
    size = _PAGE_SIZE.search(pages)
    counts = [int(match[2]) for match in _PAGES.finditer(pages)]
    if size is None or not counts or not total.strip().isdigit():
        return None
    return SystemMemory(int(total), sum(counts) * int(size[1]))


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def physical_cores(cpu_folder: Path = _CPU_FOLDER) -> int:
    """The number of cores: hyperthreads count once, on Apple Silicon only performance cores count."""
    if sys.platform == "darwin":
        output = _output("sysctl", "-n", "hw.perflevel0.physicalcpu").strip()
        return int(output) if output.isdigit() and int(output) else os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)
    usable = affinity(0) if affinity else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in usable:
        try:
            siblings.add((cpu_folder / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(usable)
    return max(1, len(siblings))


def present_gpu(
    exists: Callable[[str], bool] = os.path.exists, system: str = sys.platform, cpu: str = platform.machine()
) -> Gpu | None:
    """The GPU whose driver is installed, or None. Whether the library can use it is another question."""
    if system == "darwin":
        return METAL if cpu == "arm64" else None
    windows = os.environ.get("SYSTEMROOT", r"C:\Windows")
    if exists("/proc/driver/nvidia/version") or exists(rf"{windows}\System32\nvcuda.dll"):
        return CUDA
    return ROCM if exists("/dev/kfd") else None


def idle_gpu_notice(gpu: Gpu | None, *, can_offload: bool) -> str | None:
    """One line when the installed library cannot use the GPU, with the command that changes that."""
    if gpu is None or can_offload:
        return None
    return (
        f"{gpu.name} is here, but the installed llama-cpp-python only uses the CPU. Run: pip install "
        f"--force-reinstall --no-deps --only-binary :all: llama-cpp-python=={TESTED_VERSION} "
        f"--extra-index-url {_WHEELS}/{gpu.build}"
    )
