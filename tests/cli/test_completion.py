"""The shell completes values of flags, as bash asks the real command for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qwq_local.cli import completion
from tests.command import qwq


def completed(cache: Path, line: str) -> list[str]:
    """The completions that bash gets for the last word of the line."""
    at = str(line.count(" "))
    ran = qwq(cache, HOME=str(cache), _QWQ_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=at)
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("complete", "typed", "expected"),
    [
        (completion.types, "q4_k", ["q4_k_M", "q4_k_S"]),
        (completion.types, "Q8", ["Q8_0"]),
        (completion.machines, "rtx-40", ["rtx-4090"]),
    ],
)
def test_values_with_the_same_beginning_are_offered(
    complete: Callable[[str], list[str]], typed: str, expected: list[str]
) -> None:
    assert complete(typed) == expected


def test_a_key_is_offered_with_its_meaning() -> None:
    found = completion.settings("top")
    assert [value for value, _ in found] == ["top_k=", "top_p="]
    assert found[0][1] == "keep this many of the likeliest tokens; 0: all"
    assert completion.settings("is_") == completion.settings("zzz") == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qwq ask --set dry_w", ["dry_window="]),
        ("qwq convert folder q4_k", ["q4_k_M", "q4_k_S"]),
        ("qwq models show mini", ["miniature"]),
    ],
)
def test_bash_receives_the_completions(tmp_path: Path, line: str, expected: list[str]) -> None:
    assert completed(tmp_path, line) == expected


def test_a_users_profile_is_completed_and_a_broken_one_is_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "config" / "profiles" / "tasks"
    folder.mkdir(parents=True)
    (folder / "cooking.toml").write_text("description = 'x'\n")
    (folder / "cut.toml").write_text("= [")
    assert completed(tmp_path, "qwq ask -p c") == ["chat", "choice", "code", "cooking", "cut"]
    (tmp_path / "config" / "profiles" / "models").mkdir()
    (tmp_path / "config" / "profiles" / "models" / "qwq-32b.toml").write_text("= [")
    assert completed(tmp_path, "qwq ask --model min") == []
