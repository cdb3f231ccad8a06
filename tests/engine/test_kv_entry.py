"""Entries of the KV store as files: damage is found before llama.cpp reads it, and room is made."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwq_local.engine.kv_entry import (
    PIECE_BYTES,
    DamagedEntry,
    EntryRecord,
    ModelIdentity,
    StateKey,
    append_trailer,
    checksum,
    clean_label,
    common_tokens,
    entry_name,
    packed,
    read_entry,
)
from qwq_local.engine.kv_store import KvFolder, KvStore, NoRoom
from qwq_local.engine.model import LoadedModel
from qwq_local.errors import Aborted, AbortFlag
from tests.conftest import load
from tests.engine.kv_programs import MIN_TOKENS, MODEL, SETTINGS, a_text, keep, prefill, restore
from tests.single_sequence import SingleSequence
from tests.tiny_models import constant_model

TAIL_BYTES = 16
KEY = StateKey.of(MODEL, SETTINGS)


@dataclass(frozen=True)
class Stored:
    """A real entry, its tokens, a context to read it into, and another entry's bytes."""

    model: LoadedModel
    context: SingleSequence
    tokens: list[int]
    name: str
    content: bytes
    other: bytes


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    folder = KvFolder(tmp_path_factory.mktemp("kv"), 1 << 30)
    path = constant_model(tmp_path_factory.mktemp("model"), "a")
    with closing(load(path)) as model, closing(SingleSequence(model, SETTINGS)) as context:
        tokens = a_text(model, 100)
        for text in (a_text(model, 90, "cat"), tokens):
            prefill(context, text)
            assert keep(KvStore(folder, min_tokens=MIN_TOKENS), context, text) == []
        entry, other = folder.entries()
        content = entry.path.read_bytes()
        yield Stored(model, context, tokens, entry.path.name, content, other.path.read_bytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> KvFolder:
    return KvFolder(tmp_path_factory.mktemp("damaged") / "kv", 1 << 30)


def tokens_from(folder: KvFolder, stored: Stored, content: bytes, name: str = "") -> tuple[int, bool]:
    """How many tokens the store restores from this entry alone, and whether the file is still there."""
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.path.mkdir(parents=True)
    path = folder.path / (name or stored.name)
    path.write_bytes(content)
    stored.context.truncate(0)
    return restore(KvStore(folder), stored.context, stored.tokens), path.exists()


def resealed(content: bytes, changes: Mapping[str, object]) -> bytes:
    """The entry with another record, its length and CRC-32 right."""
    length, _, magic = struct.unpack("<II8s", content[-TAIL_BYTES:])
    before, text = content[: -TAIL_BYTES - length], content[-TAIL_BYTES - length : -TAIL_BYTES]
    record = json.loads(text)
    for name, value in changes.items():
        place, _, key = name.rpartition(".")
        (record[place] if place else record)[key] = value
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    return before + text + struct.pack("<II8s", len(text), zlib.crc32(text), magic)


def test_the_whole_entry_is_read(stored: Stored, folder: KvFolder) -> None:
    """The undamaged entry of which every case is a damaged copy."""
    assert tokens_from(folder, stored, stored.content) == (100, True)
    assert tokens_from(folder, stored, resealed(stored.content, {})) == (100, True)


WITH_FIXTURES = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@WITH_FIXTURES
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_wrong_bit_anywhere_is_found(stored: Stored, folder: KvFolder, where: float, bit: int) -> None:
    content = bytearray(stored.content)
    content[int(where * len(content))] ^= 1 << bit
    assert tokens_from(folder, stored, bytes(content)) == (0, False)


@WITH_FIXTURES
@given(start=st.floats(0, 1), length=st.integers(1, 3000), put=st.binary(max_size=40))
def test_missing_or_misplaced_bytes_are_found(
    stored: Stored, folder: KvFolder, start: float, length: int, put: bytes
) -> None:
    """Cut at the end, in the middle, at the front; lengthened; another file's bytes in between."""
    at = int(start * len(stored.content))
    content = stored.content[:at] + put + stored.content[at + length :]
    if content != stored.content:
        assert tokens_from(folder, stored, content) == (0, False)


def test_bytes_between_the_state_and_the_trailer_are_found(stored: Stored, folder: KvFolder) -> None:
    length = struct.unpack("<II8s", stored.content[-TAIL_BYTES:])[0] + TAIL_BYTES
    content = stored.content[:-length] + b"\0" + stored.content[-length:]
    assert tokens_from(folder, stored, content) == (0, False)


@pytest.mark.parametrize("n_bytes", [0, 1, 15, 16, 17, 600])
def test_an_empty_or_tiny_file_is_found(stored: Stored, folder: KvFolder, n_bytes: int) -> None:
    assert tokens_from(folder, stored, stored.content[:n_bytes]) == (0, False)
    assert tokens_from(folder, stored, stored.content[-n_bytes:] if n_bytes else b"") == (0, False)
    assert tokens_from(folder, stored, bytes(n_bytes)) == (0, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"library": "0.3.35"},
        {"n_tokens": 99},
        {"n_tokens": -1},
        {"n_tokens": "100"},
        {"n_tokens": 10**30},
        {"state_bytes": 1},
        {"checksum": "0" * 64},
        {"prefill_token_s": float("nan")},
        {"prefill_token_s": 1},
        {"label": 7},
        {"label": "x" * 5000},
        {"unknown": 1},
        {"key": {}},
        {"key": None},
        {"key.model": "header"},
        {"key.model": {"header": "header"}},
        {"key.kv_type_k": ["f16"]},
        {"key.yarn_factor": 1},
        {"key.unknown": 1},
    ],
)
def test_a_record_of_another_version_or_kind_is_found(
    stored: Stored, folder: KvFolder, changes: dict[str, object]
) -> None:
    assert tokens_from(folder, stored, resealed(stored.content, changes)) == (0, False)


