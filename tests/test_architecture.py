"""The rules of the architecture: imports point down, a library has one door, a class name is used once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.command import environment

ROOT = Path(__file__).parent.parent
# Every room, from the top: a module imports from its own room and from those below.
ROOMS = (
    "qwq_local.__main__",
    "qwq_local.api",
    "qwq_local.cli",
    "qwq_local.terminal",
    "qwq_local.chat",
    "qwq_local.backend",
    "qwq_local.dialogue",
    "qwq_local.machine",
    "qwq_local.profiles",
    "qwq_local.models",
    "qwq_local.hub",
    "qwq_local.history",
    "qwq_local.engine",
    "qwq_local.planning",
    "qwq_convert",
    "qwq_local.wire",
    "qwq_local.utf8",
    "qwq_local.files",
    "qwq_local.paths",
    "qwq_local.settings",
    "qwq_local.text",
    "qwq_local.events",
    "qwq_local.errors",
    "qwq_local",
)
DOORS = {
    "click": (),
    "filelock": ("qwq_local.files",),
    "gguf": ("qwq_convert",),
    "httpx2": ("qwq_local.hub",),
    "huggingface_hub": ("qwq_local.hub",),
    "jinja2": (),
    "llguidance": ("qwq_local.engine.constraint",),
    "llama_cpp": ("qwq_local.engine", "qwq_convert.ggml", "qwq_convert.imatrix.collector"),
    "platformdirs": ("qwq_local.paths",),
    "prompt_toolkit": ("qwq_local.terminal",),
    "rich": ("qwq_local.terminal",),
    "tokenizers": ("qwq_convert.tokenizer_check",),
    "torch": (),
    "typer": ("qwq_local.cli",),
    "wcwidth": ("qwq_local.dialogue.excerpts",),
    "markdown_it": ("qwq_local.chat", "qwq_local.history", "qwq_local.terminal"),
    "yaml": ("qwq_convert.metadata",),
}
# A module of these may be short and have one importer: a command, a prompt format, an architecture.
ONE_EACH = (
    "qwq_local.cli",
    "qwq_local.chat.commands",
    "qwq_local.dialogue.prompts",
    "qwq_convert.architectures",
)
FEWEST_LINES = 100
# Modules that help must not load: each costs more time than the whole command line.
SLOW = (
    "gguf",
    "httpx2",
    "huggingface_hub",
    "jinja2",
    "llama_cpp",
    "llguidance",
    "numpy",
    "platformdirs",
    "prompt_toolkit",
    "rich",
    "sqlite3",
    "tomllib",
)
# Commands that run llama.cpp themselves, or work on its files.
ENGINE_COMMANDS = ("cache", "environment", "imatrix", "main", "verify")
POSIX_ONLY = ("fcntl", "termios", "pwd", "grp", "resource", "pty", "tty", "readline")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the program by its name."""
    found = {}
    for package in (ROOT / "qwq_local", ROOT / "convert" / "qwq_convert"):
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text())
    return found


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What the nodes import; `from package import module` counts as the module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules() else node.module


@cache
def imports() -> frozenset[tuple[str, str]]:
    """Every import in the program, inside functions too: importer and imported module."""
    return frozenset(
        (name, target) for name, tree in modules().items() for target in imported(ast.walk(tree))
    )


