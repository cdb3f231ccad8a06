"""An architecture is one file: nothing else lists it, and its tables name the tensors."""

from __future__ import annotations

from pathlib import Path

import qwq_convert.architectures as package
from qwq_convert.architectures import architectures


def test_every_module_of_the_folder_is_an_architecture() -> None:
    """A new architecture is a new file: nothing else lists them."""
    modules = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {"__init__"}
    assert {architecture.name for architecture in architectures()} == modules == {"qwen2", "qwen3"}
