"""A GGUF header in; whether a Qwen2 model is all there, and what about it deserves a word, out.

`architecture.py` refuses what would end the process. Here is refused what llama.cpp loads and then gets
wrong without a word, or refuses itself with few words; the rest becomes notices. Knows no llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwq_local.errors import ModelFileError
from qwq_local.models.architecture import Shape, check_architecture, expected_tensors
from qwq_local.models.header import Header

_OPTIONAL_TENSORS = ("output.weight", "output.bias")
# What NVFP4 and its like carry beside a weight.
_OPTIONAL_SUFFIXES = (".scale", ".input_scale")
_NEEDED_KEYS = {
    "tokenizer.ggml.pre": "llama.cpp would split text in another way than the model was trained with",
    "tokenizer.ggml.token_type": "llama.cpp would take every special token for text",
}


def check_completeness(header: Header) -> Shape:
    """The shape of a model that is all there. Raises ModelFileError for what is missing or too much."""
    shape = check_architecture(header)
    for key, consequence in _NEEDED_KEYS.items():
        if header.scalar(key) is None and header.array_length(key) is None:
            raise ModelFileError(f"{header.path} lacks {key}: {consequence}. Fetch or convert it again.")
    known = {name for name, _ in expected_tensors(shape)}.union(_OPTIONAL_TENSORS)
    unknown = [name for name in header.tensors if name not in known and not name.endswith(_OPTIONAL_SUFFIXES)]
    if unknown:
        raise ModelFileError(
            f"{header.path} holds {len(unknown)} tensors that no Qwen2 model has, first {unknown[0]!r}: "
            "llama.cpp would refuse it. Fetch or convert it again."
        )
    return shape


def notices(header: Header) -> Iterator[str]:
    """One line for each thing that the model can do without and should not."""
    if not header.text("tokenizer.chat_template"):
        yield "no chat template (tokenizer.chat_template): qwq uses its built-in one."
    if header.integer("tokenizer.ggml.eos_token_id") is None:
        yield "no end token (tokenizer.ggml.eos_token_id): an answer may not end by itself."
