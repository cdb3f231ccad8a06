"""The type of each tensor: the tables against llama-quantize's types for QwQ-32B's 771 tensors."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
from llama_cpp._ggml import libggml
from qwq_convert import ggml
from qwq_convert.file_types import ALIASES, BLOCKS, FILE_TYPES, QuantType, find_file_type, find_tensor_type
from qwq_convert.layout import lay_out
from qwq_convert.model_config import NamedTensor
from qwq_convert.quant_types import (
    NO_OPTIONS,
    TypeOptions,
    choose_types,
    is_quantizable,
    needs_imatrix,
)
from qwq_convert.safetensors import SourceTensor

from qwq_local.errors import ConvertError
from qwq_local.models.architecture import QWQ_32B

# From llama-quantize's own dry run on a GGUF of QwQ-32B's shapes.
GOLDEN = Path(__file__).parent / "qwq32b_quant_types.txt"
_HEADER = re.compile(r"(?P<name>[A-Z0-9_]+)(?P<imatrix>\+im)? rc=0 n=771 size MiB/BPW \('(?P<mib>[\d.]+)'")
_RANGES = re.compile(r"(?P<kind>\w+?)(?:\[(?P<layers>[\d,-]+)\]\(\d+\))?(?:; |$)")


def qwq_32b_tensors() -> list[NamedTensor]:
    """The 771 tensors of QwQ-32B in llama-quantize's order, as BF16."""
    hidden, wide, kv, vocabulary = 5120, 27648, 1024, 152064
    shapes: dict[str, tuple[int, ...]] = {
        "output.weight": (vocabulary, hidden),
        "output_norm.weight": (hidden,),
        "token_embd.weight": (vocabulary, hidden),
    }
    block: dict[str, tuple[int, ...]] = {
        **{f"attn_{each}.weight": (rows, hidden) for each, rows in (("k", kv), ("q", hidden), ("v", kv))},
        **{f"attn_{each}.bias": (rows,) for each, rows in (("k", kv), ("q", hidden), ("v", kv))},
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn_output.weight": (hidden, hidden),
        "ffn_down.weight": (hidden, wide),
        "ffn_gate.weight": (wide, hidden),
        "ffn_up.weight": (wide, hidden),
    }
    for layer in range(64):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in sorted(block.items())}
    return [tensor(name, shape) for name, shape in shapes.items()]


def tensor(name: str, shape: tuple[int, ...]) -> NamedTensor:
    source = SourceTensor(name, "BF16", shape, "model.safetensors", 0, 0)
    kept = QuantType.BF16 if is_quantizable(name, shape) else QuantType.F32
    return NamedTensor(name, int(name.split(".")[1]) if name.startswith("blk.") else -1, source, kept)


def golden() -> Iterator[tuple[str, bool, float, dict[str, QuantType]]]:
    """File type, with imatrix or without, MiB of tensors, and the type of every quantized tensor."""
    lines = GOLDEN.read_text(encoding="utf-8").splitlines()
    entry: tuple[str, bool, float, dict[str, QuantType]] | None = None
    for line in lines:
        if match := _HEADER.match(line):
            entry = (match["name"], bool(match["imatrix"]), float(match["mib"]), {})
            yield entry
        elif same := re.match(r"([A-Z0-9_]+) +\+im: same types", line):
            assert entry is not None
            assert entry[0] == same[1]
            yield entry[0], True, entry[2], entry[3]
        elif line.startswith("    ") and entry is not None:
            name, _, rest = line.strip().partition(" ")
            entry[3].update(_layers(name, rest))


def _layers(name: str, rest: str) -> Iterator[tuple[str, QuantType]]:
    for match in _RANGES.finditer(rest):
        kind = QuantType[match["kind"].upper()]
        if name.endswith(".weight"):
            yield name, kind
            continue
        for part in (match["layers"] or "0-63").split(","):
            first, _, last = part.partition("-")
            for layer in range(int(first), int(last or first) + 1):
                yield f"blk.{layer}.{name}.weight", kind


@pytest.mark.parametrize(
    ("name", "has_imatrix", "mebibytes", "expected"),
    [pytest.param(*entry, id=f"{entry[0]}{'+imatrix' if entry[1] else ''}") for entry in list(golden())],
)
def test_every_tensor_of_qwq_32b_gets_the_type_of_llama_quantize(
    name: str, has_imatrix: bool, mebibytes: float, expected: dict[str, QuantType]
) -> None:
    tensors = qwq_32b_tensors()
    kinds = choose_types(tensors, FILE_TYPES[name], QWQ_32B, NO_OPTIONS, has_imatrix)
    assert len(tensors) == 771
    found = {tensor.name: kind for tensor, kind in zip(tensors, kinds, strict=True) if kind != QuantType.F32}
    assert found == expected
    n_bytes = sum(planned.n_bytes for planned in lay_out(tensors, kinds)[0].tensors)
    assert n_bytes / 2**20 == pytest.approx(mebibytes, abs=0.006)


