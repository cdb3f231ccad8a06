"""Fixtures that several tests share: the miniature as real GGUFs, loaded once a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from qwq_local.engine.model import LoadedModel, LoadSettings, drained, load_model
from qwq_local.errors import AbortFlag
from qwq_local.models.header import read_header, special_token_ids
from qwq_local.models.store import converted_miniature

# The same cases on every run, so that a failure comes from the change;
# `--hypothesis-profile random` looks for others.
settings.register_profile("same", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("same")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory for the whole run, so that the miniature is converted once for each type."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def miniature(cache: Path) -> Callable[[str], Path]:
    """The bundled miniature as a GGUF of a type, converted by our converter."""
    return lambda file_type: converted_miniature(cache, file_type)


@pytest.fixture(scope="session")
def loaded(miniature: Callable[[str], Path]) -> Iterator[LoadedModel]:
    """The miniature in Q8_0, loaded by llama.cpp."""
    model = load(miniature("Q8_0"))
    yield model
    model.close()


def load(path: Path, abort: AbortFlag | None = None) -> LoadedModel:
    """The model of a GGUF, its progress drained."""
    special_ids = special_token_ids(read_header(path))
    return drained(load_model(path, LoadSettings(special_ids=special_ids), abort or AbortFlag()))
