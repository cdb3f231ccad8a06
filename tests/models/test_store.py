"""Names of models become files: paths, the miniature, the Hugging Face cache."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwq_local.errors import ConvertError, ModelNotFound
from qwq_local.models.catalog import Catalog
from qwq_local.models.header import read_header
from qwq_local.models.store import find_model
from tests.command import ROOT, environment

QWQ = Catalog("qwq-32b", "Qwen/QwQ-32B-GGUF", {"Q4_K_M": "qwq-32b-q4_k_m.gguf", "Q8_0": "qwq-32b-q8_0.gguf"})


def test_a_path_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "any name.gguf"
    path.write_bytes(b"GGUF")
    assert find_model(str(path), QWQ, tmp_path) == path
    for missing in (tmp_path / "other.gguf", tmp_path / "folder" / "model"):
        with pytest.raises(ModelNotFound, match="no model file"):
            find_model(str(missing), QWQ, tmp_path)


def test_a_name_that_no_file_can_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="x: File name too long"):
        find_model("x" * 300, QWQ, tmp_path)


def test_the_miniature_is_converted_once_for_each_type(tmp_path: Path) -> None:
    first = find_model("miniature", QWQ, tmp_path)
    assert read_header(first).text("general.name") == "QwQ miniature"
    before = first.stat().st_mtime_ns
    assert find_model("miniature", QWQ, tmp_path) == first
    assert find_model("miniature:q8_0", QWQ, tmp_path) == first
    assert first.stat().st_mtime_ns == before
    assert find_model("miniature:BF16", QWQ, tmp_path) != first
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".gguf", ".gguf"]


def test_a_damaged_conversion_is_made_again_and_older_ones_are_removed(tmp_path: Path) -> None:
    path = find_model("miniature", QWQ, tmp_path)
    whole = path.read_bytes()
    older = path.with_name("miniature-000000000000-Q8_0.gguf")
    older.write_bytes(whole)
    path.write_bytes(whole[:5000])

    assert find_model("miniature", QWQ, tmp_path).read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_an_unknown_type_of_the_miniature_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConvertError):
        find_model("miniature:Q99", QWQ, tmp_path)
    assert list((tmp_path / "miniature").iterdir()) == []


def test_two_processes_that_convert_at_once_share_the_model(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; import sys\n"
        "from qwq_local.models.store import converted_miniature\n"
        "print(converted_miniature(Path(sys.argv[1]), 'F32').stat().st_size)\n"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=ROOT,
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    sizes = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(sizes) == 1
    assert len(list((tmp_path / "miniature").iterdir())) == 1


def test_qwq_is_found_where_the_hugging_face_client_put_it(tmp_path: Path) -> None:
    """A cache laid out by the hub's client, read by another process."""
    repo = tmp_path / "hub" / "hub" / "models--Qwen--QwQ-32B-GGUF"
    snapshot = repo / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc123")
    (snapshot / "qwq-32b-q8_0.gguf").write_bytes(b"GGUF")
    program = (
        "from pathlib import Path\nfrom qwq_local.models.catalog import Catalog\n"
        "from qwq_local.models.store import find_model\n"
        f"catalog = Catalog('qwq-32b', {QWQ.repo!r}, {dict(QWQ.files)!r})\n"
        "for name in ('qwq-32b', 'qwq-32b:Q8_0', 'QwQ-32B:q8_0'):\n"
        "    print(find_model(name, catalog, Path('.')).name)\n"
        "try:\n    find_model('qwq-32b:Q4_K_M', catalog, Path('.'))\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(tmp_path, HF_HOME=str(tmp_path / "hub")),
        check=True,
    )
    assert result.stdout.split() == ["qwq-32b-q8_0.gguf"] * 3 + ["ModelNotFound"]
