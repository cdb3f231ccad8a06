"""`qwq cache`: lists the prefilled texts that are kept on disk, or removes them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from qwq_local.cli.local import default_profile
from qwq_local.engine.kv_entry import Entry, StateKey, clean_label
from qwq_local.engine.kv_store import KvFolder, kv_folder
from qwq_local.errors import UsageError
from qwq_local.files import remove_quietly
from qwq_local.paths import directories
from qwq_local.terminal.sanitizer import aligned_lines
from qwq_local.text import binary_size, plural

_AGE = re.compile(r"(?P<count>[0-9]{1,6})(?P<unit>[mhdw])")
_UNIT_S = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}

app = typer.Typer(
    invoke_without_command=True,
    help="List what was prefilled and is kept for the next question, or clear it.",
)


@app.callback()
def list_command(context: typer.Context) -> None:
    """List the prefilled texts that are kept on disk; `qwq cache clear` removes them."""
    if context.invoked_subcommand is None:
        for line in listing_lines(_folder(), time.time()):
            typer.echo(line)


@app.command("clear")
def clear_command(
    older: Annotated[
        str, typer.Option(metavar="AGE", help="Only what was not used for that long: 30m, 12h, 7d, 4w.")
    ] = "",
) -> None:
    """Remove the prefilled texts that are kept."""
    typer.echo(clear(_folder(), age_s(older) if older else None, time.time()))


def age_s(text: str) -> int:
    """The seconds of an age such as 7d. Raises UsageError."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise UsageError(f"--older {text[:20]!r}: write a number and m, h, d or w, such as --older 7d.")
    return int(match["count"]) * _UNIT_S[match["unit"]]


def listing_lines(folder: KvFolder, now_s: float) -> Iterator[str]:
    """The list as aligned lines, the last used first, then the size of all."""
    entries = folder.entries()
    if entries:
        rows = [("MODEL", "TOKENS", "SIZE", "KV", "USED")]
        yield from aligned_lines([*rows, *(_row(entry, now_s) for entry in entries)])
        yield ""
    total = sum(entry.file_bytes for entry in entries)
    held = f"{plural(len(entries), 'text')}, {binary_size(total)} of" if entries else "empty;"
    yield f"{held} at most {binary_size(folder.limit())}, in {folder.path}"


def clear(folder: KvFolder, older_s: int | None, now_s: float) -> str:
    """Removes all entries, or those unused for `older_s` seconds. Returns a line about it."""
    entries = [entry for entry in folder.entries() if older_s is None or now_s - entry.used_s >= older_s]
    for entry in entries:
        remove_quietly(entry.path)
    if older_s is None:
        folder.remove_abandoned(0)
    gone = [entry for entry in entries if not entry.path.exists()]
    return f"removed {plural(len(gone), 'text')}, {binary_size(sum(entry.file_bytes for entry in gone))}"


def _row(entry: Entry, now_s: float) -> tuple[str, ...]:
    record = entry.record
    return (
        clean_label(record.label) or "?",
        f"{record.n_tokens:,}",
        binary_size(entry.file_bytes),
        _kind(record.key),
        _ago(now_s - entry.used_s),
    )


def _kind(key: StateKey) -> str:
    types = key.kv_type_k if key.kv_type_k == key.kv_type_v else f"{key.kv_type_k}/{key.kv_type_v}"
    scaling = "linear" if key.is_linear else "YaRN"
    return f"{types} {scaling} {key.yarn_factor:g}" if key.yarn_factor > 1 else types


def _ago(elapsed_s: float) -> str:
    for unit, seconds in reversed(_UNIT_S.items()):
        if elapsed_s >= seconds:
            return f"{int(elapsed_s / seconds)}{unit} ago"
    return "just now"


def _folder() -> KvFolder:
    return kv_folder(directories(os.environ).cache, default_profile(os.environ).profile.kv_store)
