"""Whether a model is complete, from the header of its GGUF alone.

architecture.py refuses what would end the process. This module refuses what llama.cpp loads and then silently
gets wrong, or refuses itself with few words. Smaller faults become notices.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwq_convert.architecture import ModelShape

from qwq_local.errors import ModelFileError
from qwq_local.models.architecture import check_architecture
from qwq_local.models.header import Header

# What NVFP4 and its like carry beside a weight.
_OPTIONAL_SUFFIXES = (".scale", ".input_scale")
_NEEDED_KEYS = {
    "tokenizer.ggml.pre": "llama.cpp would split text in another way than the model was trained with",
    "tokenizer.ggml.token_type": "llama.cpp would take every special token for text",
}


def check_completeness(header: Header) -> ModelShape:
    """The shape of a model that is all there. Raises ModelFileError for what is missing or too much."""
    shape = check_architecture(header)
    for key, consequence in _NEEDED_KEYS.items():
        if header.scalar(key) is None and header.array_length(key) is None:
            raise ModelFileError(f"{header.path} lacks {key}: {consequence}. Fetch or convert it again.")
    known = {tensor.name for tensor in shape.tensors()}
    unknown = [name for name in header.tensors if name not in known and not name.endswith(_OPTIONAL_SUFFIXES)]
    if unknown:
        raise ModelFileError(
            f"{header.path} holds {len(unknown)} tensors that no {header.architecture} model has, first "
            f"{unknown[0]!r}: llama.cpp would refuse it. Fetch or convert it again."
        )
    return shape


def notices(header: Header) -> Iterator[str]:
    """One line for each thing that the model can do without and should not."""
    if not header.text("tokenizer.chat_template"):
        yield "no chat template (tokenizer.chat_template): qwq uses its built-in one."
    if header.integer("tokenizer.ggml.eos_token_id") is None:
        yield "no end token (tokenizer.ggml.eos_token_id): an answer may not end by itself."
