"""What was asked for as a backend: a model's name, a profile and places in, a local backend out."""

from __future__ import annotations

from pathlib import Path

from qwq_local.backend.local import LocalBackend
from qwq_local.backend.prefill_once import PrefillOnce
from qwq_local.engine.api import AbortFlag
from qwq_local.machine.hardware import physical_cores
from qwq_local.models.catalog import Catalog
from qwq_local.models.registry import Registry
from qwq_local.models.store import find_model, is_miniature
from qwq_local.paths import Directories
from qwq_local.planning.memory import Machine
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import ResolvedProfile


def meant_model(model: str, places: Directories) -> str:
    """The name of the miniature where the default is meant and that was chosen as such, else the name itself.

    Another default needs no other name: it is found under the usual one, and has its profile.
    """
    if model == DEFAULT_MODEL and is_miniature(default := Registry(places.data).read().default):
        return default
    return model


def model_file(model: str, resolved: ResolvedProfile, places: Directories) -> Path:
    """The GGUF that a name or path means. Raises ModelNotFound, UsageError for an ambiguous name."""
    catalog = Catalog(resolved.model, resolved.profile.repo, resolved.profile.files)
    return find_model(model, catalog, places.cache, places.data)


def local_backend(
    model: str,
    resolved: ResolvedProfile,
    places: Directories,
    machine: Machine | None = None,
    *,
    is_private: bool = False,
    is_roomy: bool = False,
) -> tuple[LocalBackend, AbortFlag]:
    """The backend, nothing loaded yet, and the flag that stops it; `is_roomy` is for a conversation.

    Raises ModelNotFound, UsageError for an ambiguous name.
    """
    profile, path = resolved.profile, model_file(model, resolved, places)
    abort = AbortFlag()
    once = PrefillOnce(places.cache, profile, is_private=is_private)
    backend = LocalBackend(path, profile, physical_cores(), abort, once, is_roomy=is_roomy)
    if machine is not None:
        backend.plan_for(machine)
    return backend, abort
