"""The events of a running turn in, rows of the history out, within a second and at the end.

A thread of its own writes, so that no token waits for a disk; a kill at any moment loses a second at most.
Knows no database but through Turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from qwq_local.errors import HistoryError
from qwq_local.events import (
    Answer,
    Event,
    Finished,
    FinishReason,
    Generated,
    Planned,
    Prompted,
    Steered,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.history.database import HistoryBusy
from qwq_local.history.records import Origin, TurnRecord, TurnState
from qwq_local.history.rows import Piece, with_pieces
from qwq_local.history.turns import Ending, Turns

# With the quarter of a second that token ids may come later than their text, less than one second is lost.
WRITE_EVERY_S = 0.7
# How long a write may wait for another process: within a turn the next write takes what this one could not.
_WAIT_S = 0.5
_WAIT_AT_END_S = 3.0
_CUT = frozenset({FinishReason.INTERRUPTED, FinishReason.MAX_TOKENS, FinishReason.CONTEXT})


class TurnRecorder:
    """Writes one turn. Every method may be called from any thread, and none but `close` waits for long.

    Nothing raises when the history cannot be written: the turn goes on. `problem` then says so in one line,
    until a later write puts everything in place. Meanwhile the archive that made this recorder reads the turn
    from memory, whole; after the process it is LOST, with what was written.
    """

    def __init__(self, turns: Turns, begun: TurnRecord, write_every_s: float = WRITE_EVERY_S) -> None:
        self.turn_id = begun.id
        self._turns = turns
        self._begun = begun
        self._write_every_s = write_every_s
        self._gathering = _Gathering(begun.stats.thinking_tokens, begun.thinking_s)
        self._changes: dict[str, Any] = {}
        self._ending: Ending | None = None
        self._is_written = False
        self._problem: str | None = None
        self._lock = threading.Lock()  # what was gathered
        self._writes = threading.RLock()  # whoever moves it into the database, or reads both
        self._is_closed = False
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def problem(self) -> str | None:
        """Why what came is not in the history, as far as it is not."""
        return self._problem

    @property
    def is_written(self) -> bool:
        """Whether the turn has ended and is in the history whole."""
        return self._is_written

    def feed(self, event: Event) -> None:
        """Take the next event; Finished is in the history when this returns, unless `problem` says not."""
        with self._lock:
            if self._ending is not None:
                return
            self._take(event)
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_writing, name="history", daemon=True)
                self._thread.start()
        if isinstance(event, Finished):
            self._write()

    def set_origin(self, origin: Origin) -> None:
        """Keep what the turn is computed with; the conversation takes over its model and profile."""
        with self._lock:
            self._changes["origin"] = origin
        if self._is_written:
            self._write()

    def close(self) -> None:
        """Write what is left; a turn without Finished has been stopped. Closing twice is harmless.

        What cannot be written now is tried again every second, until `give_up`.
        """
        with self._lock:
            self._is_closed = True
            if self._ending is None:
                self._ending = Ending(TurnState.STOPPED, FinishReason.INTERRUPTED)
        self._write()

    def give_up(self) -> None:
        """Try once more to write what is left, and no more after that."""
        self._given_up.set()
        self.close()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block nothing moves into the database: what it holds and `completed` fit together."""
        with self._writes:
            yield

    def completed(self, written: TurnRecord) -> TurnRecord:
        """The turn as the database has it, with what is not there yet."""
        if self._is_written:
            return replace(written, **self._changes)
        with self._lock:
            turn = with_pieces(replace(written, **self._changes), self._gathering.pieces())
            ending = self._ending
        if ending is None:
            return turn
        return replace(
            turn,
            state=ending.state,
            reason=ending.reason,
            stats=ending.stats or turn.stats,
            thinking=turn.thinking if ending.thinking is None else ending.thinking,
            answer=turn.answer if ending.answer is None else ending.answer,
        )

    def _take(self, event: Event) -> None:
        match event:
            case Planned():
                # A turn that is gone on with keeps its own; its origin has the plan of what follows.
                if not self._begun.plan:
                    self._changes["plan"] = asdict(event)
            case Prompted():
                self._changes["prompt"] = event.tokens
            case ThinkingClosed():
                self._changes["closed"] = event.reason
                self._gathering.thinking_s = self._begun.thinking_s + event.elapsed_s
            case Finished():
                state = TurnState.STOPPED if event.reason in _CUT else TurnState.DONE
                stats = _together(self._begun.stats, event.stats)
                self._ending = Ending(state, event.reason, stats, event.thinking, event.answer)
            case _:
                self._gathering.take(event)

    def _keep_writing(self) -> None:
        while not self._given_up.wait(self._write_every_s) and not self._is_written:
            self._write()

    def _write(self) -> None:
        """Write what has come, all of it or nothing; note why it could not be."""
        with self._writes:
            with self._lock:
                changes, ending = self._changes, self._ending
                gathered, ahead = self._gathering.parted(is_end=ending is not None)
                self._gathering, self._changes = ahead, {}
            try:
                self._put(gathered, changes, ending)
                self._problem = None
            except HistoryError as error:
                with self._lock:
                    self._gathering = gathered.joined(self._gathering)
                    self._changes = {**changes, **self._changes}
                if not isinstance(error, HistoryBusy) or self._is_closed:
                    self._problem = f"this turn is not being kept: {error}"

    def _put(self, gathered: _Gathering, changes: dict[str, Any], ending: Ending | None) -> None:
        if self._is_written:
            if changes:
                self._turns.change(self.turn_id, changes)
        elif ending is not None:
            self._turns.end(self.turn_id, gathered.piece(), replace(ending, changes=changes), _WAIT_AT_END_S)
            self._is_written = True
        elif changes or not gathered.is_empty:
            self._turns.append(self.turn_id, gathered.piece(), changes, _WAIT_S)


