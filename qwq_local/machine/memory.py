"""How much of the system's memory can be had: what the kernel says, and what a control group allows.

Reads files of the operating system (or asks `vm_stat` on a Mac); knows no devices and no models.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_KIB = 1024
_LINE = re.compile(r"^(?P<key>[\w()]+):\s+(?P<kib>\d+) kB", re.MULTILINE)
_PAGE_SIZE = re.compile(r"page size of (\d+) bytes")
_PAGES = re.compile(r"^Pages (free|inactive|speculative|purgeable):\s+(\d+)\.", re.MULTILINE)
# Version 1 writes a huge number where version 2 writes "max".
_NO_LIMIT = 1 << 60
_TOOL_TIMEOUT_S = 5


@dataclass(frozen=True, slots=True)
class SystemMemory:
    """Bytes that there are, and that can be had without swapping."""

    total: int
    available: int


def system_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> SystemMemory | None:
    """The memory of this system, no more than its control group allows; None where nothing tells."""
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
    """Limit and what is left of it, for every control group that this process is in, the outer ones too."""
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
    # Pages of files that were read once are counted as used, and given up first.
    reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
    return limit, limit - max(0, usage - reclaimable)


def memory_of_mac(total: str, pages: str) -> SystemMemory | None:
    """The memory of a Mac from what `sysctl -n hw.memsize` and `vm_stat` print; None when that is not it."""
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
