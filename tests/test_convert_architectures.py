"""What another architecture needs: one module with its names and keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwq_convert import architectures as package
from qwq_convert.architectures import architectures
from qwq_convert.checkpoint import CheckpointFolder, required_document
from qwq_convert.model_config import read_config
from qwq_convert.tensor_names import name_tensors

from tests.checkpoints import write_checkpoint


def test_every_module_of_the_folder_is_an_architecture() -> None:
    """A new architecture is a new file: nothing else lists them."""
    modules = {path.stem for path in Path(package.__path__[0]).glob("*.py")} - {"__init__"}
    assert {architecture.name for architecture in architectures()} == modules == {"qwen2"}


def test_tensors_are_named_by_the_tables_of_their_architecture(tmp_path: Path) -> None:
    """Tables alone make another architecture: here one whose embedding goes by other names."""
    with CheckpointFolder(write_checkpoint(tmp_path / "model")) as checkpoint:
        config = read_config(required_document(checkpoint, "config.json"))
        tables = dict(config.architecture.outer_tensors)
        tables["transformer.wte.weight"] = ("wte.weight", tables.pop("model.embed_tokens.weight")[1])
        other = replace(config.architecture, class_name="OtherForCausalLM", outer_tensors=tables)
        tensors = dict(checkpoint.tensors)
        embedding = tensors.pop("model.embed_tokens.weight")
        tensors["transformer.wte.weight"] = replace(embedding, name="transformer.wte.weight")
        named = name_tensors(tensors, replace(config, architecture=other))
    names = [tensor.name for tensor in named]
    assert "wte.weight" in names
    assert "token_embd.weight" not in names
