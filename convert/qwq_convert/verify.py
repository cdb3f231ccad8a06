"""A GGUF file in; its header out when the file is sound, else one error that says where it is not.

`verify_structure` looks at the header and the file's length alone, against a plan when there is one;
`verify_file` also reads every block of every tensor. Knows nothing of how the file was made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qwq_convert import ggml
from qwq_convert.gguf_header import GgufHeader, TensorEntry, read_header
from qwq_convert.writer import Layout
from qwq_local.errors import ConvertError

READ_ELEMENTS = 2**22


def verify_structure(path: Path, layout: Layout | None = None) -> GgufHeader:
    """The header of a GGUF whose tensors lie whole, aligned and apart in it.

    With `layout`, the file must also hold exactly the tensors planned, where they were planned.
    """
    header = read_header(path)
    if layout is None:
        return header
    for planned, found in zip(layout.tensors, header.tensors, strict=False):
        expected = TensorEntry(planned.name, planned.kind, planned.shape, planned.offset, planned.n_bytes)
        if found != expected:
            raise ConvertError(f"{path}: holds {found}, planned was {expected}. Convert again.")
    if len(header.tensors) != len(layout.tensors):
        counts = f"{len(header.tensors)} tensors, planned were {len(layout.tensors)}"
        raise ConvertError(f"{path}: holds {counts}. Convert again.")
    if header.file_bytes != header.data_start + layout.n_bytes:
        sizes = f"{header.file_bytes} bytes, planned were {header.data_start + layout.n_bytes}"
        raise ConvertError(f"{path}: has {sizes}. Convert again.")
    return header


def verify_file(path: Path) -> GgufHeader:
    """The header of a GGUF that is whole and in which every block of every tensor decodes to numbers."""
    header = verify_structure(path)
    with path.open("rb") as file:
        for tensor in header.tensors:
            step = ggml.tensor_bytes(
                tensor.kind, READ_ELEMENTS - READ_ELEMENTS % ggml.block_size(tensor.kind)
            )
            file.seek(header.data_start + tensor.offset)
            for start in range(0, tensor.n_bytes, step):
                content = file.read(min(step, tensor.n_bytes - start))
                if not ggml.is_valid(np.frombuffer(content, dtype=np.uint8), tensor.kind):
                    raise ConvertError(f"{path}: {tensor.name} has a damaged block. Convert it again.")
    return header
