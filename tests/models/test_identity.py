"""The identity of weights: by header, size and time at once; by content once it is known or computed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from qwq_local.models.header import Header, read_header
from qwq_local.models.identity import ModelIdentities
from tests.tiny_models import constant_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return constant_model(tmp_path_factory.mktemp("model"), "a")


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy2(made, tmp_path / "model.gguf"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "identities"


@pytest.fixture
def identities(folder: Path) -> Iterator[ModelIdentities]:
    made = ModelIdentities(folder)
    yield made
    made.close()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def learn(folder: Path, header: Header) -> None:
    """Compute every missing digest, as a long run does."""
    identities = ModelIdentities(folder)
    identities.learn(header)
    worker = identities._worker
    if worker is not None:
        worker.join()


def split_model(folder: Path) -> list[Path]:
    """A GGUF in two parts, of a tensor each, by the gguf package."""
    writer = GGUFWriter(folder / "parts.gguf", "qwen2", split_max_tensors=1)
    for name in ("a", "b"):
        writer.add_tensor(name, np.ones((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("parts-*.gguf"))


def test_a_file_is_identified_at_once_by_header_size_and_time(
    model: Path, identities: ModelIdentities
) -> None:
    first = identities.of(read_header(model))
    assert first.sha256 == ""
    assert identities.of(read_header(model)) == first
    moved = model.rename(model.with_name("moved.gguf"))
    assert identities.of(read_header(moved)) == first


@pytest.mark.parametrize("changed", ["time", "size", "header"])
def test_another_header_size_or_time_is_another_model(model: Path, folder: Path, changed: str) -> None:
    before, status = ModelIdentities(folder).of(read_header(model)), model.stat()
    content = bytearray(model.read_bytes())
    if changed == "size":
        content += b"\0"
    if changed == "header":
        at = content.index(b"general.name") + 24
        content[at : at + 1] = b"X"
    model.write_bytes(content)
    moment = status.st_mtime_ns + (1 if changed == "time" else 0)
    os.utime(model, ns=(moment, moment))
    assert not ModelIdentities(folder).of(read_header(model)).is_same(before)


def test_the_content_is_computed_once_and_kept_for_the_next_run(model: Path, folder: Path) -> None:
    header = read_header(model)
    learn(folder, header)
    assert ModelIdentities(folder).of(header).sha256 == sha256(model)
    assert folder.stat().st_mode & 0o777 == 0o700
    (file,) = folder.iterdir()
    written = file.stat().st_mtime_ns
    learn(folder, header)
    assert file.stat().st_mtime_ns == written
    copied = Path(shutil.copy(model, model.with_name("copy.gguf")))
    learn(folder, read_header(copied))
    identities = ModelIdentities(folder)
    assert identities.of(read_header(copied)).is_same(identities.of(header))


def test_a_changed_file_does_not_keep_its_digest(model: Path, folder: Path) -> None:
    learn(folder, read_header(model))
    content, before = bytearray(model.read_bytes()), model.stat().st_mtime_ns
    content[-1] ^= 1
    model.write_bytes(content)
    # Two writes within a tick of the system's clock have the same time.
    os.utime(model, ns=(before + 1, before + 1))
    assert ModelIdentities(folder).of(read_header(model)).sha256 == ""


@pytest.mark.parametrize("written", [b"", b"0" * 63, b"0" * 65, b"G" * 64, b"\xff" * 64], ids=range(5))
def test_a_damaged_record_is_ignored(model: Path, folder: Path, written: bytes) -> None:
    header = read_header(model)
    learn(folder, header)
    next(folder.iterdir()).write_bytes(written)
    assert ModelIdentities(folder).of(header).sha256 == ""
    learn(folder, header)
    assert ModelIdentities(folder).of(header).sha256 == sha256(model)


@pytest.mark.parametrize("name", ["{}", "sha256-{}"])
def test_a_cache_that_names_files_by_content_is_trusted(
    model: Path, identities: ModelIdentities, folder: Path, tmp_path: Path, name: str
) -> None:
    """As the caches of Hugging Face and of ollama do; the first links to its blobs under readable names."""
    digest = sha256(model)
    (tmp_path / "blobs").mkdir()
    blob = model.rename(tmp_path / "blobs" / name.format(digest))
    link = tmp_path / "snapshot.gguf"
    link.symlink_to(blob)
    for path in (blob, link):
        assert identities.of(read_header(path)).sha256 == digest
    identities.learn(read_header(link))
    assert identities._worker is None


def test_a_blob_with_another_name_or_place_is_not_trusted(
    model: Path, identities: ModelIdentities, tmp_path: Path
) -> None:
    for folder, name in (("blobs", "0" * 40), ("files", "0" * 64), ("blobs", "0" * 64 + ".incomplete")):
        (tmp_path / folder).mkdir(exist_ok=True)
        model = model.rename(tmp_path / folder / name)
        assert identities.of(read_header(model)).sha256 == ""


def test_the_digest_of_a_verified_download_can_be_recorded(model: Path, identities: ModelIdentities) -> None:
    identities.record(model, "a" * 64)
    assert identities.of(read_header(model)).sha256 == "a" * 64


def test_hashing_stops_on_request_and_leaves_nothing(
    model: Path, identities: ModelIdentities, folder: Path
) -> None:
    identities._stop.set()
    identities.learn(read_header(model))
    identities.close()
    assert identities.of(read_header(model)).sha256 == ""
    assert not folder.exists()


def test_a_split_model_is_identified_by_all_its_parts(tmp_path: Path, folder: Path) -> None:
    first, second = split_model(tmp_path)
    before = ModelIdentities(folder).of(read_header(first))
    learn(folder, read_header(first))
    known = ModelIdentities(folder).of(read_header(first))
    assert known.is_same(before)
    assert known.sha256 == hashlib.sha256((sha256(first) + sha256(second)).encode()).hexdigest()
    os.utime(second, (1, 1))
    changed = ModelIdentities(folder).of(read_header(first))
    assert not changed.is_same(before)
    assert changed.sha256 == ""


def test_a_folder_that_cannot_be_written_is_not_an_error(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    learn(tmp_path / "file" / "identities", read_header(model))
    assert ModelIdentities(tmp_path / "file" / "identities").of(read_header(model)).sha256 == ""