@pytest.mark.parametrize("changes", [{"key.kv_type_k": "q8_0"}, {"key.model": {"header": "x", "sha256": ""}}])
def test_an_entry_of_another_model_or_kv_type_is_left_alone(
    stored: Stored, folder: KvFolder, changes: dict[str, object]
) -> None:
    assert tokens_from(folder, stored, resealed(stored.content, changes)) == (0, True)


def test_swapped_files_are_found(stored: Stored, folder: KvFolder) -> None:
    assert tokens_from(folder, stored, stored.other) == (0, False)
    assert tokens_from(folder, stored, stored.content, "0" * 32 + ".kv") == (0, False)


def test_files_with_other_names_are_left_alone(stored: Stored, folder: KvFolder) -> None:
    for name in ("notes.kv", stored.name.upper(), "0" * 32, "0" * 32 + ".kv.old"):
        assert tokens_from(folder, stored, b"precious", name) == (0, True)
    (folder.path / "target").write_bytes(stored.content)
    (folder.path / stored.name).symlink_to(folder.path / "target")
    (folder.path / ("1" * 32 + ".kv")).mkdir()
    assert folder.entries() == []
    assert (folder.path / stored.name).is_symlink()


@given(st.lists(st.integers(-1, 2), max_size=40), st.lists(st.integers(-1, 2), max_size=40))
def test_the_common_beginning_is_counted_in_tokens(a: list[int], b: list[int]) -> None:
    alike = [left == right for left, right in zip(a, b, strict=False)]
    expected = [*alike, False].index(False)
    assert common_tokens(packed(a), packed(b)) == expected


def test_the_key_of_an_unscaled_context_ignores_what_only_scaling_reads() -> None:
    origin = replace(SETTINGS, yarn_origin=512, is_linear=True, n_ctx=64, n_batch=8, n_ubatch=8, threads=9)
    assert StateKey.of(MODEL, origin) == KEY
    assert StateKey.of(MODEL, replace(origin, yarn_factor=2.0)) != KEY


