"""The documents are true: their commands run, their flags exist, the file tree is right."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.command import environment, qwq_here
from tests.hub_server import LocalHub, StoredFile

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HARDWARE = "<!-- hardware: only parsed in CI -->"
HUB = "<!-- hub: CI runs it against a hub of its own -->"
_BLOCK = re.compile(
    rf"(?P<mark>{re.escape(HARDWARE)}\n|{re.escape(HUB)}\n)?```sh\n(?P<code>.*?)```", re.DOTALL
)
COMMANDS = (
    *(
        ("ask",),
        ("cache",),
        ("cache", "clear"),
        ("chat",),
        ("convert",),
        ("imatrix",),
        ("models",),
        ("plan",),
        ("profiles",),
    ),
    ("profiles", "show"),
    ("pull",),
    ("verify",),
    (),
    *(("history",), *(("history", name) for name in ("search", "show", "export", "rm"))),
)
# For a shell only; a test has its own environment.
_SHELL_ONLY = ("source ",)


def commands(mark: str = "") -> list[str]:
    """The lines of README's shell blocks that carry the mark."""
    blocks = [match for match in _BLOCK.finditer(README) if (match["mark"] or "").strip() == mark]
    return [line for block in blocks for line in block["code"].splitlines() if line.strip()]


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of a clone that the commands name. Commands share it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("README.md", "miniature"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def hub(miniature: Callable[[str], Path]) -> Iterator[LocalHub]:
    """A hub with the miniature in place of QwQ-32B: two types and the weights."""
    types = ("Q4_K_M", "Q6_K")
    ggufs = {f"qwq-32b-{name.lower()}.gguf": StoredFile(miniature(name).read_bytes()) for name in types}
    weights = {
        path.name: StoredFile(path.read_bytes(), is_large=path.suffix == ".safetensors")
        for path in (ROOT / "miniature" / "checkpoint").iterdir()
    }
    hub = LocalHub({"Qwen/QwQ-32B-GGUF": ggufs, "Qwen/QwQ-32B": weights})
    with hub.served():
        yield hub


@pytest.mark.parametrize("command", commands(HUB))
def test_every_command_that_needs_the_hub_works(
    command: str, hub: LocalHub, own_cache: Path, clone: Path
) -> None:
    # The smallest KV cache, for machines with little memory.
    variables = environment(own_cache, HF_ENDPOINT=hub.hub_url, QWQ_KV_TYPE="q4_0")
    result = run(command, clone, variables)
    assert result.returncode == 0, result.stderr


def run(command: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = command.replace("qwq ", f"{shlex.quote(sys.executable)} -m qwq_local ", 1)
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_works(command: str, own_cache: Path, clone: Path) -> None:
    if command.startswith("make "):
        target = shlex.split(command)[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if command.startswith(_SHELL_ONLY):
        return
    result = run(command, clone, environment(own_cache))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() or result.stderr.strip()


@pytest.mark.parametrize("command", commands(HARDWARE))
def test_commands_that_need_hardware_are_at_least_commands(command: str) -> None:
    words = shlex.split(command)
    assert next(word for word in words if "=" not in word) in ("pip", "hf", "qwq")
    if any("llama-cpp-python" in word for word in words):
        assert "llama-cpp-python==0.3.36" in words


@cache
def help_of(*command: str) -> str:
    ran = qwq_here(ROOT, *command, "--help")
    assert ran.status == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("document", ["README.md", "CHANGELOG.md", "docs/jsonl.md"])
def test_flags_and_commands_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    known = "".join(help_of(*command) for command in COMMANDS)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - {
        "--extra-index-url",
        "--no-binary",
        "--no-deps",
        "--check",
    }
    assert {flag for flag in flags if flag not in known} == set()
    named = set(re.findall(r"`qwq ([a-z]+)", text)) - {"chat"}
    assert {command for command in named if f"  {command} " not in help_of()} == set()


def tree() -> Iterator[str]:
    """The paths of README's file tree."""
    block = README.partition("## How it is built\n")[2].partition("```")[0]
    folder = ""
    for line in block.splitlines():
        if match := re.match(r"^( {4,})([\w./-]+)(?: |$)", line):
            nested = len(match[1]) > 4
            folder = folder if nested else match[2]
            yield folder + match[2] if nested else match[2]


def test_the_file_tree_of_the_readme_is_there() -> None:
    paths = list(tree())
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []
    rooms = {path.name for path in (ROOT / "qwq_local").iterdir() if path.is_dir()} - {"__pycache__"}
    assert {f"qwq_local/{room}/" for room in rooms} <= set(paths)


def test_figures_of_the_readme_are_measured_ones() -> None:
    figures = README.partition("<!-- figures -->")[2].partition("##")[0]
    measured = (ROOT / "docs" / "measured.md").read_text()
    numbers = set(re.findall(r"\d+(?:\.\d+)?", figures))
    assert numbers
    assert {number for number in numbers if number not in measured} == set()


def test_contributing_stays_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
