"""`qwq cache`: lists the prefilled texts and removes them."""

from __future__ import annotations

import os
import struct
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qwq_local.cli.cache import age_s, clear, listing_lines
from qwq_local.engine.api import ContextSettings
from qwq_local.engine.kv_entry import (
    EntryRecord,
    ModelIdentity,
    StateKey,
    append_trailer,
    checksum,
    entry_name,
    packed,
)
from qwq_local.engine.kv_store import KvFolder
from qwq_local.errors import UsageError
from tests.command import qwq

KEY = StateKey.of(ModelIdentity("header"), ContextSettings(n_ctx=64))
NOW_S = 2_000_000_000.0
DAY_S = 86_400


def an_entry(folder: KvFolder, n_tokens: int, unused_s: float, key: StateKey = KEY, label: str = "") -> Path:
    """An entry whose state is only its tokens."""
    tokens = packed(range(n_tokens))
    content = struct.pack("<III", 0x67677371, 3, n_tokens) + tokens
    with folder.new_file() as path:
        path.write_bytes(content)
        record = EntryRecord(
            key, label or "QwQ 32B", n_tokens, 0.0, len(content), checksum(path, len(content))
        )
        append_trailer(path, record)
        made = path.rename(folder.path / entry_name(key, tokens))
    os.utime(made, (NOW_S - unused_s, NOW_S - unused_s))
    return made


def test_the_list_has_all_entries_the_last_used_first(tmp_path: Path) -> None:
    folder = KvFolder(tmp_path / "kv", 1 << 30)
    an_entry(folder, 300_000, 3 * DAY_S)
    an_entry(folder, 100, 30, replace(KEY, kv_type_v="q8_0", yarn_factor=4.0, yarn_origin=32_768))
    an_entry(folder, 200, 7200, replace(KEY, kv_type_k="q8_0", kv_type_v="q8_0"), "evil\x1b[2Jname")
    assert list(listing_lines(folder, NOW_S)) == [
        "MODEL         TOKENS   SIZE         KV               USED",
        "QwQ 32B       100      763 bytes    f16/q8_0 YaRN 4  just now",
        "evil [2Jname  200      1,170 bytes  q8_0             2h ago",
        "QwQ 32B       300,000  1.1 MiB      f16              3d ago",
        "",
        f"3 texts, 1.1 MiB of at most 1.0 GiB, in {folder.path}",
    ]


def test_clearing_removes_all_or_what_was_not_used_for_that_long(tmp_path: Path) -> None:
    folder = KvFolder(tmp_path / "kv", 1 << 30)
    old, new = an_entry(folder, 300, 7 * DAY_S), an_entry(folder, 400, 7 * DAY_S - 1)
    other = folder.path / "notes.txt"
    other.write_text("mine")
    with folder.new_file() as half_written:
        assert clear(folder, age_s("1w"), NOW_S) == "removed 1 text, 1,559 bytes"
        assert (old.exists(), new.exists(), half_written.exists()) == (False, True, True)
        assert clear(folder, None, time.time()) == "removed 1 text, 1,959 bytes"
        assert not half_written.exists()
    assert list(folder.path.iterdir()) == [other]


@pytest.mark.parametrize(
    ("text", "seconds"), [("30m", 1800), ("12h", 43_200), ("7d", 604_800), ("2w", 1_209_600)]
)
def test_ages_are_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert age_s(text) == seconds


@pytest.mark.parametrize("text", ["7", "d", "-1d", "1.5h", "7days", "9999999d", "٣d"])
def test_other_ages_are_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="--older 7d"):
        age_s(text)


def test_the_command_lists_and_clears(tmp_path: Path) -> None:
    folder = KvFolder(tmp_path / "kv")
    made = an_entry(folder, 300, 0)
    listed = qwq(tmp_path, "cache", QWQ_KV_STORE="2")
    assert (listed.status, listed.stderr) == (0, "")
    assert listed.stdout.splitlines()[-1] == f"1 text, 1,559 bytes of at most 2.0 GiB, in {folder.path}"
    assert qwq(tmp_path, "cache", "clear", "--older", "yesterday").status == 2
    assert made.exists()
    assert qwq(tmp_path, "cache", "clear").stdout == "removed 1 text, 1,559 bytes\n"
    assert not made.exists()
    listed = qwq(tmp_path, "cache", QWQ_KV_STORE="2")
    assert listed.stdout == f"empty; at most 2.0 GiB, in {folder.path}\n"
