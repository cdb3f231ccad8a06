"""Every byte of a conversion against llama.cpp's own quantizer, run on our GGUF in the checkpoint's dtype."""

from __future__ import annotations

import re
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray
from qwq_convert import ggml
from qwq_convert.file_types import FILE_TYPES, QuantType, tensor_bytes
from qwq_convert.gguf_file import read_header
from qwq_convert.imatrix.file import ImportanceMatrix, write_imatrix
from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest
from qwq_convert.quant_types import TypeOptions
from safetensors import safe_open
from tokenizers import Tokenizer

from qwq_local.errors import ConvertError
from tests.checkpoints import CheckpointSpec, StoredTensor, store, weights, write_checkpoint
from tests.convert.quantizer import INT, TEXT, QuantizeOptions, llama_quantize

# Rows of whole K-quant blocks, in which every mixture shows: with and without an importance matrix.
WHOLE_BLOCKS = {
    "BF16, 8 layers, GQA, untied, one shard": CheckpointSpec(
        n_layers=8, hidden_size=256, intermediate_size=256, n_kv_heads=1
    ),
    "F32, 1 layer, GQA, untied, two shards": CheckpointSpec(
        n_layers=1, hidden_size=256, intermediate_size=512, n_heads=8, dtype="F32", n_shards=2
    ),
    "Qwen3, BF16, 2 layers, GQA, wide heads, tied": CheckpointSpec(
        n_layers=2,
        hidden_size=256,
        intermediate_size=256,
        n_kv_heads=1,
        head_dim=128,
        tied=True,
        architecture="qwen3",
    ),
}
# Rows that lead to fallbacks, and the other ways in which checkpoints differ.
CHECKPOINTS = {
    "BF16, GQA, untied, one shard": CheckpointSpec(),
    "F16, MHA, tied": CheckpointSpec(dtype="F16", n_kv_heads=4, tied=True),
    "F32, GQA, tied, three shards": CheckpointSpec(dtype="F32", tied=True, n_shards=3),
    "BF16, sixteen layers": CheckpointSpec(n_layers=16, n_kv_heads=1),
    "BF16, hidden rows not divisible by 32": CheckpointSpec(hidden_size=48, intermediate_size=64),
    "BF16, tied rows not divisible by 32": CheckpointSpec(hidden_size=48, tied=True, n_kv_heads=4),
    "F32, wide rows not divisible by 32": CheckpointSpec(dtype="F32", intermediate_size=104),
    "BF16, wide rows not divisible by 256": CheckpointSpec(hidden_size=256, intermediate_size=352),
    "Qwen3, F16, small heads, untied": CheckpointSpec(
        dtype="F16", hidden_size=128, n_heads=4, head_dim=24, architecture="qwen3", n_shards=2
    ),
}
SEVERAL_CHUNKS = CheckpointSpec(hidden_size=256, intermediate_size=2080, vocab_size=3001)
SIXTEEN_LAYERS = CheckpointSpec(
    n_layers=16, hidden_size=256, intermediate_size=256, n_kv_heads=4, dtype="F16", tied=True, n_shards=3
)
# These take seconds on each checkpoint; the whole blocks above cover them, with an importance matrix.
SLOW = {"IQ1_M", "IQ1_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS"}

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


Converted = tuple[Path, Path, CheckpointSpec]


