"""The error of a file against its source: our figures against NumPy's and the gguf package's decoding."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from numpy.typing import NDArray
from qwq_convert import ggml
from qwq_convert.file_types import FLOAT_TYPES, QuantType, block_bytes
from qwq_convert.ggml import dequantize, is_known
from qwq_convert.gguf_file import read_header, read_parts
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest, describe, open_source
from qwq_convert.verification import TypeReport, compare, error_limit, verify_blocks

from qwq_local.errors import ConvertError
from tests.checkpoints import CheckpointSpec, store, weights, write_checkpoint

WIDE = CheckpointSpec(hidden_size=256, intermediate_size=512, n_layers=2, dtype="BF16")
WEIGHTS = [kind for kind in ggml.QUANTIZABLE if kind not in FLOAT_TYPES]


def quantized(values: NDArray[np.float32], kind: QuantType) -> bytes:
    """Rows of 256 as `kind`, every column as important as the next."""
    return ggml.quantize(values, 256, kind, np.ones(256, np.float32)).tobytes()


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if int(kind) in gguf.quants._type_traits])
def test_blocks_dequantize_as_the_gguf_package_dequantizes_them(kind: QuantType) -> None:
    """Any bits, in blocks whose scales are finite."""
    drawn = np.random.default_rng(1).integers(0, 256, (200, block_bytes(kind)), dtype=np.uint8)
    blocks = np.array([block for block in drawn if ggml.is_valid(block, kind)])
    assert len(blocks) > 100
    with np.errstate(over="ignore"):  # a scale of MXFP4 may be as large as a float
        reference = gguf.quants.dequantize(blocks.ravel(), GGMLQuantizationType(kind))
    np.testing.assert_allclose(dequantize(blocks.tobytes(), kind), reference.ravel(), rtol=1e-5)


def test_only_whole_blocks_of_weights_are_dequantized() -> None:
    with pytest.raises(ValueError, match="not whole blocks of Q8_0"):
        dequantize(bytes(33), QuantType.Q8_0)
    with pytest.raises(ConvertError, match="I8 holds no weights"):
        dequantize(bytes(32), QuantType.I8)


def test_every_type_is_known_to_the_library() -> None:
    assert [kind for kind in QuantType if not is_known(kind)] == []


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_type_stays_below_its_limit_and_other_weights_do_not(kind: QuantType) -> None:
    """The weights have long tails like a trained model's; the same blocks are far from other weights."""
    random = np.random.default_rng(2)
    ternary = kind in (QuantType.TQ1_0, QuantType.TQ2_0)
    values, others = (
        (random.integers(-1, 2, 256 * 64) * 0.1 if ternary else random.standard_t(4, 256 * 64) * 0.02).astype(
            np.float32
        )
        for _ in range(2)
    )
    decoded = dequantize(quantized(values, kind), kind)
    assert relative_rms(decoded, values) < error_limit(kind) < 1 < relative_rms(decoded, others)


