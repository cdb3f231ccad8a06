"""Every byte of a conversion against llama.cpp's own quantizer, run on our GGUF in the checkpoint's dtype."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QuantType
from qwq_convert import ggml
from qwq_convert.gguf_header import read_header
from qwq_convert.pipeline import ConvertRequest, run_conversion
from qwq_convert.quant_types import FILE_TYPES, tensor_type
from safetensors import safe_open
from tokenizers import Tokenizer

from tests.checkpoints import CheckpointSpec, StoredTensor, store, weights, write_checkpoint

CHECKPOINTS = {
    "BF16, GQA, untied, one shard": CheckpointSpec(),
    "F16, MHA, tied": CheckpointSpec(dtype="F16", n_kv_heads=4, tied=True),
    "F32, GQA, tied, three shards": CheckpointSpec(dtype="F32", tied=True, n_shards=3),
    "F32, untied": CheckpointSpec(dtype="F32", merges_as_pairs=False),
    "F16, untied, two shards": CheckpointSpec(dtype="F16", n_shards=2),
    "BF16, sixteen layers": CheckpointSpec(n_layers=16, n_kv_heads=1),
    "BF16, hidden rows not divisible by 32": CheckpointSpec(hidden_size=48, intermediate_size=64),
    "BF16, tied rows not divisible by 32": CheckpointSpec(hidden_size=48, tied=True, n_kv_heads=4),
    "F32, wide rows not divisible by 32": CheckpointSpec(dtype="F32", intermediate_size=104),
    "BF16, several chunks a tensor": CheckpointSpec(hidden_size=256, intermediate_size=2080, vocab_size=3001),
}

GGUF_NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "self_attn.o_proj.": "attn_output.",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "_proj.": ".",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
}


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=list(CHECKPOINTS))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, CheckpointSpec]:
    """A checkpoint folder, our GGUF of it in its own dtype, and its spec."""
    spec = CHECKPOINTS[request.param]
    folder = write_checkpoint(tmp_path_factory.mktemp("source") / "model", spec)
    return folder, convert(folder, spec.dtype, folder.parent / "own.gguf"), spec


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_a_conversion_equals_what_llama_quantize_makes(
    checkpoint: tuple[Path, Path, CheckpointSpec], file_type: str, tmp_path: Path
) -> None:
    """One pass from the checkpoint and llama_model_quantize of our own GGUF give the same file."""
    folder, own, _ = checkpoint
    ours = convert(folder, file_type, tmp_path / "ours.gguf")
    reference = llama_quantize(own, file_type, tmp_path / "reference.gguf")
    assert_identical(ours, reference)


def test_our_gguf_in_the_dtype_of_the_checkpoint_holds_its_very_bytes(
    checkpoint: tuple[Path, Path, CheckpointSpec],
) -> None:
    """Matrices keep their bytes, vectors become exact 32-bit floats; the quantizer then starts from this."""
    _, own, spec = checkpoint
    header, content = read_header(own), own.read_bytes()
    found = {tensor.name: tensor for tensor in header.tensors}
    for name, values in weights(spec).items():
        tensor = found.pop(gguf_name(name))
        start = header.data_start + tensor.offset
        stored = store(values, spec.dtype)
        vector = values.ndim == 1
        assert (tensor.shape, tensor.kind.name) == (values.shape, "F32" if vector else spec.dtype)
        assert content[start : start + tensor.n_bytes] == (widened(stored) if vector else stored.content)
    assert not found


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.ffn_up.weight", (8, 64), "Q8_0"),
        ("blk.0.ffn_up.weight", (8, 40), "F16"),
        ("blk.0.attn_norm.weight", (8, 64), "F32"),
        ("blk.0.attn_q.bias", (8, 64), "F32"),
        ("output_norm.weight", (64,), "F32"),
    ],
)
def test_a_tensor_gets_its_type_by_name_and_shape(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert tensor_type(name, shape, FILE_TYPES["Q8_0"]).name == expected


def test_arguments_that_would_abort_the_process_raise_instead() -> None:
    """libggml asserts on rows that are no whole blocks and on types that need an importance matrix."""
    rows = np.zeros(64, dtype=np.float32)
    for bad_rows, n_per_row, kind in (
        (rows[:33], 33, QuantType.Q8_0),
        (rows, 64, QuantType.IQ2_XXS),
        (rows, 48, QuantType.F32),
        (rows[::2], 32, QuantType.Q8_0),
        (rows.astype(np.float64), 64, QuantType.Q8_0),
    ):
        with pytest.raises(ValueError, match=r"expected contiguous rows|cannot become"):
            ggml.quantize(bad_rows, n_per_row, kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="whole blocks"):
        ggml.is_valid(np.zeros(33, dtype=np.uint8), QuantType.Q8_0)
    with pytest.raises(ValueError, match="whole blocks"):
        ggml.tensor_bytes(QuantType.Q8_0, 33)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_the_number_of_threads_changes_no_byte(threads: int, tmp_path: Path) -> None:
    spec = CHECKPOINTS["BF16, several chunks a tensor"]
    folder = write_checkpoint(tmp_path / "model", spec)
    one = convert(folder, "Q8_0", tmp_path / "one.gguf")
    request = ConvertRequest(folder, "Q8_0", tmp_path / "many.gguf", threads=threads)
    assert run_conversion(request).read_bytes() == one.read_bytes()


def test_shards_and_their_order_change_no_byte(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "a" / "model", CheckpointSpec())
    split = write_checkpoint(tmp_path / "b" / "model", CheckpointSpec(n_shards=5))
    first = convert(whole, "Q8_0", tmp_path / "first.gguf")
    assert convert(split, "q8_0", tmp_path / "second.gguf").read_bytes() == first.read_bytes()


def test_merges_as_texts_and_as_pairs_change_no_byte(tmp_path: Path) -> None:
    pairs = write_checkpoint(tmp_path / "a" / "model", CheckpointSpec(merges_as_pairs=True))
    texts = write_checkpoint(tmp_path / "b" / "model", CheckpointSpec(merges_as_pairs=False))
    first = convert(pairs, "BF16", tmp_path / "first.gguf")
    assert convert(texts, "BF16", tmp_path / "second.gguf").read_bytes() == first.read_bytes()


def test_the_tokens_of_a_conversion_are_those_of_the_tokenizers_library(tmp_path: Path) -> None:
    """llama.cpp, loading the vocabulary of our GGUF, gives the ids that tokenizer.json gives."""
    folder = write_checkpoint(tmp_path / "model")
    gguf = convert(folder, "Q8_0", tmp_path / "model.gguf")
    expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    try:
        for text in (
            "the end and  the\n\nthing's    1234",
            "量子纠缠 🚀 naïve",
            "<think>\nso</think><|im_end|>",
        ):
            found = model.tokenize(text.encode(), add_bos=False, special=True)
            assert found == expected.encode(text).ids, text
    finally:
        model.close()


def test_the_checkpoints_of_these_tests_are_real_safetensors(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", CheckpointSpec(dtype="F32"))
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert file.get_tensor("model.layers.1.mlp.down_proj.weight").shape == (64, 96)


def convert(folder: Path, file_type: str, out: Path) -> Path:
    """Our conversion."""
    return run_conversion(ConvertRequest(folder, file_type, out))


def gguf_name(name: str) -> str:
    """llama.cpp's name for a tensor of a Qwen2 checkpoint."""
    for old, new in GGUF_NAMES.items():
        name = name.replace(old, new)
    return name