def test_the_golden_file_covers_every_type_but_the_plain_and_the_ternary_ones() -> None:
    covered = {name for name, *_ in golden()}
    assert set(FILE_TYPES) - covered == {"F32", "F16", "BF16", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0"}
    assert len(list(golden())) == 2 * len(covered)


def test_our_numbers_are_those_of_the_gguf_package_and_of_libggml() -> None:
    for theirs in gguf.GGMLQuantizationType:
        assert QuantType[theirs.name].value == theirs.value
        assert BLOCKS[QuantType(theirs)] == gguf.GGML_QUANT_SIZES[theirs]
    libggml.ggml_type_name.restype = ctypes.c_char_p
    for kind in ggml.QUANTIZABLE:
        assert libggml.ggml_type_name(kind).decode().upper() == kind.name
        assert BLOCKS[kind] == (libggml.ggml_blck_size(kind), libggml.ggml_type_size(kind))
    for file_type in gguf.LlamaFileType:
        name = file_type.name.partition("_")[2]
        if name in FILE_TYPES:
            assert FILE_TYPES[name].number == file_type


def test_types_are_found_by_any_case_and_by_alias() -> None:
    assert find_file_type("q4_k_m").name == "Q4_K_M"
    assert [find_file_type(alias.lower()).name for alias in ALIASES] == ["Q3_K_M", "Q4_K_M", "Q5_K_M"]
    assert find_tensor_type("iq4_xs") is QuantType.IQ4_XS
    with pytest.raises(ConvertError, match=r"'Q4_K_X' is unknown, did you mean Q4_K_"):
        find_file_type("Q4_K_X")


def test_options_overrule_the_tables_in_llama_quantizes_order() -> None:
    tensors = qwq_32b_tensors()

    def chosen(**options: object) -> dict[str, QuantType]:
        made = TypeOptions(**options)  # type: ignore[arg-type]  # each test names its own
        kinds = choose_types(tensors, FILE_TYPES["Q4_K_M"], QWQ_32B, made, has_imatrix=False)
        return {tensor.name: kind for tensor, kind in zip(tensors, kinds, strict=True)}

    first = (re.compile("ffn_down"), QuantType.Q8_0)
    second = (re.compile(r"blk\.0\."), QuantType.Q5_0)
    kinds = chosen(patterns=(first, second))
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.attn_q.weight"]) == (QuantType.Q8_0, QuantType.Q5_0)
    assert kinds["blk.0.attn_norm.weight"] is QuantType.F32
    kinds = chosen(pure=True)
    assert {kind for kind in kinds.values() if kind is not QuantType.F32} == {QuantType.Q4_K}
    kinds = chosen(keep_output=True, embedding=QuantType.Q8_0)
    assert (kinds["output.weight"], kinds["token_embd.weight"]) == (QuantType.BF16, QuantType.Q8_0)
    assert chosen(output=QuantType.Q5_K)["output.weight"] is QuantType.Q5_K


def test_an_option_that_cannot_be_met_names_the_tensor() -> None:
    odd = [tensor("token_embd.weight", (64, 80)), tensor("output.weight", (64, 80))]
    options = TypeOptions(embedding=QuantType.Q6_K)
    with pytest.raises(ConvertError, match=r"token_embd\.weight: rows of 80 values are not whole Q6_K"):
        choose_types(odd, FILE_TYPES["Q4_K_M"], QWQ_32B, options, has_imatrix=False)
    options = TypeOptions(patterns=((re.compile("x"), QuantType.Q8_0),))
    with pytest.raises(ConvertError, match="--tensor-type says nothing with F16"):
        choose_types(odd, FILE_TYPES["F16"], QWQ_32B, options, has_imatrix=False)


def test_only_layers_need_an_importance_matrix() -> None:
    assert needs_imatrix("blk.0.attn_q.weight", QuantType.IQ2_XXS, FILE_TYPES["IQ2_XXS"])
    assert not needs_imatrix("output.weight", QuantType.IQ2_XXS, FILE_TYPES["IQ2_XXS"])
    assert needs_imatrix("blk.0.attn_q.weight", QuantType.Q2_K, FILE_TYPES["Q2_K_S"])
    assert not needs_imatrix("blk.0.attn_q.weight", QuantType.Q2_K, FILE_TYPES["Q2_K"])
