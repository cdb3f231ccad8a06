"""What this machine can hold of a model: its memory measured, the profile's KV cache, as one value."""

from __future__ import annotations

from qwq_local.models.fit import Fit, Memory
from qwq_local.profile_keys import Profile


def measured_fit(profile: Profile) -> Fit:
    """The memory that is free now, with the KV cache type and the largest window of the profile."""
    from qwq_local.engine.memory import model_memory

    free_bytes, place = model_memory()
    window = int(profile.native_window * max(profile.yarn_factors))
    return Fit(Memory(free_bytes, place), profile.kv_type, profile.native_window, window)
