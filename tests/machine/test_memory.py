"""Available memory of a system and its control groups, on file systems that tests describe."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qwq_local.machine.hardware import SystemMemory, memory_of_mac, system_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the files are Linux's")
GIB = 1 << 30


def laid_out(folder: Path, cgroup: str = "", available_gib: int = 20) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup with nothing in the latter."""
    proc, groups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    kib = 1 << 20
    (proc / "meminfo").write_text(
        f"MemTotal:       {32 * kib} kB\nMemFree:        {1 * kib} kB\n"
        f"MemAvailable:   {available_gib * kib} kB\nActive(anon):   5 kB\n"
    )
    if cgroup:
        (proc / "self" / "cgroup").write_text(cgroup)
    return proc, groups


def limit(folder: Path, names: tuple[str, str], values: tuple[str, str], stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, values, strict=True):
        (folder / name).write_text(value + "\n")
    (folder / "memory.stat").write_text(stat)


def test_available_memory_is_counted_not_free_memory(tmp_path: Path) -> None:
    assert system_memory(*laid_out(tmp_path)) == SystemMemory(32 * GIB, 20 * GIB)


def test_a_control_group_of_version_2_bounds_it_and_file_pages_count_as_free(tmp_path: Path) -> None:
    proc, groups = laid_out(tmp_path, "0::/user.slice/run-1.scope\n")
    names = ("memory.max", "memory.current")
    limit(groups / "user.slice/run-1.scope", names, ("max", str(9 * GIB)), "inactive_file 0\n")
    limit(groups / "user.slice", names, (str(16 * GIB), str(10 * GIB)), f"anon 5\ninactive_file {4 * GIB}\n")
    assert system_memory(proc, groups) == SystemMemory(16 * GIB, 10 * GIB)


def test_a_control_group_of_version_1_bounds_it(tmp_path: Path) -> None:
    proc, groups = laid_out(tmp_path, "9:cpu:/a\n4:hugetlb,memory:/docker/abc\n0::/\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit(groups / "memory", names, ("9223372036854771712", "5"), "total_inactive_file 0\n")
    stat = f"inactive_file 1\ntotal_inactive_file {GIB}\n"
    limit(groups / "memory/docker/abc", names, (str(8 * GIB), str(3 * GIB)), stat)
    assert system_memory(proc, groups) == SystemMemory(8 * GIB, 6 * GIB)


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    proc, groups = laid_out(tmp_path, "0::/\n")
    limit(groups, ("memory.max", "memory.current"), (str(GIB), str(2 * GIB)), "inactive_file 0\n")
    assert system_memory(proc, groups) == SystemMemory(GIB, 0)


def test_without_any_source_the_memory_is_unknown(tmp_path: Path) -> None:
    assert system_memory(tmp_path, tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 5 kB\n")
    assert system_memory(tmp_path, tmp_path) is None


def test_a_mac_counts_its_free_and_reclaimable_pages() -> None:
    printed = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               65536.\nPages active:                            999999.\n"
        "Pages inactive:                          131072.\nPages speculative:                        32768.\n"
        "Pages purgeable:                          32768.\n"
    )
    assert memory_of_mac("38654705664\n", printed) == SystemMemory(36 * GIB, 4 * GIB)
    assert memory_of_mac("", printed) is None
    assert memory_of_mac("1", "") is None
