"""The rooms of the architecture, held to: who may import whom, and one door to each large library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lower rooms first: a module imports from its own level and from those before it.
LEVELS = (
    ("qwq_local.errors", "qwq_local.events", "qwq_local.files", "qwq_local.text", "qwq_local.wire"),
    ("qwq_convert",),
    ("qwq_local.paths", "qwq_local.engine", "qwq_local.planning"),
    (
        *("qwq_local.machine.memory", "qwq_local.machine.here"),
        *("qwq_local.hub", "qwq_local.models", "qwq_local.dialogue", "qwq_local.history"),
    ),
    ("qwq_local.profiles", "qwq_local.machine", "qwq_local.reading", "qwq_local.backend.question"),
    ("qwq_local.backend", "qwq_local.splitting", "qwq_local.chat", "qwq_local.terminal"),
    ("qwq_local.cli",),
)
DOORS = {
    "typer": ("qwq_local.cli",),
    "click": (),
    "rich": ("qwq_local.terminal",),
    "prompt_toolkit": ("qwq_local.terminal",),
    "huggingface_hub": ("qwq_local.hub",),
    "httpx2": ("qwq_local.hub",),
    "filelock": ("qwq_local.files",),
    "jinja2": (),
    "llama_cpp": (
        "qwq_local.engine",
        "qwq_convert.ggml",
        "qwq_convert.imatrix.collector",
    ),
    "gguf": ("qwq_convert", "qwq_local.models"),
    "torch": (),
}
# Modules that must not be needed to print help: each costs more than the whole command line.
SLOW = (
    "llama_cpp",
    "numpy",
    "rich",
    "huggingface_hub",
    "httpx2",
    "jinja2",
    "gguf",
    "platformdirs",
    "tomllib",
    "sqlite3",
)


@cache
def sources() -> list[tuple[str, ast.Module]]:
    return list(_sources())


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for base in (ROOT, ROOT / "convert"):
        package = base / ("qwq_local" if base == ROOT else "qwq_convert")
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            yield name, ast.parse(path.read_text())


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def level(module: str) -> int | None:
    return next((i for i, places in enumerate(LEVELS) if within(module, places)), None)


def test_every_module_has_a_level() -> None:
    known = ("qwq_local", "qwq_local.__main__")
    assert [name for name, _ in sources() if level(name) is None and name not in known] == []


def test_no_lower_room_imports_a_higher_one() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in sources()
        for target in imported(tree)
        if (own := level(name)) is not None and (other := level(target)) is not None and other > own
    ]
    assert wrong == []


def test_the_converter_imports_only_errors_and_files() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in sources()
        for target in imported(tree)
        if name.startswith("qwq_convert")
        and target.startswith("qwq_local")
        and not within(target, ("qwq_local.errors", "qwq_local.files"))
    ]
    assert wrong == []


@pytest.mark.parametrize("library", DOORS)
def test_each_large_library_has_one_door(library: str) -> None:
    wrong = [
        name
        for name, tree in sources()
        if any(target.split(".")[0] == library for target in imported(tree))
        and not within(name, DOORS[library])
    ]
    assert wrong == []


def test_help_loads_nothing_slow() -> None:
    program = (
        "import sys\nfrom qwq_local.cli.main import main\n"
        f"main(['--help']); print([m for m in {SLOW!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_nothing_posix_only_is_imported_by_a_module() -> None:
    posix = ("fcntl", "termios", "pwd", "grp", "resource", "pty", "tty", "readline")
    wrong = [
        f"{name} imports {target}"
        for name, tree in sources()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in imported(ast.Module([node], []))
        if target in posix
    ]
    assert wrong == []
