"""The key-values of a GGUF, and the options that change them: overrides, YaRN, imatrix, split numbers.

A key-value is the gguf package's GGUFValue. The order is that in the file. As in llama-quantize, a key that
is set again moves to the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import gguf
from gguf import GGUFValue, GGUFValueType, Keys

from qwq_convert.file_types import FileType
from qwq_convert.imatrix.file import ImportanceMatrix
from qwq_local.errors import ConvertError

KeyValues = dict[str, GGUFValue]

# QwQ-32B was trained with 32,768 positions, whatever its config.json says.
LONGEST_ORIGIN = 32768
U32_MAX = 2**32 - 1
# llama_model_kv_override (llama.h) holds texts of 127 bytes.
MAX_TEXT_BYTES = 127
# The layout of the file depends on these.
FIXED_KEYS = ("general.architecture", "general.alignment", "split.")
KINDS = {
    "int": GGUFValueType.UINT32,
    "float": GGUFValueType.FLOAT32,
    "bool": GGUFValueType.BOOL,
    "str": GGUFValueType.STRING,
}


@dataclass(frozen=True, slots=True)
class Override:
    """A key-value that replaces the source's; `text` is the given value when no type was given."""

    key: str
    value: GGUFValue
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Yarn:
    """The rope scaling to write: `factor` times `origin` tokens; None is the native window."""

    factor: float
    origin: int | None = None


def parse_override(text: str) -> Override:
    """`KEY=VALUE` or llama-quantize's `KEY=TYPE:VALUE` (int, float, bool, str) as an Override.

    Without a type, the value is a whole number, a number, true or false, else a text. Raises ConvertError.
    """
    key, equals, rest = text.partition("=")
    if not equals or not key or not key.isascii() or not key.isprintable() or len(key) > MAX_TEXT_BYTES:
        raise ConvertError(f"--override-key {text[:60]!r}: expected KEY=VALUE or KEY=TYPE:VALUE.")
    if key.startswith(FIXED_KEYS):
        raise ConvertError(f"--override-key {key}: the file's layout hangs on it, it cannot be overridden.")
    kind, colon, value = rest.partition(":")
    if colon and kind in KINDS:
        return Override(key, GGUFValue(_parse(key, kind, value), KINDS[kind]))
    kind = _guess(rest)
    return Override(key, GGUFValue(_parse(key, kind, rest), KINDS[kind]), rest)


def _apply(key_values: KeyValues, override: Override) -> None:
    """Set a key. It moves to the end, and whole numbers become 32-bit unsigned, as in llama-quantize.

    Raises ConvertError when the model's value is of another kind: no program would load such a file.
    """
    old, new = key_values.get(override.key), override.value
    if old is not None and old.type == GGUFValueType.ARRAY:
        raise ConvertError(f"--override-key {override.key}: is a list, which cannot be overridden.")
    if old is not None and (kind := _kind(old)) != _kind(new):
        if override.text is None:
            raise ConvertError(
                f"--override-key {override.key}: the model's own value is of type {kind}, not {_kind(new)}."
            )
        new = GGUFValue(_parse(override.key, kind, override.text), KINDS[kind])
    key_values.pop(override.key, None)
    key_values[override.key] = new


def _set_last(key_values: KeyValues, key: str, value: str | int) -> None:
    """Set `key` and move it to the end. A text is cut to what llama.cpp holds."""
    key_values.pop(key, None)
    if isinstance(value, str):
        text = value.encode("utf-8", "replace")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")
        key_values[key] = GGUFValue(text, GGUFValueType.STRING)
    else:
        key_values[key] = GGUFValue(value, GGUFValueType.UINT32)


