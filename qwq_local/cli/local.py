"""This machine: where its models are, which there are, and how much of a model its memory holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwq_local.hub.cache import HubCache
from qwq_local.models.catalog import Catalog
from qwq_local.models.inventory import Places, local_models
from qwq_local.paths import directories
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import ResolvedProfile, profile_folders, resolve

if TYPE_CHECKING:
    from qwq_local.models.facts import Fit
    from qwq_local.profiles.keys import Profile


def default_profile(variables: Mapping[str, str]) -> ResolvedProfile:
    """The profile of QwQ-32B without a task."""
    return resolve(DEFAULT_MODEL, None, profile_folders(directories(variables)), variables)


def model_places(variables: Mapping[str, str], resolved: ResolvedProfile) -> Places:
    """The folders that hold models, and what the profile's repository offers."""
    profile = resolved.profile
    catalog = Catalog(resolved.model, profile.repo, profile.files)
    return Places(directories(variables), catalog, HubCache.here(), variables)


def local_model_names(variables: Mapping[str, str]) -> list[str]:
    """The names of the models on this machine."""
    return [model.name for model in local_models(model_places(variables, default_profile(variables)))]


def measured_fit(profile: Profile) -> Fit:
    """The memory that is free now, with the KV cache type and the largest window of the profile."""
    # Both import numpy.
    from qwq_local.machine.hardware import this_machine
    from qwq_local.models.facts import Fit

    machine = this_machine()
    free_bytes, place = machine.available_bytes, "main memory"
    if machine.gpus and not machine.is_unified:
        free_bytes = sum(gpu.free_bytes for gpu in machine.gpus)
        place = " + ".join(gpu.description or gpu.name for gpu in machine.gpus)
    window = int(profile.native_window * max(profile.yarn_factors))
    kv_type = profile.kv_type or "q8_0"  # what a plan takes when f16 leaves too little room
    return Fit(free_bytes, place, kv_type, profile.native_window, window)
