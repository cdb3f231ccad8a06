"""How fast a model will read and write, before anything was measured: bytes on devices in, rough rates out.

Writing a token takes one pass over the weights, so memory bandwidth decides; reading is done in batches and
is a multiple of that. Good for "minutes or hours", not more. Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwq_local.events import DeviceBytes

# Bytes of weights per second: about two channels of DDR4, and a card of the middle class.
_CPU_BANDWIDTH, _GPU_BANDWIDTH = 20e9, 400e9
# Tokens read in the time of one written, by a batch of 512.
_CPU_BATCHING, _GPU_BATCHING = 5.0, 25.0
# What a token costs however small the model is.
_LEAST_WRITE_S, _LEAST_READ_S = 5e-3, 2e-4


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens read and written per second, tokens written in a turn, and whether all that was measured."""

    prefill: float
    decode: float
    written: float
    is_measured: bool = False

    def seconds(self, prompt_tokens: int, turns: int) -> float:
        """How long so many turns take, that read so many tokens together."""
        return prompt_tokens / self.prefill + turns * self.written / self.decode


def estimated_rates(devices: Sequence[DeviceBytes], written: int) -> Rates:
    """Rates by where the weights are; the last device is the main memory."""
    read_s, write_s = _LEAST_READ_S, _LEAST_WRITE_S
    for device in devices[:-1]:
        write_s += device.weights / _GPU_BANDWIDTH
        read_s += device.weights / _GPU_BANDWIDTH / _GPU_BATCHING
    for device in devices[-1:]:
        write_s += device.weights / _CPU_BANDWIDTH
        read_s += device.weights / _CPU_BANDWIDTH / _CPU_BATCHING
    return Rates(1 / read_s, 1 / write_s, float(written))