def _make(spec: CheckpointSpec, folder: Path) -> Converted:
    """A checkpoint folder, our GGUF of it in its own dtype, and its spec."""
    source = write_checkpoint(folder / "model", spec)
    return source, convert(source, spec.dtype, folder / "own.gguf"), spec


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=list(CHECKPOINTS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return _make(CHECKPOINTS[request.param], tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module", params=WHOLE_BLOCKS, ids=list(WHOLE_BLOCKS))
def whole_blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return _make(WHOLE_BLOCKS[request.param], tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sixteen_layers(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return _make(SIXTEEN_LAYERS, tmp_path_factory.mktemp("sixteen"))


def _matrix(own: Path) -> tuple[Path, ImportanceMatrix]:
    """An importance matrix for the layers of a GGUF, and its file."""
    random = np.random.default_rng(3)
    layers = [t for t in read_header(own).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    sums = {t.name: (random.random(t.shape[1]) * 90).astype(np.float32) for t in layers}
    counts = {name: np.array([512], dtype=np.float32) for name in sums}
    made = ImportanceMatrix(sums, counts, ("wiki.txt", "code.txt"), chunk_count=1, chunk_size=512)
    path = own.with_name("imatrix.gguf")
    write_imatrix(path, made)
    return path, made


@pytest.mark.parametrize("file_type", sorted(set(FILE_TYPES) - SLOW))
def test_a_conversion_equals_llama_quantizes_output(
    checkpoint: Converted, file_type: str, tmp_path: Path
) -> None:
    """One pass from the checkpoint and llama_model_quantize of our own GGUF give the same file."""
    folder, own, _ = checkpoint
    assert_like_llama_quantize(own, ConvertRequest(folder, file_type, tmp_path / "ours.gguf"))


# IQ3_M and IQ3_S are the same with a matrix and without one; the other slow types are refused without.
@pytest.mark.parametrize("file_type", sorted(set(FILE_TYPES) - {"IQ3_M", "IQ3_S"}))
def test_every_mixture_equals_llama_quantizes(
    whole_blocks: Converted, file_type: str, tmp_path: Path
) -> None:
    folder, own, _ = whole_blocks
    assert_like_llama_quantize(own, ConvertRequest(folder, file_type, tmp_path / "ours.gguf"))


@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_with_an_importance_matrix_every_mixture_equals_llama_quantizes(
    whole_blocks: Converted, file_type: str, tmp_path: Path
) -> None:
    assert_like_with_matrix(whole_blocks, file_type, tmp_path)


@pytest.mark.parametrize("file_type", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_0"])
def test_sixteen_layers_without_shared_heads_are_mixed_as_in_llama_quantize(
    sixteen_layers: Converted, file_type: str, tmp_path: Path
) -> None:
    folder, own, _ = sixteen_layers
    assert_like_llama_quantize(own, ConvertRequest(folder, file_type, tmp_path / "ours.gguf"))
    (tmp_path / "ours.gguf").unlink(missing_ok=True)
    assert_like_with_matrix(sixteen_layers, file_type, tmp_path)


@pytest.mark.parametrize("file_type", ["F16", "Q8_0", "Q4_K_M"])
def test_tensors_of_several_chunks_are_complete(file_type: str, tmp_path: Path) -> None:
    folder, own, _ = _make(SEVERAL_CHUNKS, tmp_path)
    assert_like_llama_quantize(own, ConvertRequest(folder, file_type, tmp_path / "ours.gguf"))


FFN_DOWN = re.compile(r"blk\.[02]\.ffn_down")
OPTIONS = {
    "tensor types": (
        TypeOptions(patterns=((FFN_DOWN, QuantType.Q5_0), (re.compile("attn_v"), QuantType.F16))),
        QuantizeOptions(patterns=((FFN_DOWN.pattern, QuantType.Q5_0), ("attn_v", QuantType.F16))),
    ),
    "pure": (TypeOptions(pure=True), QuantizeOptions(flags={"pure": True})),
    "output left": (
        TypeOptions(keep_output=True),
        QuantizeOptions(flags={"quantize_output_tensor": False}),
    ),
    "output and embedding": (
        TypeOptions(output=QuantType.Q5_1, embedding=QuantType.Q3_K),
        QuantizeOptions(output=QuantType.Q5_1, embedding=QuantType.Q3_K),
    ),
}


@pytest.mark.parametrize(
    ("name", "file_type"),
    [
        (name, file_type)
        for name, (ours, _) in OPTIONS.items()
        for file_type in ("Q4_K_M", "Q3_K_M", "BF16")
        # We refuse these patterns; llama-quantize ignores them silently.
        if not (ours.patterns and file_type == "BF16")
    ],
)
def test_options_change_the_same_tensors_as_in_llama_quantize(
    whole_blocks: Converted, name: str, file_type: str, tmp_path: Path
) -> None:
    """Also where an option removes some layers from a mixture, which changes the types of the others."""
    folder, own, _ = whole_blocks
    ours, theirs = OPTIONS[name]
    request = ConvertRequest(folder, file_type, tmp_path / "ours.gguf", types=ours)
    assert_like_llama_quantize(own, request, theirs)


def test_eighty_layers_get_the_bits_of_the_70b_model(tmp_path: Path) -> None:
    spec = CheckpointSpec(n_layers=80, hidden_size=256, intermediate_size=256, n_kv_heads=1)
    folder, own, _ = _make(spec, tmp_path)
    assert_like_llama_quantize(own, ConvertRequest(folder, "Q3_K_S", tmp_path / "ours.gguf"))
    kinds = {tensor.name: tensor.kind.name for tensor in read_header(tmp_path / "ours.gguf").tensors}
    assert kinds["blk.40.attn_v.weight"] == "Q5_K"


def test_our_gguf_in_the_dtype_of_the_checkpoint_has_the_same_bytes(
    checkpoint: tuple[Path, Path, CheckpointSpec],
) -> None:
    """Matrices keep their bytes, vectors become exact 32-bit floats: the input of the quantizer."""
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


def test_arguments_that_would_abort_the_process_raise_instead() -> None:
    """libggml asserts on rows that are not whole blocks and on types that need an importance matrix."""
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
        tensor_bytes(QuantType.Q8_0, 33)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_the_number_of_threads_changes_no_byte(threads: int, tmp_path: Path) -> None:
    spec = SEVERAL_CHUNKS
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
    """llama.cpp with the vocabulary of our GGUF gives the same ids as tokenizer.json."""
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


def importance_of(matrix: ImportanceMatrix, name: str) -> NDArray[np.float32]:
    """The matrix's importance of a tensor."""
    values = matrix.importance(name)
    assert values is not None
    return values


def assert_like_with_matrix(converted: Converted, file_type: str, folder: Path) -> None:
    """The same weights for the same columns, and the key-values that llama-quantize writes with them."""
    source, own, _ = converted
    path, made = _matrix(own)
    options = QuantizeOptions(
        importance={name: importance_of(made, name) for name in made.sums},
        overrides=(
            ("quantize.imatrix.file", TEXT, path.name),
            ("quantize.imatrix.dataset", TEXT, "wiki.txt"),
            ("quantize.imatrix.entries_count", INT, len(made.sums)),
            ("quantize.imatrix.chunks_count", INT, 1),
        ),
    )
    request = ConvertRequest(source, file_type, folder / "ours.gguf", imatrix=path)
    assert_like_llama_quantize(own, request, options)


def assert_like_llama_quantize(
    own: Path, request: ConvertRequest, options: QuantizeOptions | None = None
) -> None:
    """Our conversion and llama.cpp's are the same bytes, or both are refused."""
    reference = request.out.with_name("reference.gguf")
    if llama_quantize(own, request.file_type, reference, options) == 0:
        assert_identical(run_conversion(request), reference)
        return
    with pytest.raises(ConvertError, match=r"needs an importance matrix|are not whole \w+ blocks"):
        run_conversion(request)


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
