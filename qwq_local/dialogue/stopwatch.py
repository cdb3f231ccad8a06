"""The time that a turn takes, prefill and decode apart; the time that a person let it wait is nobody's."""

from __future__ import annotations

from collections.abc import Callable

from qwq_local.dialogue.control import TurnControl
from qwq_local.engine.api import Aborted, AbortFlag

_PAUSE_STEP_S = 0.02


class Stopwatch:
    """Runs from the moment it is made, in the prefill; `decodes` ends that. Seconds by the clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._decode_began: float | None = None
        self._paused_s = 0.0

    def decodes(self) -> None:
        """The prefill is done."""
        self._decode_began = self._clock()

    @property
    def has_prefilled(self) -> bool:
        """Whether the prefill is done."""
        return self._decode_began is not None

    @property
    def prefill_s(self) -> float:
        """How long the prefill took, or takes."""
        end = self._clock() if self._decode_began is None else self._decode_began
        return end - self._began

    @property
    def decode_s(self) -> float:
        """How long the decode takes since."""
        return 0.0 if self._decode_began is None else self._clock() - self._decode_began - self._paused_s

    def wait(self, control: TurnControl, abort: AbortFlag) -> None:
        """Wait for the end of a pause. Raises Aborted when the flag is set meanwhile."""
        began = self._clock()
        try:
            while not control.wait(_PAUSE_STEP_S):
                if abort:
                    raise Aborted
        finally:
            self._paused_s += self._clock() - began
