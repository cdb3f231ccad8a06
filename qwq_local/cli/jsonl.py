"""Events in, one JSON object a line out. The format is documented in docs/jsonl.md and versioned there."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TextIO

from qwq_local.events import Finished, Generated, Planned, Prompted, TurnStats
from qwq_local.planning.devices import Machine
from qwq_local.planning.table import Row
from qwq_local.splitting.passes import PartDone, SplitEvent

VERSION = 1
_WORD_START = re.compile(r"(?<!^)(?=[A-Z])")


def event_line(event: SplitEvent) -> str:
    """The event as one line of JSON: `v`, `event`, then its fields by name; nothing for one of token ids."""
    if isinstance(event, Prompted | Generated):
        return ""
    name = _WORD_START.sub("_", type(event).__name__).lower()
    values = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
    fields = {key: _plain(value) for key, value in values.items()}
    if isinstance(event, Finished | PartDone):
        fields["stats"] = stats_object(event.stats)
    return _line({"v": VERSION, "event": name, **fields})


def _plain(value: object) -> object:
    """The value as JSON has it: what is made of fields as an object, fractions rounded for reading."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    return round(value, 4) if isinstance(value, float) else value


def plan_line(
    model: str, machine: Machine, rows: Sequence[Row], planned: Planned | None, problem: Exception | None
) -> str:
    """The line of `qwq plan --json`: model, machine, the table, the plan or why there is none."""
    return _line(
        {
            "v": VERSION,
            "model": model,
            "machine": _plain(machine),
            "table": _plain(tuple(rows)),
            "plan": _plain(planned),
            "error": None if problem is None else str(problem),
        }
    )


def stats_object(stats: TurnStats) -> dict[str, float]:
    """Tokens, seconds and tokens per second of a turn, rounded for reading."""
    values = {key: round(value, 4) for key, value in dataclasses.asdict(stats).items()}
    rates = {"prefill_rate": round(stats.prefill_rate, 2), "decode_rate": round(stats.decode_rate, 2)}
    return {**values, **rates}


def answer_line(asked: object, finished: Finished) -> str:
    """The line that answers one question of `--each`; `asked` is its id."""
    return _line(
        {
            "v": VERSION,
            "id": asked,
            "answer": finished.answer,
            "thinking": finished.thinking,
            "reason": finished.reason,
            "stats": stats_object(finished.stats),
        }
    )


def error_line(asked: object, line_number: int, problem: str) -> str:
    """The line for a question that could not be asked or answered."""
    return _line({"v": VERSION, "id": asked, "line": line_number, "error": problem})


def object_line(event: str, fields: Mapping[str, object]) -> str:
    """A line for what is no event of a turn: `v`, `event`, then the fields as they are."""
    return _line({"v": VERSION, "event": event, **fields})


def work_line(event: object) -> str:
    """An event of a conversion or a download as one line of JSON; paths are texts."""
    name = _WORD_START.sub("_", type(event).__name__).lower()
    values = {
        field.name: getattr(event, field.name)
        for field in dataclasses.fields(event)  # type: ignore[arg-type]  # every event is a dataclass
    }
    return _line({"v": VERSION, "event": name, **{key: _plain(value) for key, value in values.items()}})


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def write_line(stream: TextIO, line: str) -> None:
    """Write a line so that a reader has it at once."""
    stream.write(line)
    stream.flush()
