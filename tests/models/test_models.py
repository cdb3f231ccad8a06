"""`qwq models`: the models here, their owners and names; files of other programs are never touched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwq_local.errors import QwqError, UsageError
from qwq_local.hub.cache import HubCache
from qwq_local.models.architecture import QWQ_32B
from qwq_local.models.catalog import Catalog, FilePart, file_type_of, part_of
from qwq_local.models.facts import Fit, kv_bytes_per_token
from qwq_local.models.inventory import (
    LocalModel,
    ModelOrigin,
    Places,
    lm_studio_models,
    local_models,
    ollama_models,
    other_models,
    plan_removal,
)
from qwq_local.models.registry import ModelRecord, Registry, RegistryState
from qwq_local.models.store import resolve_name
from qwq_local.paths import Directories
from tests.command import Ran, Terminal, environment, qwq
from tests.hub.client import hub_with
from tests.hub_server import LocalHub

GIB = 1024**3
CATALOG = Catalog(
    "qwq-32b", "Qwen/QwQ-32B-GGUF", {"Q4_K_M": "qwq-32b-q4_k_m.gguf", "Q8_0": "qwq-32b-q8_0.gguf"}
)


def model(
    name: str, origin: ModelOrigin, file_type: str, repo: str = "", added_at: float = 0.0
) -> LocalModel:
    how = {ModelOrigin.PULLED: "pull", ModelOrigin.CONVERTED: "convert"}.get(origin, "")
    path = Path("/models") / f"{name}.gguf"
    return LocalModel(
        name, path, origin, file_type, ModelRecord(str(path), origin=how, added_at=added_at), repo
    )


HERE = [
    model("mine", ModelOrigin.ADDED, "Q6_K"),
    model("qwq-32b:Q4_K_M", ModelOrigin.PULLED, "Q4_K_M", "Qwen/QwQ-32B-GGUF", added_at=1.0),
    model("qwq-32b:Q8_0", ModelOrigin.HUB_CACHE, "Q8_0", "Qwen/QwQ-32B-GGUF"),
    model(
        "bartowski/Qwen_QwQ-32B-GGUF:IQ4_XS", ModelOrigin.HUB_CACHE, "IQ4_XS", "bartowski/Qwen_QwQ-32B-GGUF"
    ),
    model("bartowski/Qwen_QwQ-32B-GGUF:Q8_0", ModelOrigin.HUB_CACHE, "Q8_0", "bartowski/Qwen_QwQ-32B-GGUF"),
    model("ollama/qwq:latest", ModelOrigin.OLLAMA, ""),
    model("lmstudio/someone/QwQ-GGUF:Q4_K_M", ModelOrigin.LM_STUDIO, "Q4_K_M"),
]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mine", "mine"),
        ("MINE", "mine"),
        ("qwq-32b", "qwq-32b:Q4_K_M"),
        ("qwq-32b:q8_0", "qwq-32b:Q8_0"),
        ("Qwen/QwQ-32B-GGUF:Q8_0", "qwq-32b:Q8_0"),
        ("QwQ-32B-GGUF:q4_k_m", "qwq-32b:Q4_K_M"),
        ("Qwen_QwQ-32B-GGUF:Q8_0", "bartowski/Qwen_QwQ-32B-GGUF:Q8_0"),
        ("iq4_xs", "bartowski/Qwen_QwQ-32B-GGUF:IQ4_XS"),
        ("Q4_K_M", "qwq-32b:Q4_K_M"),
        ("q4", "qwq-32b:Q4_K_M"),
        ("qwq:latest", "ollama/qwq:latest"),
        ("ollama", "ollama/qwq:latest"),
        ("bart", None),
        ("Q8_0", None),
        ("nothing", ""),
        ("qwq-32b:Q5_0", ""),
    ],
)
def test_a_name_means_one_model_or_lists_the_candidates(name: str, found: str | None) -> None:
    if found is None:
        with pytest.raises(UsageError, match="ambiguous") as raised:
            resolve_name(name, HERE, CATALOG, "")
        assert "bartowski/Qwen_QwQ-32B-GGUF:Q8_0" in str(raised.value)
        return
    resolved = resolve_name(name, HERE, CATALOG, "")
    assert (resolved.name if resolved else "") == found


def test_the_default_is_the_chosen_then_the_last_pulled_then_the_catalogs() -> None:
    def default(models: list[LocalModel], chosen: str = "") -> str:
        found = resolve_name("qwq-32b", models, CATALOG, chosen)
        return found.name if found else ""

    later = model("later", ModelOrigin.CONVERTED, "Q3_K_M", added_at=2.0)
    assert default([*HERE, later], "mine") == "mine"
    assert default([*HERE, later], "gone") == "later"
    assert default(HERE) == "qwq-32b:Q4_K_M"
    assert default([HERE[0], *HERE[2:]]) == "qwq-32b:Q8_0"
    assert default([model("broken", ModelOrigin.PULLED, "Q4_K_M"), *HERE[2:]]) == "qwq-32b:Q8_0"
    assert default(HERE[5:]) == "ollama/qwq:latest"
    assert default([]) == ""


@pytest.mark.parametrize(
    ("name", "file_type"),
    [
        ("qwq-32b-q4_k_m.gguf", "Q4_K_M"),
        ("Qwen_QwQ-32B-IQ4_XS.gguf", "IQ4_XS"),
        ("QwQ-32B-UD-Q2_K_XL.gguf", "Q2_K_XL"),
        ("QwQ-32B.Q8_0.gguf", "Q8_0"),
        ("q8/QwQ-32B-Q8_0-00001-of-00003.gguf", "Q8_0"),
        ("QwQ-32B-bf16-00001-of-00002.gguf", "BF16"),
        ("QwQ-32B.gguf", ""),
    ],
)
def test_a_type_is_read_from_a_files_name(name: str, file_type: str) -> None:
    assert file_type_of(name) == file_type


def test_the_estimate_agrees_with_the_table_of_a_24_gb_card() -> None:
    """Q4_K_M of 18.48 GiB, 23.0 GiB usable: 16k, 31k and 60k tokens in f16, q8_0 and q4_0."""
    assert [kv_bytes_per_token(QWQ_32B, kind) for kind in ("f16", "q8_0", "q4_0")] == [262144, 139264, 73728]
    for kind, low, high in (("f16", 14_000, 17_000), ("q8_0", 28_000, 32_000), ("q4_0", 53_000, 61_000)):
        fit = Fit(23 * GIB, "a card", kind, 32_768, 131_072)
        assert low <= fit.context(int(18.48 * GIB)) <= high
        assert fit.context(23 * GIB) == 0
        assert fit.context(GIB) <= 131_072


def write_ollama(folder: Path, name: str, content: bytes, digest: str = "") -> Path:
    """Store a model as ollama does; returns the path of its blob."""
    sha256 = hashlib.sha256(content).hexdigest()
    manifest = folder / "manifests" / "registry.ollama.ai" / "library" / name.replace(":", "/")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'0' * 64}"},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest or f"sha256:{sha256}"},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    blob = folder / "blobs" / f"sha256-{sha256}"
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(content)
    return blob


def test_ollamas_manifests_name_the_blob(tmp_path: Path) -> None:
    blob = write_ollama(tmp_path, "qwq:32b-q8_0", b"GGUF")
    write_ollama(tmp_path, "llama3:8b", b"other")
    (found,) = ollama_models(tmp_path, RegistryState())
    assert (found.name, found.path, found.file_type) == ("ollama/qwq:32b-q8_0", blob, "Q8_0")


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:x/../../evil",
        "sha256:../../../evil",
        "sha256:" + "0" * 63 + "/",
        "../evil",
        "sha256-" + "a" * 64,
        "3",
    ],
)
def test_a_manifest_that_points_out_of_its_folder_is_refused(tmp_path: Path, digest: str) -> None:
    (tmp_path / "evil").write_bytes(b"GGUF")
    (tmp_path / "blobs" / "sha256-x").mkdir(parents=True)
    write_ollama(tmp_path, "qwq:latest", b"GGUF", digest)
    assert list(ollama_models(tmp_path, RegistryState())) == []


def test_damaged_manifests_are_ignored(tmp_path: Path) -> None:
    write_ollama(tmp_path, "qwq:latest", b"GGUF")
    (manifest,) = (tmp_path / "manifests").rglob("latest")
    for text in ("", "[]", '{"layers": 3}', '{"layers": [3, {}]}', "[" * 100_000, "\xff"):
        manifest.write_text(text)
        assert list(ollama_models(tmp_path, RegistryState())) == []


def test_lm_studios_folders_name_publisher_repository_and_type(tmp_path: Path) -> None:
    for path in (
        "lmstudio-community/QwQ-32B-GGUF/QwQ-32B-Q4_K_M.gguf",
        "lmstudio-community/QwQ-32B-GGUF/mmproj-model-f16.gguf",
        "lmstudio-community/QwQ-32B-GGUF/QwQ-32B-imatrix.gguf",
        "someone/QwQ-GGUF/qwq-Q8_0-00001-of-00002.gguf",
        "someone/QwQ-GGUF/qwq-Q8_0-00002-of-00002.gguf",
        "someone/QwQ-GGUF/qwq-Q6_K-00001-of-00002.gguf",
        "someone/Llama-GGUF/llama-Q8_0.gguf",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"GGUF")
    assert [found.name for found in lm_studio_models(tmp_path, RegistryState())] == [
        "lmstudio/lmstudio-community/QwQ-32B-GGUF:Q4_K_M",
        "lmstudio/someone/QwQ-GGUF:Q8_0",
    ]


def others(environ: dict[str, str], home: Path) -> list[LocalModel]:
    where = Directories(home, home, home)
    return list(other_models(Places(where, CATALOG, HubCache(home), environ, home), RegistryState()))


def test_folders_of_other_programs_are_found_by_their_settings(tmp_path: Path) -> None:
    write_ollama(tmp_path / "elsewhere", "qwq:latest", b"GGUF")
    chosen = tmp_path / "chosen" / "a" / "QwQ-GGUF"
    chosen.mkdir(parents=True)
    (chosen / "qwq-Q8_0.gguf").write_bytes(b"GGUF")
    (tmp_path / ".lmstudio").mkdir()
    (tmp_path / ".lmstudio" / "settings.json").write_text(
        json.dumps({"downloadsFolder": str(tmp_path / "chosen")})
    )
    found = others({"OLLAMA_MODELS": str(tmp_path / "elsewhere")}, tmp_path)
    assert [each.name for each in found] == ["ollama/qwq:latest", "lmstudio/a/QwQ-GGUF:Q8_0"]


def test_impossible_folders_count_as_empty(tmp_path: Path) -> None:
    (tmp_path / ".lmstudio").mkdir()
    for folder in ("a\0b", "\ud800", "x" * 5000):
        (tmp_path / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": folder}))
        assert others({"OLLAMA_MODELS": "x" * 5000}, tmp_path) == []
    (tmp_path / ".lmstudio-home-pointer").write_text("a\0b")
    assert others({}, tmp_path) == []


def test_the_registry_tolerates_any_content(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    record = ModelRecord(str(tmp_path / "x"), alias="x", n_bytes=3)
    registry.change(lambda state: state.with_record(record))
    assert registry.read().records == {record.path: record}
    for text in ("", "{", "[]", '{"models": 3}', '{"models": [3, {"path": 4}, {"path": ""}]}', "[" * 100_000):
        (tmp_path / "models.json").write_text(text)
        assert registry.read() == RegistryState()
    assert registry.change(lambda state: state.with_record(record)).records == {record.path: record}
    assert (tmp_path / "models.damaged.json").read_text() == "[" * 100_000


def test_an_unreadable_folder_hides_no_other_model(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    paths = (f"/{'x' * 300}.gguf", str(tmp_path / "mine.gguf"))
    state = RegistryState(records={path: ModelRecord(path, origin="add") for path in paths})
    places = Places(
        Directories(tmp_path, tmp_path, tmp_path), CATALOG, HubCache(tmp_path / "hub"), {}, tmp_path
    )
    assert [(found.name, found.n_bytes) for found in local_models(places, state)] == [("mine", 4)]


def test_a_registry_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QwqError, match="QWQ_DATA_DIR"):
        Registry(tmp_path / "file").change(lambda state: state)


def test_parts_are_recognised() -> None:
    assert part_of("a-00002-of-00003.gguf") == FilePart("a", 2, 3)
    assert part_of("a.gguf") == FilePart("a.gguf", 1, 1)


@pytest.fixture
def gguf(miniature: Callable[[str], Path], tmp_path: Path) -> Path:
    """A GGUF file of the user."""
    path = tmp_path / "files" / "my model-Q8_0.gguf"
    path.parent.mkdir()
    shutil.copy(miniature("Q8_0"), path)
    return path


@pytest.fixture
def hub(gguf: Path) -> Iterator[LocalHub]:
    hub = hub_with(gguf.read_bytes())
    with hub.served():
        yield hub


def models(cache: Path, *arguments: str, stdin: bytes | None = None) -> Ran:
    return qwq(cache, "models", *arguments, stdin=stdin, HOME=str(cache / "home"))


def places(cache: Path) -> Places:
    """The environment of a process with that cache."""
    where = Directories(cache / "config", cache, cache / "data")
    return Places(where, CATALOG, HubCache(cache / "huggingface" / "hub"), {}, cache / "home")


def listed(cache: Path) -> dict[str, LocalModel]:
    return {each.name: each for each in local_models(places(cache))}


def test_a_model_is_added_shown_verified_chosen_and_forgotten(tmp_path: Path, gguf: Path) -> None:
    assert models(tmp_path, "add", str(gguf)).status == 2, "a space is no part of a name"
    assert models(tmp_path, "add", str(gguf), "--name", "mine").status == 0

    shown = models(tmp_path, "show", "mine").stdout
    for part in (
        "qwen2 (QwQ miniature)",
        "99: 58 Q8_0, 41 F32",
        "1,088 bytes as q8_0",
        "1,024 tokens",
        "unknown",
    ):
        assert part in shown
    sha256 = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert sha256 in models(tmp_path, "verify", "mine").stdout
    assert models(tmp_path, "default", "mine").status == 0
    (row,) = json.loads(models(tmp_path, "--json").stdout)
    assert (row["default"], row["verified"], row["sha256"], row["context"]) == (True, True, sha256, 1024)

    settings = [f"--set={text}" for text in ("n_ctx=256", "thinking_budget=8", "max_tokens=4")]
    asked = qwq(tmp_path, "ask", *settings, "hi")
    assert asked.status in (0, 6), asked.stderr
    assert listed(tmp_path)["mine"].record.last_used > 0

    damaged = bytearray(gguf.read_bytes())
    damaged[-1] ^= 1
    gguf.write_bytes(damaged)
    verified = models(tmp_path, "verify", "mine")
    assert verified.status == 1
    assert "is damaged" in verified.stderr
    assert not listed(tmp_path)["mine"].is_verified

    assert models(tmp_path, "rm", "mine").status == 0
    assert listed(tmp_path) == {}
    assert gguf.read_bytes() == damaged


def test_the_miniature_can_be_the_default_and_has_its_own_profile(tmp_path: Path) -> None:
    assert "qwq pull" in qwq(tmp_path, "ask", "hi").stderr
    assert models(tmp_path, "default", "miniature:NO_TYPE").status == 1
    assert models(tmp_path, "default", "miniature").stdout == "miniature is the default now.\n"

    asked = qwq(tmp_path, "ask", "--set", "temperature=0", "--jsonl", "How many e's are in the word tree?")
    planned = next(json.loads(line) for line in asked.stdout.splitlines() if '"planned"' in line)
    assert (asked.status, planned["n_ctx"]) == (0, 1024)
    assert json.loads(qwq(tmp_path, "plan", "--json").stdout)["plan"]["n_ctx"] <= 1024
    assert models(tmp_path).stdout.splitlines()[-1] == "The default is miniature, which comes with qwq."


def test_the_miniature_is_shown_and_verified_and_cannot_be_removed(tmp_path: Path) -> None:
    assert models(tmp_path, "default", "miniature").status == 0
    shown = models(tmp_path, "show", "miniature").stdout
    assert "qwen2 (QwQ miniature)" in shown
    assert re.search(r"^type +Q8_0$", shown, re.MULTILINE)
    assert models(tmp_path, "verify", "miniature").status == 0
    removed = models(tmp_path, "rm", "-y", "miniature")
    assert (removed.status, "comes with qwq" in removed.stderr) == (2, True)

    back = models(tmp_path, "default", "qwq-32b")
    assert (back.status, "none is here yet" in back.stdout) == (0, True)
    assert "comes with qwq" not in models(tmp_path).stdout


def test_adding_a_file_again_names_its_old_name_and_uses_the_headers_type(tmp_path: Path, gguf: Path) -> None:
    path = gguf.rename(gguf.with_name("plain.gguf"))
    assert "no longer" not in models(tmp_path, "add", str(path)).stdout
    assert ", no longer plain; it stays" in models(tmp_path, "add", str(path), "--name", "mine").stdout
    (model,) = listed(tmp_path).values()
    assert (model.name, model.file_type) == ("mine", "Q8_0")
    assert "5.1 MB" in models(tmp_path).stdout
    assert "that is mine." in models(tmp_path, "default", "qwq-32b").stdout


def test_another_default_than_the_miniature_is_marked_again(tmp_path: Path, gguf: Path) -> None:
    models(tmp_path, "default", "miniature")
    models(tmp_path, "add", str(gguf), "--name", "mine")
    (row,) = json.loads(models(tmp_path, "--json").stdout)
    assert not row["default"]
    models(tmp_path, "default", "mine")
    (row,) = json.loads(models(tmp_path, "--json").stdout)
    assert row["default"]
    assert "comes with" not in models(tmp_path).stdout


def test_a_pulled_model_is_removed_only_after_a_confirmation(tmp_path: Path, hub: LocalHub) -> None:
    assert qwq(tmp_path, "pull", "Q4_K_M", HF_ENDPOINT=hub.hub_url).status == 0
    refused = models(tmp_path, "rm", "Q4_K_M")
    assert refused.status == 2
    assert "--yes" in refused.stderr
    variables = environment(tmp_path, HOME=str(tmp_path / "home"))
    for answer, stays in ((b"n\n", True), (b"y\n", False)):
        with Terminal(["models", "rm", "Q4_K_M"], variables, columns=200) as terminal:
            assert "That frees 5.14 MB" in terminal.read_until(lambda text: "[y/N]" in text)
            os.write(terminal._own, answer)
            assert terminal.read_to_end() == 0
        assert ("qwq-32b:Q4_K_M" in listed(tmp_path)) is stays
    folder = tmp_path / "huggingface" / "hub" / "models--Qwen--QwQ-32B-GGUF"
    left = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    assert left == [folder / "refs" / "main"]


def test_models_of_other_programs_are_used_in_place_and_never_touched(
    tmp_path: Path, miniature: Callable[[str], Path]
) -> None:
    content = miniature("Q8_0").read_bytes()
    home = tmp_path / "home"
    blob = write_ollama(home / ".ollama" / "models", "qwq:latest", content)
    studio = home / ".lmstudio" / "models" / "someone" / "QwQ-GGUF" / "qwq-Q8_0.gguf"
    cached = tmp_path / "huggingface" / "hub" / "models--x--QwQ-GGUF" / "snapshots" / "1" / "qwq-Q6_K.gguf"
    for path in (studio, cached):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)

    def states() -> list[tuple[int, int, int]]:
        return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in map(Path.stat, (blob, studio, cached))]

    before = states()
    assert {name: each.origin for name, each in listed(tmp_path).items()} == {
        "x/QwQ-GGUF:Q6_K": ModelOrigin.HUB_CACHE,
        "ollama/qwq:latest": ModelOrigin.OLLAMA,
        "lmstudio/someone/QwQ-GGUF:Q8_0": ModelOrigin.LM_STUDIO,
    }
    for each in listed(tmp_path).values():
        with pytest.raises(UsageError, match=r"ollama rm qwq:latest|LM Studio: remove it there|hf cache rm"):
            plan_removal(each, places(tmp_path))
    refused = models(tmp_path, "rm", "ollama", "--yes")
    assert refused.status == 2
    assert "never deletes it" in refused.stderr
    assert models(tmp_path, "verify", "ollama").status == 0
    assert listed(tmp_path)["ollama/qwq:latest"].is_verified
    assert states() == before


def test_a_record_that_points_elsewhere_deletes_nothing_there(tmp_path: Path, gguf: Path) -> None:
    """An edited registry cannot make `rm` delete a file outside our folders."""
    forged = ModelRecord(str(gguf.resolve()), alias="evil", origin="convert")
    places(tmp_path).registry.change(lambda state: state.with_record(forged))
    removal = plan_removal(listed(tmp_path)["evil"], places(tmp_path))
    assert (removal.only_forgets, removal.freed_bytes) == (True, 0)
    assert f"forgotten; {gguf.resolve()} stays" in models(tmp_path, "rm", "evil").stdout
    assert gguf.exists()
    assert listed(tmp_path) == {}


def test_a_file_that_cannot_be_read_is_listed_with_its_problem(tmp_path: Path) -> None:
    path = tmp_path / "huggingface" / "hub" / "models--x--QwQ-GGUF" / "snapshots" / "1" / "qwq-\x1b[31m.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no model")
    (row,) = json.loads(models(tmp_path, "--json").stdout)
    assert "is not a GGUF file" in row["problem"]
    plain = models(tmp_path).stdout
    assert "x/QwQ-GGUF/qwq-" in plain
    assert "\x1b" not in plain


def test_without_models_the_list_says_how_to_get_one(tmp_path: Path) -> None:
    assert "qwq pull" in models(tmp_path).stdout
    assert models(tmp_path, "show", "nothing").status == 3