def widened(tensor: StoredTensor) -> bytes:
    """The values of a stored tensor as 32-bit floats."""
    if tensor.dtype == "BF16":
        return (np.frombuffer(tensor.content, "<u2").astype("<u4") << 16).tobytes()
    return np.frombuffer(tensor.content, {"F16": "<f2", "F32": "<f4"}[tensor.dtype]).astype("<f4").tobytes()


def llama_quantize(source: Path, file_type: str, out: Path) -> Path:
    """What llama.cpp's quantizer makes of a GGUF."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(FILE_TYPES[file_type].number)
    parameters.nthread = 2
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(out), parameters) == 0
    return out


def assert_identical(ours: Path, reference: Path) -> None:
    """The same bytes; names the first key-value or tensor that differs."""
    if ours.read_bytes() == reference.read_bytes():
        return
    left, right = read_header(ours), read_header(reference)
    assert left.keys == right.keys
    for key in left.keys:
        assert left.encoded(key) == right.encoded(key), key
    assert left.tensors == right.tensors
    left_bytes, right_bytes = ours.read_bytes(), reference.read_bytes()
    for tensor in left.tensors:
        start = left.data_start + tensor.offset
        end = start + tensor.n_bytes
        assert left_bytes[start:end] == right_bytes[start:end], tensor.name
    pytest.fail("headers and tensors are the same, padding or length is not")