def within(module: str, places: Iterable[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def room(module: str) -> str | None:
    """The room of a module: the longest of the names that contain it; only `__init__` is in `qwq_local`."""
    found = [name for name in ROOMS if within(module, (name,)) and (name != "qwq_local" or module == name)]
    return max(found, key=len, default=None)


def test_every_module_is_in_a_room() -> None:
    assert [name for name in modules() if room(name) is None] == []


def test_no_room_imports_from_a_higher_one() -> None:
    upward = []
    for name, target in sorted(imports()):
        own, other = room(name), room(target)
        # The package offers the public API, which it imports when it is used.
        if (name, other) == ("qwq_local", "qwq_local.api"):
            continue
        if own and other and ROOMS.index(other) < ROOMS.index(own):
            upward.append(f"{name} imports {target}")
    assert upward == []


def test_front_ends_reach_a_model_through_the_backend_seam() -> None:
    """engine/api.py holds values alone."""
    front_ends = ("qwq_local.api", "qwq_local.chat", "qwq_local.cli", "qwq_local.terminal")
    below = ("qwq_local.backend.local", "qwq_local.engine")
    wrong = [
        f"{name} imports {target}"
        for name, target in sorted(imports())
        if within(name, front_ends)
        and within(target, below)
        and target != "qwq_local.engine.api"
        and not within(name, [f"qwq_local.cli.{command}" for command in ENGINE_COMMANDS])
    ]
    assert wrong == []


def test_the_converter_uses_only_errors_and_files_of_the_rest() -> None:
    allowed = ("qwq_local.errors", "qwq_local.files")
    wrong = [
        f"{name} imports {target}"
        for name, target in sorted(imports())
        if within(name, ("qwq_convert",)) and within(target, ("qwq_local",)) and not within(target, allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library: str) -> None:
    users = {name for name, target in imports() if within(target, (library,))}
    assert [name for name in sorted(users) if not within(name, DOORS[library])] == []


def test_no_module_imports_itself_through_others() -> None:
    """Counts the imports that run when a module is imported."""
    direct = {name: set(imported(tree.body)) & modules().keys() for name, tree in modules().items()}
    free: set[str] = set()
    while ready := [name for name in direct if name not in free and direct[name] <= free]:
        free.update(ready)
    assert sorted(direct.keys() - free) == []


def test_a_small_module_has_more_than_one_importer() -> None:
    importers = defaultdict(set)
    for name, target in sorted(imports()):
        importers[target].add(name)
    small = []
    for name, tree in modules().items():
        n_lines = tree.body[-1].end_lineno or 0 if tree.body else 0
        is_part = "." in name and name != "qwq_local.__main__" and not has_children(name)
        if is_part and n_lines < FEWEST_LINES and len(importers[name]) < 2 and not within(name, ONE_EACH):
            small.append(f"{name} has {n_lines} lines and {len(importers[name])} importer")
    assert small == []


def has_children(module: str) -> bool:
    return any(name.startswith(f"{module}.") for name in modules())


def test_no_class_name_is_used_twice() -> None:
    """A leading underscore makes no other name."""
    places = defaultdict(list)
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(name)
    repeated = {name: where for name, where in places.items() if len(where) > 1}
    assert repeated == {}


def test_help_loads_nothing_slow() -> None:
    commands = ("ask", "chat", "convert", "imatrix", "plan", "pull", "verify")
    program = f"""
import sys
from qwq_local.cli.main import main
for command in [], *([name] for name in {commands!r}):
    main([*command, "--help"])
    print("loaded:", [module for module in {SLOW!r} if module in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    loaded = [line for line in result.stdout.splitlines() if line.startswith("loaded:")]
    assert loaded == ["loaded: []"] * (1 + len(commands)), result.stdout + result.stderr


def test_the_way_from_ask_to_llama_decode_is_short_and_documented(cache: Path, tmp_path: Path) -> None:
    """The files on the call stack when the first of our functions is called that names llama_decode."""
    program = """
import sys
from qwq_local.__main__ import run

def look(frame, event, _argument):
    code = frame.f_code
    if event == "call" and "qwq_local" in code.co_filename and "llama_decode" in code.co_names:
        sys.setprofile(None)
        files = []
        while frame is not None:
            files.insert(0, frame.f_code.co_filename)
            frame = frame.f_back
        with open("stack.txt", "w") as out:
            out.write("\\n".join(dict.fromkeys(files)))

sys.argv = ["qwq", "ask", "--model", "miniature", "--set", "thinking_budget=0", "Why?"]
sys.setprofile(look)
run()
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(cache), capture_output=True, text=True
    )
    assert (tmp_path / "stack.txt").exists(), result.stderr
    paths = [Path(line) for line in (tmp_path / "stack.txt").read_text().splitlines()]
    stack = [path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT / "qwq_local")]
    document = (ROOT / "docs" / "architecture.md").read_text()
    section = document.partition("## From `qwq ask` to llama_decode\n")[2].partition("\n## ")[0]
    assert re.findall(r"^- `([^`]+)`: ", section, re.MULTILINE) == stack
    assert 3 < len(stack) <= 20


def test_the_files_that_the_documents_name_are_there() -> None:
    """Of the architecture and of the guide for contributors; a path begins at the root or in qwq_local."""
    for document in ("docs/architecture.md", "CONTRIBUTING.md"):
        named = re.findall(r"`((?:\w+/)+[\w.]*)`", (ROOT / document).read_text())
        assert named
        missing = [
            path for path in named if not any((ROOT / top / path).exists() for top in ("", "qwq_local"))
        ]
        assert missing == [], document


def test_no_module_imports_what_only_posix_has() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        for target in imported(tree.body)
        if target in POSIX_ONLY
    ]
    assert wrong == []
