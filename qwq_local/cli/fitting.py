"""What this machine can hold of a model: its memory measured, the profile's KV cache, as one value."""

from __future__ import annotations

from qwq_local.models.fit import Fit, Memory
from qwq_local.profiles.keys import Profile

# What a plan gives a KV cache when f16 leaves too little room, and what sizes are estimated with.
USUAL_KV_TYPE = "q8_0"


def measured_fit(profile: Profile) -> Fit:
    """The memory that is free now, with the KV cache type and the largest window of the profile."""
    from qwq_local.machine.here import this_machine

    machine = this_machine()
    free_bytes, place = machine.available_bytes, "main memory"
    if machine.gpus and not machine.is_unified:
        free_bytes = sum(gpu.free_bytes for gpu in machine.gpus)
        place = " + ".join(gpu.description or gpu.name for gpu in machine.gpus)
    window = int(profile.native_window * max(profile.yarn_factors))
    kv_type = profile.kv_type or USUAL_KV_TYPE
    return Fit(Memory(free_bytes, place), kv_type, profile.native_window, window)
