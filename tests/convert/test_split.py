"""Models in several files: their names and keys, and that llama.cpp reads them as one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGUFValueType as ValueType
from qwq_convert.gguf_file import GgufHeader, read_header, read_parts
from qwq_convert.pipeline import ConversionDone, ConversionRestarted, TensorDone, convert, run_conversion
from qwq_convert.plan import ConvertRequest

from qwq_local.errors import ConvertError
from tests.checkpoints import CheckpointSpec, write_checkpoint
from tests.command import ROOT
from tests.convert.quantizer import QuantizeOptions, llama_quantize

MINIATURE = ROOT / "miniature" / "checkpoint"
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", CheckpointSpec(n_layers=4))


@pytest.fixture
def request_(folder: Path) -> ConvertRequest:
    return ConvertRequest(folder, "BF16", folder.parent / "out.gguf", split_max_bytes=100_000)


def test_the_parts_have_the_names_that_llama_cpp_looks_for(request_: ConvertRequest) -> None:
    *_, finished = convert(request_)
    assert isinstance(finished, ConversionDone)
    names = [f"out-0000{number}-of-00004.gguf" for number in range(1, 5)]
    assert [path.name for path in finished.paths] == names
    assert sorted(path.name for path in request_.out.parent.iterdir()) == ["model", *names]
    assert finished.n_bytes == sum(path.stat().st_size for path in finished.paths)
    assert run_conversion(replace(request_, out=request_.out.with_name("again.gguf"))).name == (
        "again-00001-of-00004.gguf"
    )


def test_the_first_part_has_the_key_values_and_each_says_which_it_is(request_: ConvertRequest) -> None:
    parts = converted_parts(request_)
    whole = read_header(run_conversion(replace(request_, split_max_bytes=None)))
    assert parts[0].keys == (*whole.keys, *SPLIT_KEYS)
    for key in whole.keys:
        assert parts[0].encoded(key) == whole.encoded(key), key
    for number, part in enumerate(parts):
        assert part.keys[-3:] == SPLIT_KEYS
        assert [part.kinds(key)[0] for key in SPLIT_KEYS] == [ValueType.UINT16] * 2 + [ValueType.INT32]
        assert [part.value(key) for key in SPLIT_KEYS] == [number, len(parts), len(whole.tensors)]
    assert all(part.keys == SPLIT_KEYS for part in parts[1:])


def test_the_parts_have_all_tensors_in_order_within_the_size(
    request_: ConvertRequest,
) -> None:
    """A part is full when the next tensor would exceed the size; a larger tensor gets a part of its own."""
    parts = converted_parts(request_)
    whole = read_header(run_conversion(replace(request_, split_max_bytes=None)))
    tensors = [tensor for part in parts for tensor in part.tensors]
    assert [tensor.name for tensor in tensors] == [tensor.name for tensor in whole.tensors]
    sizes = [part.file_bytes - part.data_start for part in parts]
    assert all(size <= 100_000 for size in sizes)
    for size, following in zip(sizes, parts[1:], strict=False):
        assert size + following.tensors[0].n_bytes > 100_000
    assert b"".join(map(tensor_bytes, parts)) == tensor_bytes(whole)
    single = converted_parts(replace(request_, out=request_.out.with_name("one.gguf"), split_max_bytes=1))
    assert [len(part.tensors) for part in single] == [1] * len(tensors)


def test_a_model_that_fits_into_one_file_has_its_plain_name(request_: ConvertRequest) -> None:
    assert run_conversion(replace(request_, split_max_bytes=10**9)) == request_.out
    assert not set(SPLIT_KEYS) & set(read_header(request_.out).keys)


def test_llama_quantize_keeping_the_split_writes_the_same_parts(request_: ConvertRequest) -> None:
    """The same names, headers and bytes."""
    parts = converted_parts(request_)
    reference = request_.out.with_name("reference")
    options = QuantizeOptions(flags={"keep_split": True})
    assert llama_quantize(parts[0].path, "BF16", reference, options) == 0
    for part in parts:
        theirs = part.path.with_name(part.path.name.replace("out-", "reference-"))
        assert theirs.read_bytes() == part.path.read_bytes()


@pytest.mark.parametrize("file_type", ["Q8_0", "Q3_K_M"])
def test_a_split_model_read_back_as_a_source_converts_like_the_checkpoint(
    file_type: str, request_: ConvertRequest
) -> None:
    first = converted_parts(request_)[0].path
    ours = ConvertRequest(first, file_type, request_.out.with_name("ours.gguf"))
    expected = ConvertRequest(request_.source, file_type, request_.out.with_name("expected.gguf"))
    assert run_conversion(ours).read_bytes() == run_conversion(expected).read_bytes()


def test_a_split_source_is_named_by_its_first_part_and_needs_all_parts(request_: ConvertRequest) -> None:
    parts = converted_parts(request_)
    out = request_.out.with_name("other.gguf")
    with pytest.raises(ConvertError, match=r"00002-of-00004\.gguf is one of 4 parts: name the first"):
        run_conversion(ConvertRequest(parts[1].path, "Q8_0", out))
    parts[2].path.unlink()
    with pytest.raises(ConvertError, match=r"out-00003-of-00004\.gguf: cannot be read \(No such file"):
        run_conversion(ConvertRequest(parts[0].path, "Q8_0", out))


@pytest.mark.parametrize(("before", "after"), [(100_000, 60_000), (100_000, None), (None, 100_000)])
def test_another_size_starts_over_and_removes_the_old_parts(
    before: int | None, after: int | None, request_: ConvertRequest
) -> None:
    """Also if their number changes the names; only files of the same name are removed."""
    others = ["other-00001-of-00004.gguf.partial", "out.gguf.partial.mine", "out2.gguf.partial"]
    for name in others:
        request_.out.with_name(name).write_text("mine")
    with closing(convert(replace(request_, split_max_bytes=before))) as events:
        next(event for event in events if isinstance(event, TensorDone))
    _, started_over, *_, finished = convert(replace(request_, split_max_bytes=after))
    assert isinstance(started_over, ConversionRestarted)
    assert isinstance(finished, ConversionDone)
    left = sorted(path.name for path in request_.out.parent.iterdir() if path.is_file())
    assert left == sorted([*others, *(path.name for path in finished.paths)])


def test_an_existing_part_is_refused_before_any_is_written(request_: ConvertRequest) -> None:
    taken = request_.out.with_name("out-00003-of-00004.gguf")
    taken.write_text("mine")
    with pytest.raises(ConvertError, match=r"out-00003-of-00004\.gguf: exists already"):
        next(convert(request_))
    assert sorted(path.name for path in request_.out.parent.iterdir()) == ["model", taken.name]


def test_llama_cpp_generates_the_same_from_the_parts_as_from_the_whole(tmp_path: Path) -> None:
    """From the first part of the miniature it finds the others, and every logit is the same."""
    whole = ConvertRequest(MINIATURE, "Q8_0", tmp_path / "whole.gguf")
    parts = ConvertRequest(MINIATURE, "Q8_0", tmp_path / "parts.gguf", split_max_bytes=2 * 10**6)
    found = []
    for path in (run_conversion(whole), run_conversion(parts)):
        with loaded(path) as model:
            prompt = model.tokenize(b"How much is 12 + 30?", add_bos=False)
            tokens = [token for token, _ in zip(model.generate(prompt, temp=0.0), range(12), strict=False)]
            found.append((tokens, np.array(model.scores[model.n_tokens - 1])))
    assert len(list(tmp_path.glob("parts-*-of-*.gguf"))) > 2
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])


@contextmanager
def loaded(path: Path) -> Iterator[llama_cpp.Llama]:
    model = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    try:
        yield model
    finally:
        model.close()


def converted_parts(request: ConvertRequest) -> tuple[GgufHeader, ...]:
    return read_parts(run_conversion(request))


def tensor_bytes(header: GgufHeader) -> bytes:
    return header.path.read_bytes()[header.data_start :]