def relative_rms(values: NDArray[np.float32], source: NDArray[np.float32]) -> float:
    errors = values.astype(np.float64) - source
    return float(np.sqrt(np.square(errors).mean() / np.square(source.astype(np.float64)).mean()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "model", WIDE)


def make(checkpoint: Path, file_type: str, folder: Path) -> Path:
    path = folder / f"{file_type}.gguf"
    run_conversion(ConvertRequest(checkpoint, file_type, path))
    return path


def compared(path: Path, source: Path) -> tuple[TypeReport, ...]:
    """The reports on a file and its source."""
    with open_source(source) as opened:
        work = compare(read_parts(path), opened.read, describe(opened).tensors, threads=2)
        while True:
            try:
                next(work)
            except StopIteration as finished:
                reports: tuple[TypeReport, ...] = finished.value
                return reports


@pytest.mark.parametrize("file_type", ["F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q2_K", "IQ4_XS", "TQ2_0"])
def test_the_error_of_each_type_equals_numpys(file_type: str, checkpoint: Path, tmp_path: Path) -> None:
    """With the gguf package's reader and its dequantization, tensor by tensor, in float64."""
    path = make(checkpoint, file_type, tmp_path)
    source = {name: store(values, "BF16").content for name, values in weights(WIDE).items()}
    expected: dict[str, list[tuple[str, float, float, float]]] = {}
    with open_source(checkpoint) as opened:
        names = {tensor.name: tensor.source.name for tensor in describe(opened).tensors}
    for tensor in GGUFReader(path).tensors:
        original = np.frombuffer(source[names[tensor.name]], "<u2").astype(np.uint32) << 16
        exact = original.view(np.float32).astype(np.float64)
        errors = gguf.quants.dequantize(tensor.data, tensor.tensor_type).ravel() - exact
        row = (tensor.name, np.square(errors).sum(), np.square(exact).sum(), np.abs(errors).max())
        expected.setdefault(tensor.tensor_type.name, []).append(row)
    reports = {report.kind.name: report for report in compared(path, checkpoint)}
    assert set(reports) == set(expected)
    for kind, rows in expected.items():
        report, (_, errors_sum, source_sum, _) = (
            reports[kind],
            np.sum([(0, *row[1:]) for row in rows], axis=0),
        )
        assert report.n_tensors == len(rows)
        assert report.total.relative_rms == pytest.approx(np.sqrt(errors_sum / source_sum), rel=1e-5)
        assert report.total.max_abs == pytest.approx(max(row[3] for row in rows), rel=1e-5)
        worst = max(rows, key=lambda row: row[1] / row[2])
        assert report.worst_deviation.relative_rms == pytest.approx(np.sqrt(worst[1] / worst[2]), rel=1e-5)
        assert report.is_plausible


@pytest.mark.parametrize("file_type", ["F32", "BF16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_one_tensor_in_the_place_of_another_is_found(
    file_type: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Two tensors of one shape and type are swapped: every block is sound, but the weights are wrong."""
    path = make(checkpoint, file_type, tmp_path)
    header = read_header(path)
    places = {tensor.name: (header.data_start + tensor.offset, tensor.n_bytes) for tensor in header.tensors}
    (first, size), (second, _) = places["blk.0.ffn_up.weight"], places["blk.0.ffn_gate.weight"]
    content = bytearray(path.read_bytes())
    content[first : first + size], content[second : second + size] = (
        content[second : second + size],
        content[first : first + size],
    )
    path.write_bytes(content)
    assert list(verify_blocks([read_header(path)], threads=1))
    wrong = [report for report in compared(path, checkpoint) if not report.is_plausible]
    assert [report.worst in ("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight") for report in wrong] == [True]
    assert wrong[0].worst_deviation.relative_rms == pytest.approx(np.sqrt(2), rel=0.1)


def test_one_wrong_value_among_exact_ones_is_found(checkpoint: Path, tmp_path: Path) -> None:
    path = make(checkpoint, "Q8_0", tmp_path)
    header = read_header(path)
    tensor = next(tensor for tensor in header.tensors if tensor.name == "blk.1.attn_norm.weight")
    content = bytearray(path.read_bytes())
    at = header.data_start + tensor.offset + 4 * 17
    content[at : at + 4] = struct.pack("<f", 3.0)
    path.write_bytes(content)
    wrong = [report for report in compared(path, checkpoint) if not report.is_plausible]
    assert [(report.kind.name, report.worst) for report in wrong] == [("F32", "blk.1.attn_norm.weight")]


def test_a_file_of_another_model_is_recognised_by_its_tensors(checkpoint: Path, tmp_path: Path) -> None:
    path = make(checkpoint, "Q8_0", tmp_path)
    deeper = write_checkpoint(tmp_path / "deeper", replace(WIDE, n_layers=3))
    with pytest.raises(ConvertError, match=r"lacks blk\.2\.attn_k\.bias of the source"):
        compared(path, deeper)
    flatter = write_checkpoint(tmp_path / "flatter", replace(WIDE, n_layers=1))
    with pytest.raises(ConvertError, match=r"holds 'blk\.1\.\S+', unknown to the source"):
        compared(path, flatter)
    wider = write_checkpoint(tmp_path / "wider", replace(WIDE, intermediate_size=768))
    with pytest.raises(
        ConvertError, match=r"ffn_down.weight has shape \[256, 512\], its source \[256, 768\]"
    ):
        compared(path, wider)


def test_a_float_gguf_is_a_source_too(checkpoint: Path, tmp_path: Path) -> None:
    source = make(checkpoint, "BF16", tmp_path)
    path = make(checkpoint, "Q8_0", tmp_path)
    assert compared(path, source) == compared(path, checkpoint)
