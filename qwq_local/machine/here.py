"""What this computer has: its devices and memory, physical cores, a GPU that the library cannot use.

Reads files of the operating system and ggml's list of devices; imports nothing that is not on every system.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwq_local.engine.devices import list_devices, offload_devices
from qwq_local.engine.library import TESTED_VERSION
from qwq_local.machine.memory import SystemMemory, system_memory
from qwq_local.planning.memory import DeviceKind, Machine

_CPU_FOLDER = Path("/sys/devices/system/cpu")
_WHEELS = "https://abetlen.github.io/llama-cpp-python/whl"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU and how llama-cpp-python is installed so that it is used."""

    name: str
    reinstall: str


def _wheel(build: str) -> str:
    return (
        f"pip install --force-reinstall --no-deps --only-binary :all: llama-cpp-python=={TESTED_VERSION} "
        f"--extra-index-url {_WHEELS}/{build}"
    )


CUDA = Gpu("an NVIDIA GPU", _wheel("cu124"))
METAL = Gpu("an Apple GPU", _wheel("metal"))
ROCM = Gpu("an AMD GPU", _wheel("rocm72"))


def this_machine() -> Machine:
    """This computer as a plan sees it now: free memory changes from one moment to the next."""
    gpus = offload_devices()
    memory = system_memory() or _told_by_ggml()
    return Machine(
        name="this machine",
        gpus=gpus,
        memory_bytes=memory.total,
        available_bytes=memory.available,
        cores=physical_cores(),
        is_unified=sys.platform == "darwin" or any(gpu.kind is DeviceKind.INTEGRATED for gpu in gpus),
    )


def _told_by_ggml() -> SystemMemory:
    """What ggml says of the CPU: all of it counts as free there, so only half is believed."""
    totals = [device.total_bytes for device in list_devices() if device.kind is DeviceKind.CPU]
    total = max(totals, default=0)
    return SystemMemory(total, total // 2)


def physical_cores(cpu_folder: Path = _CPU_FOLDER) -> int:
    """The cores that compute: hyperthreads counted once, on Apple Silicon the performance cores only."""
    if sys.platform == "darwin":
        return _sysctl("hw.perflevel0.physicalcpu") or os.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)
    usable = affinity(0) if affinity else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in usable:
        try:
            siblings.add((cpu_folder / f"cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            return len(usable)
    return max(1, len(siblings))


def _sysctl(name: str) -> int:
    try:
        output = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
        return int(output.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0


def present_gpu(
    exists: Callable[[str], bool] = os.path.exists, system: str = sys.platform, cpu: str = platform.machine()
) -> Gpu | None:
    """The GPU whose driver is there, or None; says nothing of whether the library can use it."""
    if system == "darwin":
        return METAL if cpu == "arm64" else None
    windows = os.environ.get("SYSTEMROOT", r"C:\Windows")
    if exists("/proc/driver/nvidia/version") or exists(rf"{windows}\System32\nvcuda.dll"):
        return CUDA
    return ROCM if exists("/dev/kfd") else None


def idle_gpu_notice(gpu: Gpu | None, *, can_offload: bool) -> str | None:
    """One line when a GPU is there that the installed library cannot use, with the exact mend."""
    if gpu is None or can_offload:
        return None
    return f"{gpu.name} is here, but the installed llama-cpp-python only uses the CPU. Run: {gpu.reinstall}"
