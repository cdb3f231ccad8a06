"""Checkpoints that are cut, damaged or hostile: each gives one line that names the file."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qwq_convert.checkpoint import CheckpointFolder
from qwq_convert.safetensors import Shard
from qwq_convert.strict_json import parse_object

from qwq_local.errors import ConvertError
from tests.checkpoints import (
    INDEX,
    CheckpointSpec,
    StoredTensor,
    write_checkpoint,
    write_json,
    write_safetensors,
)

FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
# What is wrong: the header, the number of bytes after it, a part of the message.
BAD_HEADERS = {
    "a list": ([], 0, "not a JSON object"),
    "a tensor that is a number": ({"a": 1}, 4, "expected an object"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "unknown dtype"),
    "an unknown dtype": ({"a": FOUR | {"dtype": "F4"}}, 4, "unknown dtype"),
    "a dtype that is a list": ({"a": FOUR | {"dtype": ["F32"]}}, 4, "expected a text"),
    "a negative size": ({"a": FOUR | {"shape": [-1]}}, 4, "shape holds -1"),
    "a size that is true": ({"a": FOUR | {"shape": [True]}}, 4, "shape holds True"),
    "a size that is a fraction": ({"a": FOUR | {"shape": [1.0]}}, 4, "shape holds 1.0"),
    "a size beyond 64 bits": ({"a": FOUR | {"shape": [2**64]}}, 4, "shape holds 18446744073709551616"),
    "sizes whose product overflows": ({"a": FOUR | {"shape": [2**62, 2**62]}}, 4, "do not fit its shape"),
    "a shape that is a text": ({"a": FOUR | {"shape": "1"}}, 4, "expected a list"),
    "too many dimensions": ({"a": FOUR | {"shape": [1] * 9}}, 4, "damaged shape"),
    "a negative offset": ({"a": FOUR | {"data_offsets": [-4, 0]}}, 4, "data_offsets holds -4"),
    "one offset": ({"a": FOUR | {"data_offsets": [4]}}, 4, "damaged shape or data_offsets"),
    "an end before its begin": ({"a": FOUR | {"data_offsets": [4, 0]}}, 4, "has -4 bytes"),
    "bytes that do not fit the shape": ({"a": FOUR | {"data_offsets": [0, 8]}}, 8, "do not fit its shape"),
    "two tensors in one place": ({"a": FOUR, "b": FOUR}, 4, "overlaps another"),
    "a gap between tensors": ({"a": FOUR, "b": FOUR | {"data_offsets": [8, 12]}}, 12, "leaves a gap"),
    "a gap before the first tensor": ({"a": FOUR | {"data_offsets": [4, 8]}}, 8, "leaves a gap"),
    "data that is cut": ({"a": FOUR}, 3, "its header describes"),
    "data that goes on": ({"a": FOUR}, 5, "its header describes"),
    "an offset far beyond the file": ({"a": FOUR | {"data_offsets": [2**62, 2**62 + 4]}}, 4, "leaves a gap"),
}
BAD_BYTES = {
    "an empty file": (b"", "has 0 bytes"),
    "half a length": (b"\x10\0\0", "has 3 bytes"),
    "a length beyond the file": ((2**40).to_bytes(8, "little") + b"{}", "asks for a header of 1099511627776"),
    "the largest length": (b"\xff" * 8 + b"{}", "asks for a header of 18446744073709551615"),
    "no JSON": (b"\x04" + b"\0" * 7 + b"{{{{", "not valid JSON"),
    "no UTF-8": (b"\x02" + b"\0" * 7 + b"\xff\xfe", "not valid JSON"),
    "a key given twice": (b"\x0d" + b"\0" * 7 + b'{"a":1,"a":1}', "'a' appears twice"),
    "nesting without end": ((60000).to_bytes(8, "little") + b"[" * 60000, "nested too deeply"),
    "a number without end": ((6000).to_bytes(8, "little") + b"1" * 6000, "not valid JSON"),
    "not a number": (b"\x09" + b"\0" * 7 + b'{"a":NaN}', "NaN is not a JSON number"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_safetensors_header_is_one_line_that_names_the_file(case: str, tmp_path: Path) -> None:
    header, n_bytes, message = BAD_HEADERS[case]
    encoded = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(n_bytes))
    assert_refused(path, message)


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bytes_that_are_not_a_header_are_one_line_that_names_the_file(case: str, tmp_path: Path) -> None:
    content, message = BAD_BYTES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert_refused(path, message)


@settings(max_examples=150)
@given(position=st.integers(0, 700), replacement=st.binary(min_size=1, max_size=9), cut=st.integers(0, 900))
def test_a_damaged_shard_never_ends_in_anything_but_a_convert_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, replacement: bytes, cut: int
) -> None:
    """A shard that is overwritten and cut anywhere opens or is refused, within memory tied to its size."""
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    tensors = {f"layer.{place}": StoredTensor("F32", (2, 3), bytes(24)) for place in range(6)}
    write_safetensors(path, tensors)
    content = path.read_bytes()
    position %= len(content)
    damaged = content[:position] + replacement + content[position + len(replacement) :]
    path.write_bytes(damaged[: len(damaged) - cut % len(damaged) if cut > 450 else None])
    tracemalloc.start()
    with suppress(ConvertError), Shard(path) as shard:
        assert all(tensor.offset + tensor.n_bytes <= len(damaged) for tensor in shard.tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "a\0b", "C:x", "é" * 128],
)
def test_an_index_that_points_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CheckpointSpec(n_shards=2))
    write_json(folder / INDEX, {"weight_map": {"model.norm.weight": name}})
    with pytest.raises(ConvertError, match=r"model\.safetensors\.index\.json.* is no file name"):
        CheckpointFolder(folder)


def test_missing_shards_are_named_and_counted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CheckpointSpec(n_shards=4))
    (folder / "model-00002-of-00004.safetensors").unlink()
    (folder / "model-00004-of-00004.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"model-00002-of-00004.safetensors and 1 more missing"):
        CheckpointFolder(folder)


def test_a_shard_cut_by_one_byte_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CheckpointSpec(n_shards=3))
    path = folder / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConvertError, match=r"model-00003-of-00003.safetensors: has .* its header describes"):
        CheckpointFolder(folder)


def test_an_index_and_shards_that_disagree_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CheckpointSpec(n_shards=2))
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_json(folder / INDEX, {"weight_map": weight_map | {"extra": "model-00001-of-00002.safetensors"}})
    with pytest.raises(ConvertError, match=r"model-00001-of-00002.safetensors: 'extra' is missing"):
        CheckpointFolder(folder)
    swapped = dict.fromkeys(weight_map, "model-00002-of-00002.safetensors")
    write_json(folder / INDEX, {"weight_map": swapped | {"model.norm.weight": min(weight_map.values())}})
    with pytest.raises(ConvertError, match=r"does not place"):
        CheckpointFolder(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CheckpointSpec(n_shards=2))
    one, two = (folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    two.write_bytes(one.read_bytes())
    with pytest.raises(ConvertError, match=r"model-00002.*is in model-00001"):
        CheckpointFolder(folder)


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CheckpointSpec(n_shards=2))
    (folder / INDEX).unlink()
    with pytest.raises(ConvertError, match=r"index.json is missing for 2 shards"):
        CheckpointFolder(folder)


def test_a_folder_without_weights_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"no \*.safetensors file"):
        CheckpointFolder(tmp_path)
    with pytest.raises(ConvertError, match=r"no such file or folder"):
        CheckpointFolder(tmp_path / "none")


def test_a_cache_snapshot_has_the_name_of_its_repository(tmp_path: Path) -> None:
    """Files of a snapshot are links out of their folder, which must be followed."""
    source = write_checkpoint(tmp_path / "source")
    snapshot = tmp_path / "models--Qwen--QwQ-32B" / "snapshots" / ("0a" * 20)
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    with CheckpointFolder(snapshot) as checkpoint:
        assert checkpoint.label == "Qwen/QwQ-32B"
        assert len(checkpoint.tensors) == 27


def test_bytes_outside_a_tensor_are_not_read(tmp_path: Path) -> None:
    with CheckpointFolder(write_checkpoint(tmp_path / "model")) as checkpoint:
        tensor = checkpoint.tensors["model.norm.weight"]
        assert len(checkpoint.read(tensor, 0, tensor.n_bytes)) == 128
        with pytest.raises(ValueError, match=r"which has 128"):
            checkpoint.read(tensor, 64, 65)


def test_a_file_cut_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    with CheckpointFolder(folder) as checkpoint:
        tensor = checkpoint.tensors["lm_head.weight"]
        (folder / "model.safetensors").write_bytes(b"")
        with pytest.raises(ConvertError, match=r"model.safetensors: ends too early"):
            checkpoint.read(tensor, 0, tensor.n_bytes)


def test_fields_are_read_with_their_type_or_refused() -> None:
    fields = parse_object(b'{"n":5,"x":1.5,"b":true,"t":"a","huge":1e999,"half":"\\ud800"}', "f.json")
    assert (fields.integer("n"), fields.optional_number("x"), fields.flag("b")) == (5, 1.5, True)
    assert (fields.optional_text("t"), fields.optional_integer("none")) == ("a", None)
    for refused in (
        lambda: fields.integer("x"),
        lambda: fields.integer("b"),
        lambda: fields.integer("n", most=4),
        lambda: fields.integer("none"),
        lambda: fields.optional_number("huge"),
        lambda: fields.optional_text("half"),
        lambda: fields.optional_text("n"),
        lambda: fields.flag("n"),
        lambda: fields.items("t"),
        lambda: fields.optional_object("t"),
    ):
        with pytest.raises(ConvertError, match=r"^f\.json: "):
            refused()


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(ConvertError) as caught:
        Shard(path)
    text = str(caught.value)
    assert text.startswith("model.safetensors: ")
    assert message in text
    assert "\n" not in text
