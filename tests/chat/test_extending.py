"""Adds a slash command to a copy of the program as docs/extending.md says, and uses it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parent.parent.parent
USES_IT = """
import tempfile
from pathlib import Path
from qwq_local.history.archive import Archive
from tests.queued_backend import errors, says, talking

with Archive.private() as archive:
    talk = talking(archive, Path(tempfile.gettempdir()))
    talk.submit("One?", says("Let me see this.", "It is so."))
    assert talk.lines("/words") == ["3 words"]
    assert talk.lines("/words thought") == ["4 words"]
    assert errors(talk.submit("/words all")) == ["/words all: give answer or thought."]
    assert any(line.startswith("/words [answer|thought]  ") for line in talk.lines("/help"))
    assert talk.lines("/help words") == ["/words [answer|thought]", "  count the words of the last answer"]
    assert [each.text for each in talk.chat.complete("/wo")] == ["/words"]
    assert [each.text for each in talk.chat.complete("/words t")] == ["thought"]
    assert "Did you mean /words?" in errors(talk.submit("/word"))[0]
print("all of it works")
"""


def test_a_slash_command_is_added_as_the_guide_says(tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "extending.md").read_text()
    section = guide.partition("## A slash command\n")[2].partition("\n## ")[0]
    handler, entry = (dedent(block) for block in re.findall(r"```python\n(.*?) *```", section, re.DOTALL))
    for folder in ("qwq_local", "tests", "profiles"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    place = tmp_path / "qwq_local" / "chat" / "commands" / "output.py"
    before, start, after = place.read_text().partition("COMMANDS = (\n")
    place.write_text(f"{before}{handler}\n\n{start}{entry.rstrip()},\n{after}")

    ran = subprocess.run(
        [sys.executable, "-c", USES_IT],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'convert'}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "all of it works\n", ran.stderr
