"""Makes the backend that a model's name means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qwq_local.backend.api import Backend
from qwq_local.backend.local import LocalBackend
from qwq_local.backend.prefill_cache import PrefillCache
from qwq_local.engine.constraint import check_constraint
from qwq_local.engine.devices import can_offload
from qwq_local.engine.library import TESTED_VERSION
from qwq_local.errors import AbortFlag
from qwq_local.machine.hardware import idle_gpu_notice, physical_cores, present_gpu
from qwq_local.models.catalog import Catalog
from qwq_local.models.registry import Registry
from qwq_local.models.store import find_model, is_miniature
from qwq_local.paths import Directories
from qwq_local.planning.memory import Machine
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import ResolvedProfile

__all__ = [
    "LIBRARY",
    "BackendMaker",
    "BackendRequest",
    "check_constraint",
    "chosen_model",
    "hardware_notice",
    "make_backend",
    "model_file",
]

LIBRARY = f"llama-cpp-python {TESTED_VERSION}"
"""What computes a local reply, as the history records it."""


def chosen_model(model: str, places: Directories) -> str:
    """The name of the model that is used: the miniature's where it was made the default, else `model`.

    Another default is found under the usual name and has its profile.
    """
    if model == DEFAULT_MODEL and is_miniature(default := Registry(places.data).read().default):
        return default
    return model


def model_file(model: str, resolved: ResolvedProfile, places: Directories) -> Path:
    """The GGUF that a name or path means. Raises ModelNotFound, UsageError for an ambiguous name."""
    catalog = Catalog(resolved.model, resolved.profile.repo, resolved.profile.files)
    return find_model(model, catalog, places.cache, places.data)


@dataclass(frozen=True, slots=True)
class BackendRequest:
    """Which backend a front end wants.

    `machine` is a described computer to plan for; only plans are of use then. `is_private` reads what is kept
    of earlier prompts and keeps nothing. `takes_largest` is for a conversation: the largest native context.
    """

    model: str
    resolved: ResolvedProfile
    places: Directories
    machine: Machine | None = None
    is_private: bool = False
    takes_largest: bool = False


BackendMaker = Callable[[BackendRequest], Backend]
"""Makes a backend with nothing loaded yet. Raises ModelNotFound, UsageError for an ambiguous name."""


def make_backend(request: BackendRequest) -> Backend:
    """The backend of a model on this machine. Raises ModelNotFound, UsageError for an ambiguous name."""
    profile = request.resolved.profile
    path = model_file(request.model, request.resolved, request.places)
    cache = PrefillCache(request.places.cache, profile, is_private=request.is_private)
    backend = LocalBackend(
        path, profile, physical_cores(), AbortFlag(), cache, takes_largest=request.takes_largest
    )
    if request.machine is not None:
        backend.plan_for(request.machine)
    return backend


def hardware_notice(backend: Backend) -> str | None:
    """One line when a GPU is here that the installed library cannot use."""
    if not isinstance(backend, LocalBackend):
        return None
    return idle_gpu_notice(present_gpu(), can_offload=can_offload())
