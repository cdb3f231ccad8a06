"""Described computers: the bundled ones are valid, and an incomplete one is refused by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwq_local.errors import ProfileError
from qwq_local.machine.description import machine_names, read_machine
from qwq_local.paths import Directories
from qwq_local.planning.memory import Device, DeviceKind, Machine
from qwq_local.profiles.layers import ProfileFolders, profile_folders
from qwq_local.text import GIB

WHOLE = """
cores = 4
memory = 16
available = 12.5
unified = false
[[gpu]]
name = "Card"
memory = 8
available = 7.5
"""


@pytest.fixture
def folders(tmp_path: Path) -> ProfileFolders:
    return profile_folders(Directories(tmp_path, tmp_path, tmp_path))


def test_the_bundled_machines_can_all_be_read(folders: ProfileFolders) -> None:
    names = machine_names(folders)
    assert {"rtx-3090", "rtx-4090", "rtx-5090", "2x-24gb", "cpu", "mac-32gb", "mac-128gb"} <= set(names)
    for name in names:
        machine = read_machine(name, folders)
        assert machine.is_described
        assert 0 < machine.available_bytes < machine.memory_bytes
        assert all(0 < gpu.free_bytes <= gpu.total_bytes for gpu in machine.gpus)
        assert machine.is_unified == name.startswith("mac")
    assert len(read_machine("2x-24gb", folders).gpus) == 2
    assert read_machine("cpu", folders).gpus == ()


def test_a_file_is_read_in_gib(folders: ProfileFolders, tmp_path: Path) -> None:
    path = tmp_path / "Mine.TOML"
    path.write_text(WHOLE)
    card = Device("GPU0", "Card", DeviceKind.GPU, int(7.5 * GIB), 8 * GIB)
    expected = Machine("Mine", (card,), 16 * GIB, int(12.5 * GIB), 4, is_unified=False, is_described=True)
    assert read_machine(str(path), folders) == expected


def test_a_users_machine_comes_before_the_bundled_one(folders: ProfileFolders) -> None:
    own = folders.own / "machines" / "cpu.toml"
    own.parent.mkdir(parents=True)
    own.write_text("cores = 1\nmemory = 2\navailable = 1\n")
    assert read_machine("cpu", folders).memory_bytes == 2 * GIB


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (WHOLE.replace("available = 12.5", "avaliable = 12.5"), 'there is no key "avaliable".*available'),
        (WHOLE.replace("memory = 16", 'memory = "16"'), 'memory is "16", allowed: a number'),
        (WHOLE.replace("memory = 16", "memory = 16e9"), "allowed: a number above 0 up to 4,096"),
        (WHOLE.replace("memory = 16", "memory = nan"), "memory is nan"),
        (WHOLE.replace("cores = 4", "cores = 4.5"), "cores is 4.5"),
        (WHOLE.replace("cores = 4", ""), "cores must be there"),
        (WHOLE.replace("unified = false", "unified = 1"), "unified is 1, allowed: on or off"),
        (WHOLE.replace("available = 12.5", "available = 17"), "available is more than memory"),
        (WHOLE.replace("available = 7.5", "available = 9"), "gpu 1: available is more than memory"),
        (WHOLE.replace("[[gpu]]", "[gpu]"), "allowed: up to 16 tables"),
        (WHOLE.replace('name = "Card"', "vram = 8"), 'gpu 1: there is no key "vram"'),
        ("gpu = [1]\n" + WHOLE.partition("[[")[0], "gpu 1 is 1, allowed: a table"),
        (WHOLE + '[[gpu]]\nname = "x"\nmemory = 1\navailable = 1\n' * 16, "up to 16 tables"),
        ("= 3", "not TOML"),
        ("# " + "x" * 70_000, "larger than 65,536 bytes"),
    ],
)
def test_half_a_description_is_refused_by_file_and_key(
    folders: ProfileFolders, tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(ProfileError, match=says) as refused:
        read_machine(str(path), folders)
    assert "m.toml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_name_is_refused_with_the_nearest(folders: ProfileFolders, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r'no machine "rtx-4900".*Did you mean rtx-4090'):
        read_machine("rtx-4900", folders)
    with pytest.raises(ProfileError, match="is no machine's name"):
        read_machine("../models/qwq-32b", folders)
    with pytest.raises(ProfileError, match="No such file"):
        read_machine(str(tmp_path / "none.toml"), folders)
