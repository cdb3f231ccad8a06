"""Does what docs/extending.md says about a backend, in a copy of the program, and asks that backend."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.command import ROOT

USES_IT = """
import json
from pathlib import Path

import qwq_local
from qwq_local.backend.api import Adopts, Backend, CountsTokens, Identified, Keeps, Plans
from qwq_local.backend.echo import EchoBackend
from tests.command import qwq_here

def qwq(*arguments, stdin=None):
    return qwq_here(Path("cache"), *arguments, stdin=stdin)

assert isinstance(EchoBackend(), Backend)
assert not any(isinstance(EchoBackend(), other) for other in (Adopts, CountsTokens, Identified, Keeps, Plans))

asked = qwq("ask", "--model", "echo", "--think", "show", "Is it so?")
assert (asked.status, asked.stdout.split()) == (0, ["Is", "it", "so?"]), asked
assert "What did they say?" in asked.stderr
continued = qwq("ask", "-c", "And now?")
assert continued.stdout.split() == ["And", "now?"], continued

lines = b'{"id": 1, "question": "One?"}\\n{"id": 2, "question": "Two?"}\\n'
each = qwq("ask", "--model", "echo", "--each", stdin=lines)
assert [json.loads(line)["answer"].strip() for line in each.stdout.splitlines()] == ["One?", "Two?"], each

talked = qwq("chat", "--model", "echo", stdin=b"How are you?\\n/plan\\n/stats\\nAnd you?\\n")
assert "How are you?" in talked.stdout and "And you?" in talked.stdout, talked
assert "there is no command /plan." in talked.stderr, talked

for refused in (("--dry-run",), ("--split",), ("--regex", "[0-9]")):
    ran = qwq("ask", "--model", "echo", *refused, "Why?")
    assert (ran.status, ran.stdout) == (2, ""), ran

with qwq_local.open("echo") as model:
    assert model.answer("Is it so?").split() == ["Is", "it", "so?"]
print("all of it works")
"""


def test_a_backend_is_added_as_the_guide_says(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "extending.md").read_text()
    section = guide.partition("## A backend\n")[2].partition("\n## ")[0]
    module, choice = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for folder in ("qwq_local", "tests", "profiles"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "qwq_local" / "backend" / "echo.py").write_text(module)
    make = tmp_path / "qwq_local" / "backend" / "make.py"
    before, start, after = make.read_text().partition("def make_backend(")
    signature, line, body = after.partition("    profile = request.resolved.profile\n")
    make.write_text(f"{before}{start}{signature}{choice}{line}{body}")

    ran = subprocess.run(
        [sys.executable, "-c", USES_IT],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'convert'}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "all of it works\n", ran.stderr