class _Gathering:
    """What came since the last write.

    Texts come before the ids of their tokens. A turn that tells of those is written up to them, no further:
    what is gone on with from its ids is what was kept.
    """

    def __init__(self, thinking_tokens: int, thinking_s: float, seen_at: float | None = None) -> None:
        self.thinking: list[str] = []
        self.answer: list[str] = []
        self.steered: list[str] = []
        self.start: int | None = None
        self.tokens: list[int] = []
        self.thinking_tokens = thinking_tokens
        self.thinking_s = thinking_s
        self.seen_at = seen_at  # when the last of the thinking came
        self.tells_tokens = False
        self._marks = (0, 0, 0)  # how many thinking, answers and steered belong to ids that were told

    @property
    def is_empty(self) -> bool:
        return not self.thinking and not self.answer and self.start is None

    def take(self, event: Event) -> None:
        match event:
            case Thinking() | Steered():
                now = time.monotonic()
                self.thinking_s += now - (self.seen_at or now)
                self.seen_at = now
                self.thinking.append(event.text)
                if isinstance(event, Steered):
                    self.steered.append(event.text)
            case Answer():
                self.answer.append(event.text)
            case Generated():
                self.thinking_tokens = event.thinking
                self._take_tokens(event.start, event.tokens)
                self.tells_tokens = True
                self._marks = self._lengths

    @property
    def _lengths(self) -> tuple[int, int, int]:
        return len(self.thinking), len(self.answer), len(self.steered)

    def _take_tokens(self, start: int, tokens: tuple[int, ...] | list[int]) -> None:
        if self.start is None or start <= self.start:
            self.start, self.tokens = start, list(tokens)
        else:
            self.tokens[start - self.start :] = tokens

    def piece(self) -> Piece:
        return Piece(
            thinking="".join(self.thinking),
            answer="".join(self.answer),
            steered=tuple(self.steered),
            start=self.start,
            tokens=tuple(self.tokens),
            thinking_tokens=self.thinking_tokens,
            thinking_s=self.thinking_s,
        )

    def pieces(self) -> list[Piece]:
        return [] if self.is_empty else [self.piece()]

    def parted(self, *, is_end: bool) -> tuple[_Gathering, _Gathering]:
        """What is to be written now, and what waits for the ids of its tokens; at the end nothing waits."""
        later = _Gathering(self.thinking_tokens, self.thinking_s, self.seen_at)
        later.tells_tokens = self.tells_tokens
        if self.tells_tokens and not is_end:
            thinking, answer, steered = self._marks
            self.thinking, later.thinking = self.thinking[:thinking], self.thinking[thinking:]
            self.answer, later.answer = self.answer[:answer], self.answer[answer:]
            self.steered, later.steered = self.steered[:steered], self.steered[steered:]
        return self, later

    def joined(self, later: _Gathering) -> _Gathering:
        """This one and what came after it."""
        thinking, answer, steered = self._lengths
        self._marks = thinking + later._marks[0], answer + later._marks[1], steered + later._marks[2]
        self.tells_tokens = later.tells_tokens
        self.thinking += later.thinking
        self.answer += later.answer
        self.steered += later.steered
        if later.start is not None:
            self._take_tokens(later.start, later.tokens)
        self.thinking_tokens, self.thinking_s = later.thinking_tokens, later.thinking_s
        self.seen_at = later.seen_at
        return self


def _together(before: TurnStats, now: TurnStats) -> TurnStats:
    """The figures of a turn that was taken up again: its tokens are told whole, its seconds are added."""
    if not before.decode_s:  # nobody counted those of a process that died
        return now
    return replace(
        now,
        prefill_s=before.prefill_s + now.prefill_s,
        decode_s=before.decode_s + now.decode_s,
        cached_tokens=before.cached_tokens,
        resumed_tokens=0,
        resumed_cached=0,
    )