def test_models_match_by_content_if_both_know_it_else_by_header() -> None:
    known, copied = ModelIdentity("a", "1"), ModelIdentity("b", "1")
    assert known.is_same(copied)
    assert known.is_same(ModelIdentity("a"))
    assert not known.is_same(ModelIdentity("b"))
    assert not known.is_same(ModelIdentity("a", "2"))


def test_a_label_is_fit_for_a_terminal() -> None:
    assert clean_label("Q\x1b[31mW\nQ" + "x" * 99) == "Q [31mW Q" + "x" * 55


@pytest.mark.parametrize("n_bytes", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES - 1])
def test_the_checksum_is_of_the_bytes_and_their_order(tmp_path: Path, n_bytes: int) -> None:
    file, changed = tmp_path / "file", tmp_path / "changed"
    content = bytes(range(256)) * (n_bytes // 256 + 1)
    file.write_bytes(content[:n_bytes] + b"what follows does not count")
    expected = checksum(file, n_bytes)
    file.write_bytes(content[:n_bytes])
    assert checksum(file, n_bytes) == expected
    assert checksum(file, n_bytes + 1) != expected
    if n_bytes > PIECE_BYTES:
        changed.write_bytes(content[1:n_bytes] + content[:1])
        assert checksum(changed, n_bytes) != expected
    abort = AbortFlag()
    abort.set()
    if n_bytes:
        with pytest.raises(Aborted):
            checksum(file, n_bytes, abort)


def an_entry(folder: KvFolder, number: int, state_bytes: int, used_s: float) -> Path:
    """A whole entry whose state llama.cpp could not read."""
    with folder.new_file() as path:
        tokens = packed([number])
        head = struct.pack("<III", 0x67677371, 3, 1)
        path.write_bytes((head + tokens).ljust(state_bytes, b"\0"))
        append_trailer(path, EntryRecord(KEY, "QwQ", 1, 0.0, state_bytes, checksum(path, state_bytes)))
        made = path.rename(folder.path / entry_name(KEY, tokens))
    os.utime(made, (used_s, used_s))
    return made


def test_the_least_recently_used_entry_makes_room(tmp_path: Path) -> None:
    folder = KvFolder(tmp_path / "kv", 100_000)
    made = [an_entry(folder, number, 20_000, used) for number, used in enumerate((400, 100, 300, 200))]
    total = sum(entry.file_bytes for entry in folder.entries())
    folder.make_room(100_000 - total)
    assert all(path.exists() for path in made)
    folder.make_room(100_000 - total + 1)
    assert [path.exists() for path in made] == [True, False, True, True]
    folder.make_room(70_000)
    assert [path.exists() for path in made] == [True, False, False, False]
    with pytest.raises(NoRoom, match=r"--set kv_store"):
        folder.make_room(100_001)
    assert made[0].exists()


def test_the_limit_is_a_tenth_of_the_disk_that_would_be_free_without_the_store(tmp_path: Path) -> None:
    folder = KvFolder(tmp_path / "not" / "there")
    free = shutil.disk_usage(tmp_path).free
    assert folder.limit() == pytest.approx(free / 10, rel=0.05)
    assert not folder.path.exists()
    before = folder.limit()
    an_entry(folder, 1, 50_000_000, 1)
    assert folder.limit() == pytest.approx(before, rel=0.05)
    with pytest.raises(NoRoom):
        folder.make_room(free)


def test_an_entry_that_vanishes_while_it_is_listed_is_skipped(tmp_path: Path) -> None:
    folder = KvFolder(tmp_path / "kv", 100_000)
    made = an_entry(folder, 1, 1_000, 1)
    entry = read_entry(made)
    made.unlink()
    with pytest.raises(FileNotFoundError):
        entry.verify()
    with pytest.raises(FileNotFoundError):
        read_entry(made)
    assert folder.entries() == []


def test_a_checksum_of_another_content_is_damage(tmp_path: Path) -> None:
    folder = KvFolder(tmp_path / "kv", 100_000)
    entry = read_entry(an_entry(folder, 1, 1_000, 1))
    with entry.path.open("r+b") as file:
        file.seek(999)
        file.write(b"\1")
    with pytest.raises(DamagedEntry):
        entry.verify()
