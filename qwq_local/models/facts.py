"""One model on this machine in, what its header says of it out: shape, window, template, tensors by type.

Reads headers only. What cannot be read becomes a reason in words, so that one bad file hides no other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from qwq_convert.architecture import ModelShape

from qwq_local.errors import ModelFileError
from qwq_local.models.architecture import check_architecture
from qwq_local.models.header import read_header
from qwq_local.models.inventory import LocalModel

_SHA256 = re.compile(r"(?:sha256-)?([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a header says. `tensors` counts them by type, `template` has the chat template's length."""

    name: str
    architecture: str
    shape: ModelShape
    template_chars: int
    tensors: Mapping[str, int]


def read_facts(model: LocalModel) -> Facts:
    """The facts of a model. Raises ModelFileError when qwq could not run it."""
    header = read_header(model.path)
    shape = check_architecture(header)
    kinds = Counter(tensor.kind.name for tensor in header.tensors.values())
    return Facts(
        name=header.text("general.name"),
        architecture=header.text("general.architecture"),
        shape=shape,
        template_chars=len(header.text("tokenizer.chat_template")),
        tensors=dict(kinds.most_common()),
    )


def shape_or_reason(model: LocalModel) -> ModelShape | str:
    """The model's shape, or in one line why there is none."""
    try:
        return read_facts(model).shape
    except ModelFileError as error:
        return str(error)


def stated_sha256(model: LocalModel) -> str:
    """The sha256 that the file should have: as noted when it came, or as its blob's name says; else empty."""
    if model.record.sha256:
        return model.record.sha256
    # Both the Hugging Face cache and ollama name a blob by its content.
    match = _SHA256.fullmatch(model.path.resolve().name)
    return match[1] if match else ""
