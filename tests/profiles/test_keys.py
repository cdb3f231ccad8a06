"""Keys: docs/keys.md lists them as they are declared, and the steps of docs/extending.md add one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwq_local.profiles.keys import MEANINGS, RULES, SAMPLER_KEYS, Profile

ROOT = Path(__file__).parent.parent.parent


def test_the_documentation_lists_every_key_as_it_is_declared() -> None:
    lines = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8").splitlines()
    default = Profile()
    expected = [
        f"| `{key}` | {rule.show(getattr(default, key)) or 'none'} | {rule.allowed} | {MEANINGS[key]} |"
        for key, rule in RULES.items()
    ]
    assert [line for line in lines if line.startswith("| `")] == expected


def test_every_meaning_is_one_line_that_ends_without_a_stop() -> None:
    for meaning in MEANINGS.values():
        assert meaning
        assert meaning.isprintable()
        assert not meaning.endswith(".")


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A copy of the program with the sampler key that docs/extending.md adds."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    section = text.partition("## A sampler key\n")[2].partition("\n## ")[0]
    declaration, step = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    shutil.copytree(ROOT / "qwq_local", tmp_path / "qwq_local", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("profiles", "miniature", "convert", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    api = tmp_path / "qwq_local" / "engine" / "api.py"
    code = api.read_text(encoding="utf-8")
    code = code.replace('"top_k", ', '"top_n_sigma", "top_k", ', 1)
    api.write_text(re.sub(r"(?=    top_k: int)", declaration, code, count=1), encoding="utf-8")
    sampler = tmp_path / "qwq_local" / "engine" / "sampler.py"
    code = sampler.read_text(encoding="utf-8")
    sampler.write_text(re.sub(r'(?= *"top_k": )', step, code, count=1), encoding="utf-8")
    return tmp_path


def qwq(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(folder), str(folder / "convert")])
    settings = {"PYTHONPATH": paths, "QWQ_CONFIG_DIR": str(folder / "config"), **environ}
    command = [sys.executable, "-m", "qwq_local", *arguments]
    return subprocess.run(command, env={**os.environ, **settings}, cwd=folder, capture_output=True, text=True)


def test_a_sampler_key_is_added_as_the_documentation_says(
    extended: Path, miniature: Callable[[str], Path]
) -> None:
    shown = qwq(extended, "profiles", "show", "chat", QWQ_TOP_N_SIGMA="2")
    assert shown.returncode == 0, shown.stderr
    rows = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines() if line}
    assert rows["top_n_sigma"] == ["2", "QWQ_TOP_N_SIGMA"]
    refused = qwq(extended, "profiles", "show", "chat", "--set", "top_n_sigma=-2")
    assert 'top_n_sigma is "-2", allowed: a number from -1 to 100.' in refused.stderr
    arguments = ["--model", str(miniature("Q8_0")), "--set", "top_n_sigma=1", "--set", "thinking_budget=16"]
    asked = qwq(extended, "ask", *arguments, "--set", "answer_reserve=32", "--set", "max_tokens=4", "hi")
    assert asked.returncode in (0, 6), asked.stderr


def test_the_sampler_gets_all_its_keys() -> None:
    settings = Profile().sampler_settings(seed=7)
    assert {key: getattr(settings, key) for key in SAMPLER_KEYS} == {
        key: getattr(Profile(), key) for key in SAMPLER_KEYS
    }
    assert settings.seed == 7
