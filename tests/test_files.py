"""Files: what readers see during a write, two processes at once, and a full disk."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from qwq_local import files
from qwq_local.files import LockHeld, PartialFile, atomic_file, lock_beside, lock_file, write_atomically


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_threads_write_at_their_offsets_at_once(tmp_path: Path) -> None:
    blocks = [bytes([number]) * 10_000 for number in range(64)]
    partial = PartialFile(tmp_path / "out.partial")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: partial.write(blocks[n], n * 10_000), reversed(range(64))))
    assert partial.n_bytes == 640_000
    assert partial.read(30, 9_985) == bytes(15) + b"\x01" * 15
    partial.sync()
    partial.publish(tmp_path / "out")
    partial.close()
    partial.close()
    assert (tmp_path / "out").read_bytes() == b"".join(blocks)
    assert not (tmp_path / "out.partial").exists()


def test_a_partial_file_keeps_what_an_earlier_run_wrote_until_it_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    first = PartialFile(path)
    first.truncate(100)
    first.write(b"abc", 50)
    first.close()
    second = PartialFile(path)
    assert second.n_bytes == 100
    assert second.read(5, 49) == b"\0abc\0"
    second.remove()
    assert not path.exists()


def test_a_read_past_the_end_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path / "file") as descriptor:
        files.write_at(descriptor, b"0123456789", 0)
        assert files.read_exactly(descriptor, 4, 6) == b"6789"
        with pytest.raises(EOFError):
            files.read_exactly(descriptor, 5, 6)


def test_a_line_that_does_not_fit_on_the_disk_is_not_half_written(tmp_path: Path) -> None:
    with opened(tmp_path / "journal") as descriptor:
        files.append(descriptor, b"first\n", sync=True)
        with file_size_limit(10), pytest.raises(OSError, match="too large"):
            files.append(descriptor, b"second line\n")
        files.append(descriptor, b"third\n")
    assert (tmp_path / "journal").read_bytes() == b"first\nthird\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    with file_size_limit(10), pytest.raises(OSError, match="too large"):
        write_atomically(path, b"longer than the disk takes")
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"]
    with atomic_file(path, mode=0o600) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"]
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_fixed_temporary_name_reuses_the_file_of_a_killed_run(tmp_path: Path) -> None:
    beside = tmp_path / "state.new"
    beside.write_bytes(b"left by a run that was killed, and longer")
    write_atomically(tmp_path / "state", b"whole", beside=beside, sync=False)
    assert (tmp_path / "state").read_bytes() == b"whole"
    assert not beside.exists()


def test_an_existing_file_is_kept_when_it_must_not_be_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "answer.md"
    for content, is_free in ((b"first", True), (b"second", False)):
        try:
            with atomic_file(path, overwrite=False) as file:
                file.write(content)
            assert is_free
        except FileExistsError:
            assert not is_free
    assert path.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["answer.md"]


HOLDER = """
import sys
from pathlib import Path
from qwq_local.files import {lock}
with {lock}(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(lock: str, path: Path) -> Iterator[None]:
    """Another process holds the lock within the block and is killed at its end."""
    command = [sys.executable, "-c", HOLDER.format(lock=lock), str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("lock", [lock_file, lock_beside])
def test_a_lock_excludes_other_processes_and_ends_with_its_own(
    lock: Callable[[Path], AbstractContextManager[None]], tmp_path: Path
) -> None:
    path = tmp_path / "out.gguf"
    with (
        held_elsewhere(getattr(lock, "__name__", ""), path),
        pytest.raises(LockHeld, match=r"out\.gguf: another process is using it"),
        lock(path),
    ):
        pytest.fail("the lock was taken twice")
    with lock(path):
        pass


def test_the_lock_of_a_file_is_removed(tmp_path: Path) -> None:
    with lock_beside(tmp_path / "out.gguf"):
        assert [each.name for each in tmp_path.iterdir()] == ["out.gguf.lock"]
    assert list(tmp_path.iterdir()) == []


def test_a_partial_file_has_one_writer(tmp_path: Path) -> None:
    path = tmp_path / "out.partial"
    first, second = PartialFile(path), PartialFile(path)
    first.lock()
    with pytest.raises(LockHeld, match="another process is using it"):
        second.lock()
    first.publish(tmp_path / "out")
    first.close()
    # The lock is free, but the file has another name now.
    with pytest.raises(LockHeld):
        second.lock()
    second.close()


def test_holes_take_no_room_and_a_missing_folder_counts_for_its_parents_disk(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(10_000_000)
    assert files.allocated_bytes(sparse) < 1_000_000
    assert files.allocated_bytes(tmp_path / "none") == 0
    assert files.free_bytes(tmp_path / "not" / "there") > 0