def stretch(key_values: KeyValues, yarn: Yarn) -> KeyValues:
    """`key_values` with YaRN's keys before rope.freq_base, and with the longer window.

    llama.cpp's converter writes the same keys for rope_scaling in config.json. They replace an earlier
    scaling.
    """
    arch = key_values[Keys.General.ARCHITECTURE].value
    length_key = Keys.LLM.CONTEXT_LENGTH.format(arch=arch)
    earlier = key_values.get(Keys.Rope.SCALING_ORIG_CTX_LEN.format(arch=arch))
    origin = yarn.origin or (earlier and earlier.value) or min(key_values[length_key].value, LONGEST_ORIGIN)
    if not 1 < yarn.factor <= 1024 or (window := round(origin * yarn.factor)) > U32_MAX:
        raise ConvertError(
            f"--yarn {yarn.factor:g}: expected a factor above 1, such as 4 for 131,072 tokens."
        )
    scaling = {
        Keys.Rope.SCALING_TYPE.format(arch=arch): GGUFValue("yarn", GGUFValueType.STRING),
        Keys.Rope.SCALING_FACTOR.format(arch=arch): GGUFValue(yarn.factor, GGUFValueType.FLOAT32),
        Keys.Rope.SCALING_ORIG_CTX_LEN.format(arch=arch): GGUFValue(origin, GGUFValueType.UINT32),
    }
    stretched: KeyValues = {}
    for key, value in key_values.items():
        if key == Keys.Rope.FREQ_BASE.format(arch=arch):
            stretched |= scaling
        if not key.startswith(f"{arch}.rope.scaling."):
            stretched[key] = value
    return stretched | scaling | {length_key: GGUFValue(window, GGUFValueType.UINT32)}


def finish(
    key_values: KeyValues,
    file_type: FileType,
    overrides: Iterable[Override],
    imatrix: tuple[str, ImportanceMatrix] | None,
) -> None:
    """Add the keys that llama-quantize sets last: version, file type, overrides, origin of the imatrix."""
    _set_last(key_values, Keys.General.QUANTIZATION_VERSION, gguf.GGML_QUANT_VERSION)
    _set_last(key_values, Keys.General.FILE_TYPE, file_type.number)
    for override in overrides:
        _apply(key_values, override)
    if imatrix is None:
        return
    name, matrix = imatrix
    texts = {"file": name, "dataset": matrix.datasets[0] if matrix.datasets else ""}
    counts = {"entries_count": len(matrix.sums), "chunks_count": matrix.chunk_count}
    for what, value in (texts | counts).items():
        if value:
            _set_last(key_values, f"quantize.imatrix.{what}", value)


def split_keys(number: int, n_files: int, n_tensors: int) -> KeyValues:
    """The keys of file `number` (from 0) of a split model."""
    return {
        Keys.Split.LLM_KV_SPLIT_NO: GGUFValue(number, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_COUNT: GGUFValue(n_files, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: GGUFValue(n_tensors, GGUFValueType.INT32),
    }


def _kind(value: GGUFValue) -> str:
    """The kind of a value, as `KEY=TYPE:VALUE` calls it."""
    if value.type == GGUFValueType.FLOAT64:
        return "float"
    return next((kind for kind, value_type in KINDS.items() if value_type == value.type), "int")


def _guess(text: str) -> str:
    if text in ("true", "false"):
        return "bool"
    if text.isascii() and text.isdigit():
        return "int"
    try:
        float(text)
    except ValueError:
        return "str"
    return "float"


def _parse(key: str, kind: str, text: str) -> str | int | float | bool:
    place = f"--override-key {key}: {text[:60]!r}"
    if kind == "str":
        if len(text.encode("utf-8", "surrogateescape")) > MAX_TEXT_BYTES or not text.isprintable():
            raise ConvertError(f"{place} is longer than {MAX_TEXT_BYTES} bytes or holds control characters.")
        return text
    if kind == "bool":
        if text not in ("true", "false"):
            raise ConvertError(f"{place} is neither true nor false.")
        return text == "true"
    try:
        number = int(text) if kind == "int" else float(text)
    except ValueError:
        raise ConvertError(f"{place} is no number.") from None
    if kind == "int" and not 0 <= number <= U32_MAX:
        raise ConvertError(f"{place} is not between 0 and {U32_MAX}.")
    if not math.isfinite(number) or abs(number) > 3.4e38:
        raise ConvertError(f"{place} is no 32-bit number.")
    return number
