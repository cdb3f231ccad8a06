"""Detected hardware, on file systems that tests describe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwq_local.engine.devices import can_offload, list_devices, offload_devices
from qwq_local.machine.hardware import (
    CUDA,
    METAL,
    ROCM,
    Gpu,
    idle_gpu_notice,
    physical_cores,
    present_gpu,
    this_machine,
)
from qwq_local.planning.memory import DeviceKind


def present(*files: str, system: str = "linux", cpu: str = "x86_64") -> Gpu | None:
    return present_gpu(lambda path: path in files, system, cpu)


def test_a_gpu_is_detected_by_its_driver() -> None:
    assert present("/proc/driver/nvidia/version") is CUDA
    assert present("/dev/kfd") is ROCM
    assert present() is None
    assert present(system="darwin", cpu="arm64") is METAL
    assert present(system="darwin", cpu="x86_64") is None


@pytest.mark.parametrize("gpu", [CUDA, METAL, ROCM])
def test_a_gpu_that_the_library_cannot_use_gives_the_line_that_fixes_it(gpu: Gpu) -> None:
    notice = idle_gpu_notice(gpu, can_offload=False)
    assert notice is not None
    assert "\n" not in notice
    assert gpu.name in notice
    assert "pip install" in notice
    assert "llama-cpp-python==0.3.36" in notice
    assert idle_gpu_notice(gpu, can_offload=True) is None
    assert idle_gpu_notice(None, can_offload=False) is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the files are Linux's")
def test_hyperthreads_of_one_core_count_once(tmp_path: Path) -> None:
    usable = sorted(os.sched_getaffinity(0))
    for cpu in usable:
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text("0-127\n")
    assert physical_cores(tmp_path) == 1
    (tmp_path / f"cpu{usable[0]}" / "topology" / "thread_siblings_list").write_text(f"{usable[0]}\n")
    assert physical_cores(tmp_path) == min(2, len(usable))
    assert physical_cores(tmp_path / "absent") == len(usable)


def test_ggml_lists_the_processor_with_its_memory() -> None:
    processor = [device for device in list_devices() if device.kind is DeviceKind.CPU]
    assert [device.name for device in processor] == ["CPU"]
    assert processor[0].total_bytes > 1 << 30
    assert processor[0].description


def test_less_memory_is_available_than_installed() -> None:
    """ggml says that all memory is free; the kernel says how much really is."""
    machine = this_machine()
    total = next(device.total_bytes for device in list_devices() if device.kind is DeviceKind.CPU)
    assert 0 < machine.available_bytes < machine.memory_bytes <= total
    assert machine.gpus == offload_devices()
    assert bool(machine.gpus) == can_offload()
    assert machine.cores == physical_cores()
    assert not machine.is_described
