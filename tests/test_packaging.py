"""The wheel, installed into an empty environment, answers with the bundled miniature."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The Makefile's folder for the llama.cpp that it built for this machine.
WHEELS = Path(sys.prefix) / "wheels"


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(
    not list(WHEELS.glob("llama_cpp_python-*.whl")), reason="llama.cpp would be built again; run `make test`"
)
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    """The checkout cannot be reached by path, current folder or variables."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    wheel = next(tmp_path.glob("qwq_local-*.whl"))
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty", cwd=tmp_path)
    scripts = tmp_path / "empty" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    run(*pip, "--python", python, "install", "--find-links", WHEELS, wheel, cwd=tmp_path)

    kept = ("HOME", "PATH", "LANG", "TMPDIR", "SYSTEMROOT")
    variables = {name: os.environ[name] for name in kept if name in os.environ}
    variables["QWQ_CACHE_DIR"] = str(tmp_path / "cache")
    question = "How many r's are in the word strawberry?"
    greedy = ("ask", "--model", "miniature", "--set", "temperature=0")
    answer = run(scripts / "qwq", *greedy, question, cwd=tmp_path, environment=variables)
    assert "boxed" in answer
    listed = run(scripts / "qwq", "profiles", cwd=tmp_path, environment=variables)
    assert "qwq-32b" in listed
    assert "math" in listed
    script = f"import qwq_local; print(qwq_local.open('miniature', temperature=0).answer({question!r}))"
    assert "boxed" in run(python, "-c", script, cwd=tmp_path, environment=variables)
    where = run(
        python, "-c", "import qwq_local; print(qwq_local.__file__)", cwd=tmp_path, environment=variables
    )
    assert str(tmp_path) in where
    assert Path(where.strip()).with_name("py.typed").is_file()
