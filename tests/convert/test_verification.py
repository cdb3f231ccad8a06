"""The header reader and the verifier: agreement with the gguf package, cost, and damaged files."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from qwq_convert.gguf_file import CHUNK_ELEMENTS, read_header, read_parts
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest
from qwq_convert.verification import surplus_bytes, verify_blocks, verify_placement, verify_structure

from qwq_local.engine.model import LoadSettings, drained, load_model
from qwq_local.errors import AbortFlag, ConvertError, ModelFileError
from tests.checkpoints import CheckpointSpec, write_checkpoint


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    source = write_checkpoint(folder / "model", CheckpointSpec(hidden_size=32, n_heads=2, n_layers=1))
    return run_conversion(ConvertRequest(source, "Q8_0", folder / "model.gguf"))


def test_a_header_reads_like_the_gguf_packages(converted: Path) -> None:
    ours, reference = read_header(converted), GGUFReader(converted)
    expected = {key: field.contents() for key, field in reference.fields.items() if key[:5] != "GGUF."}
    assert {key: ours.value(key) for key in ours.keys} == expected
    assert ours.data_start == reference.data_offset
    assert [
        (t.name, int(t.kind), t.shape[::-1], ours.data_start + t.offset, t.n_bytes) for t in ours.tensors
    ] == [
        (t.name, int(t.tensor_type), tuple(t.shape.tolist()), t.data_offset, t.n_bytes)
        for t in reference.tensors
    ]


def test_a_whole_file_is_verified_block_by_block(converted: Path) -> None:
    progress = list(verify_blocks([read_header(converted)], threads=1))
    assert [each.bytes_done for each in progress][-1] == progress[0].bytes_total
    assert {each.tensor for each in progress} == {tensor.name for tensor in read_header(converted).tensors}


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0"])
def test_one_damaged_block_anywhere_is_found(file_type: str, tmp_path: Path) -> None:
    """A scale or value that is not a number, in the first and in the last block of a tensor."""
    source = write_checkpoint(tmp_path / "model")
    path = run_conversion(ConvertRequest(source, file_type, tmp_path / "model.gguf"))
    whole = path.read_bytes()
    header = read_header(path)
    tensor = next(tensor for tensor in header.tensors if tensor.name == "blk.1.ffn_down.weight")
    block = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34}[file_type]
    for start in (0, tensor.n_bytes - block):
        at = header.data_start + tensor.offset + start
        nan = b"\xff\xff\xff\x7f" if file_type == "F32" else b"\xff\x7f"
        path.write_bytes(whole[:at] + nan + whole[at + len(nan) :])
        read_header(path)
        with pytest.raises(ConvertError, match=r"blk\.1\.ffn_down\.weight has a damaged block"):
            list(verify_blocks([read_header(path)], threads=1))


def test_a_file_cut_anywhere_is_found(converted: Path, tmp_path: Path) -> None:
    whole = converted.read_bytes()
    data_start = read_header(converted).data_start
    cuts = [*range(64), *range(64, data_start, 997), data_start, len(whole) - 32]
    for cut in cuts:
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:cut])
        with pytest.raises(ConvertError) as caught:
            read_header(path)
        assert "\n" not in str(caught.value), cut


def test_a_large_vocabulary_is_read_without_a_call_per_token(tmp_path: Path) -> None:
    """152,064 tokens and as many merges; none is decoded before it is needed."""
    path = tmp_path / "large.gguf"
    writer = GGUFWriter(path, "qwen2")
    writer.add_token_list([f"token{token}" for token in range(152064)])
    writer.add_token_types([1] * 152064)
    writer.add_token_merges([f"to ken{token}" for token in range(152064)])
    writer.add_name("large")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert python_calls(lambda: read_header(path)) < 500
    tokens = read_header(path).value("tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    assert (len(tokens), tokens[-1]) == (152064, "token152063")


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def head(n_tensors: int, n_fields: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_fields)


def field(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entry(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


STRING, ARRAY, U32 = 8, 9, 4
PADDING = bytes(4096)
BAD_FILES = {
    "nothing": (b"", "is empty"),
    "another format": (b"GGML" + PADDING, "is not a GGUF file"),
    "another version": (head(0, 0, version=2), "has GGUF version 2"),
    "the other byte order": (b"GGUF" + struct.pack(">I", 3) + PADDING, "has GGUF version 50331648"),
    "too many tensors": (head(2**63, 0) + PADDING, "entries do not fit"),
    "too many keys": (head(0, 2**64 - 1) + PADDING, "entries do not fit"),
    "a key without end": (head(0, 1) + struct.pack("<Q", 2**63) + PADDING, "at most 65535 are allowed"),
    "a key that is not UTF-8": (head(0, 1) + field(b"\xff", U32, bytes(4)) + PADDING, "not UTF-8"),
    "a key given twice": (head(0, 2) + field(b"a", U32, bytes(4)) * 2 + PADDING, "'a' appears twice"),
    "an unknown value type": (head(0, 1) + field(b"a", 13, b"") + PADDING, "unknown type 13"),
    "a text without end": (head(0, 1) + field(b"a", STRING, b"\xff" * 8) + PADDING, "in the middle"),
    "an array of arrays": (
        head(0, 1) + field(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1)) + PADDING,
        "an array holds arrays",
    ),
    "an array without end": (
        head(0, 1) + field(b"a", ARRAY, struct.pack("<IQ", U32, 2**62)) + PADDING,
        "in the middle",
    ),
    "texts without end": (
        head(0, 1) + field(b"a", ARRAY, struct.pack("<IQ", STRING, 2**62)) + PADDING,
        "longer than the file",
    ),
    "no alignment": (head(0, 1) + field(b"general.alignment", U32, bytes(4)), "alignment 0 is no power"),
    "an alignment that is a text": (
        head(0, 1) + field(b"general.alignment", STRING, text(b"32")),
        "alignment is no 32-bit number",
    ),
    "a long tensor name": (head(1, 0) + entry(b"a" * 64, (1,)) + PADDING, "at most 63"),
    "no dimensions": (head(1, 0) + entry(b"a", ()) + PADDING, "has 0 dimensions"),
    "five dimensions": (head(1, 0) + entry(b"a", (1,) * 5) + PADDING, "has 5 dimensions"),
    "two tensors of one name": (head(2, 0) + entry(b"a", (1,)) * 2 + PADDING, "'a' appears twice"),
    "an unknown tensor type": (head(1, 0) + entry(b"a", (1,), kind=4) + PADDING, "unknown type 4"),
    "a size of nothing": (head(1, 0) + entry(b"a", (0,)) + PADDING, "impossible shape"),
    "a size beyond all": (head(1, 0) + entry(b"a", (2**62, 2**62)) + PADDING, "impossible shape"),
    "half a block": (head(1, 0) + entry(b"a", (33,), kind=8) + PADDING, "impossible shape"),
    "an offset out of line": (head(1, 0) + entry(b"a", (1,), offset=4) + PADDING, "or offset"),
    "an offset beyond the file": (head(1, 0) + entry(b"a", (1,), offset=2**63) + PADDING, "is cut short"),
    "tensors on each other": (
        head(2, 0) + entry(b"a", (32,)) + entry(b"b", (32,)) + PADDING,
        "'b' overlaps another",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_gguf_header_is_one_line_that_names_the_file(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ConvertError) as caught:
        read_header(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert message in line
    assert "\n" not in line


@settings(max_examples=300)
@given(position=st.integers(0), replacement=st.binary(min_size=1, max_size=9), cut=st.integers(0))
def test_a_damaged_header_never_ends_in_anything_but_a_convert_error(
    converted: Path,
    tmp_path_factory: pytest.TempPathFactory,
    position: int,
    replacement: bytes,
    cut: int,
) -> None:
    """A file that is overwritten and cut anywhere opens or is refused, within memory tied to its size."""
    whole = converted.read_bytes()
    position %= read_header(converted).data_start
    damaged = whole[:position] + replacement + whole[position + len(replacement) :]
    path = tmp_path_factory.mktemp("fuzz") / "damaged.gguf"
    path.write_bytes(damaged[: cut % len(whole)] if cut % 2 else damaged)
    tracemalloc.start()
    with suppress(ConvertError):
        header = read_header(path)
        for key in header.keys:
            header.value(key)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * len(whole)


def test_an_unplanned_tensor_type_is_found(tmp_path: Path) -> None:
    """The plan is compared with the file itself, not with what the writer reports."""
    from qwq_convert.file_types import QuantType
    from qwq_convert.layout import FileLayout, PlannedTensor
    from qwq_convert.safetensors import SourceTensor

    path = tmp_path / "one.gguf"
    path.write_bytes(head(1, 0) + entry(b"a", (32,)) + PADDING)
    source = SourceTensor("a", "F32", (32,), "model.safetensors", 0, 128)
    planned = PlannedTensor("a", QuantType.F16, source, 0, 64)
    with pytest.raises(ConvertError, match="planned was"):
        verify_structure(path, FileLayout((planned,), 64))
    with pytest.raises(ConvertError, match="holds 1 tensors, planned were 0"):
        verify_structure(path, FileLayout((), 0))


# Several files, and the requirements of llama.cpp.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(hidden_size=256, intermediate_size=512)
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", spec)


@pytest.fixture
def split(checkpoint: Path, tmp_path: Path) -> list[Path]:
    request = ConvertRequest(checkpoint, "Q8_0", tmp_path / "model.gguf", split_max_bytes=600_000)
    run_conversion(request)
    paths = sorted(tmp_path.glob("model-*.gguf"))
    assert len(paths) > 2
    return paths


def test_all_parts_of_a_split_model_are_read_as_one(split: list[Path]) -> None:
    parts = read_parts(split[0])
    assert [part.path for part in parts] == split
    assert list(verify_blocks(parts, threads=2))[-1].bytes_done == sum(
        tensor.n_bytes for part in parts for tensor in part.tensors
    )


def test_parts_that_do_not_belong_together_are_refused(split: list[Path]) -> None:
    with pytest.raises(ConvertError, match="name the first, ending in -00001-of-"):
        read_parts(split[1])
    second, third = (path.read_bytes() for path in split[1:3])
    split[1].write_bytes(third)
    with pytest.raises(ConvertError, match="says it is part 2, should be 1"):
        read_parts(split[0])
    split[1].unlink()
    with pytest.raises(ConvertError, match=f"{split[1].name}: cannot be read"):
        read_parts(split[0])
    key = b"split.no" + struct.pack("<I", 2)
    assert key in third
    number = third.index(key) + len(key)
    split[1].write_bytes(third[:number] + struct.pack("<H", 1) + third[number + 2 :])
    with pytest.raises(ConvertError, match=f"is in {split[1].name} too"):
        read_parts(split[0])
    split[1].write_bytes(second)
    read_parts(split[0])


def test_the_number_of_a_damaged_block_counts_from_the_start_of_its_tensor(tmp_path: Path) -> None:
    """In a tensor of three chunks, in the middle one and in the last block."""
    spec = CheckpointSpec(hidden_size=256, n_layers=1, intermediate_size=2**13 + 512)
    path = tmp_path / "model.gguf"
    run_conversion(ConvertRequest(write_checkpoint(tmp_path / "model", spec), "Q8_0", path))
    header = read_header(path)
    tensor = next(tensor for tensor in header.tensors if tensor.name == "blk.0.ffn_up.weight")
    n_blocks = tensor.n_bytes // 34
    assert n_blocks * 32 > 2 * CHUNK_ELEMENTS
    whole = path.read_bytes()
    for block in (CHUNK_ELEMENTS // 32 + 77, n_blocks - 1):
        at = header.data_start + tensor.offset + 34 * block
        path.write_bytes(whole[:at] + b"\xff\x7f" + whole[at + 2 :])
        with pytest.raises(ConvertError, match=f"ffn_up.weight has a damaged block, number {block:,}, "):
            list(verify_blocks([read_header(path)], threads=1))


def test_a_gap_between_tensors_is_refused_as_llama_cpp_refuses_it(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    run_conversion(ConvertRequest(checkpoint, "F32", path))
    whole, header = path.read_bytes(), read_header(path)
    verify_placement(header)
    last = header.tensors[-1]
    listed = struct.pack("<QIQ", last.shape[0], last.kind, last.offset)
    assert whole.count(listed) == 1
    moved = whole.replace(listed, struct.pack("<QIQ", last.shape[0], last.kind, last.offset + 32))
    path.write_bytes(moved + bytes(32))
    with pytest.raises(ConvertError, match=r"llama\.cpp would refuse it"):
        verify_placement(read_header(path))
    with pytest.raises(ModelFileError, match=r"llama\.cpp refuses"):
        drained(load_model(path, LoadSettings(), AbortFlag()))
    path.write_bytes(whole + bytes(100))
    assert (surplus_bytes(header), surplus_bytes(read_header(path))) == (0, 100)


def python_calls(action: Callable[[], object]) -> int:
    """How many Python functions `action` calls."""
    count = 0

    def see(_frame: FrameType, kind: str, _argument: object) -> None:
        nonlocal count
        count += kind == "call"

    sys.setprofile(see)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count
