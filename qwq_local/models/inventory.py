"""The models on this machine: what was pulled, what lies in the Hugging Face cache, what the user added, what
ollama and LM Studio have. Folders and registry in, one list out; no header is read and nothing is changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from qwq_local.hub.cache import HubCache
from qwq_local.models.catalog import Catalog, file_type_of, is_model, part_of, parts_of
from qwq_local.models.foreign import foreign_models, is_there
from qwq_local.models.registry import Record, Registry, State
from qwq_local.paths import Directories

MAX_FILES = 5000


class Origin(Enum):
    """How a model came here, in the words of the list."""

    PULLED = "pulled"
    CONVERTED = "converted"
    ADDED = "added"
    HUB_CACHE = "hf cache"
    OLLAMA = "ollama"
    LM_STUDIO = "lm studio"
    BUNDLED = "bundled"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A GGUF on this machine: its first part's path, the length of all parts, what is known of it."""

    name: str
    path: Path
    origin: Origin
    file_type: str
    record: Record
    repo: str = ""
    is_verified: bool = False

    @property
    def parts(self) -> tuple[Path, ...]:
        """The files of all parts, the first one first."""
        return parts_of(self.path)

    @property
    def n_bytes(self) -> int:
        """The length of all parts; those that are gone count as nothing."""
        return sum(part.stat().st_size for part in self.parts if is_there(part))


@dataclass(frozen=True, slots=True)
class Places:
    """Where models are looked for."""

    directories: Directories
    catalog: Catalog
    hub_cache: HubCache
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    home: Path = field(default_factory=Path.home)

    @property
    def registry(self) -> Registry:
        """What is known of the models."""
        return Registry(self.directories.data)

    @property
    def converted(self) -> Path:
        """The folder of the models that were converted here."""
        return self.directories.data / "models"


def local_models(places: Places, state: State | None = None) -> list[LocalModel]:
    """Every model there is, each file once, ours before those of other programs."""
    state = places.registry.read() if state is None else state
    found: dict[Path, LocalModel] = {}
    for model in _all(places, state):
        found.setdefault(model.path.resolve(), model)
    return list(found.values())


def hub_name(catalog: Catalog, repo: str, file_type: str, path: Path) -> str:
    """What a repository's file is called: `qwq-32b:Q4_K_M` for the catalog's, else `owner/name:TYPE`."""
    short = catalog.name if repo == catalog.repo else repo
    return f"{short}:{file_type}" if file_type else f"{short}/{path.stem}"


def _all(places: Places, state: State) -> Iterator[LocalModel]:
    yield from _added(state)
    yield from _in_hub_cache(places, state)
    for other in foreign_models(places.environ, places.home):
        origin = Origin.OLLAMA if other.tool == "ollama" else Origin.LM_STUDIO
        record = state.of(other.path)
        verified = state.is_verified(other.path)
        yield LocalModel(other.name, other.path, origin, other.file_type, record, is_verified=verified)


def _added(state: State) -> Iterator[LocalModel]:
    for record in state.records.values():
        path = Path(record.path)
        if record.origin in ("add", "convert") and is_there(path):
            origin = Origin.ADDED if record.origin == "add" else Origin.CONVERTED
            file_type = record.file_type or file_type_of(path.name)
            verified = state.is_verified(path)
            yield LocalModel(
                record.alias or path.stem, path, origin, file_type, record, record.repo, is_verified=verified
            )


def _in_hub_cache(places: Places, state: State) -> Iterator[LocalModel]:
    """The GGUFs of repositories about QwQ, and of those that were pulled by name whatever they are about."""
    cache, pulled = places.hub_cache, {r.repo for r in state.records.values() if r.origin == "pull"}
    for folder in sorted(_subfolders(cache.root, "models--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        if "qwq" not in repo.lower() and repo not in pulled:
            continue
        main = _main_commit(folder)
        snapshots = _subfolders(folder / "snapshots", "*")
        snapshots.sort(key=lambda path: (path.name != main, path.name))
        for snapshot in snapshots:
            for path in sorted(snapshot.rglob("*.gguf"))[:MAX_FILES]:
                if (model := _hub_model(places, state, repo, path)) is not None:
                    yield model


def _hub_model(places: Places, state: State, repo: str, path: Path) -> LocalModel | None:
    if part_of(path.name)[1] != 1 or not is_model(path.name) or not is_there(path):
        return None
    file_type, record = file_type_of(path.name), state.of(path)
    origin = Origin.PULLED if record.origin == "pull" else Origin.HUB_CACHE
    name = record.alias or hub_name(places.catalog, repo, file_type, path)
    model = LocalModel(name, path, origin, file_type, record, repo)
    if not all(map(is_there, model.parts)):
        return None
    verified = all(state.is_verified(part) for part in model.parts)
    return LocalModel(name, path, origin, file_type, record, repo, is_verified=verified)


def _main_commit(folder: Path) -> str:
    try:
        return (folder / "refs" / "main").read_text(encoding="ascii", errors="replace")[:100].strip()
    except OSError:
        return ""


def _subfolders(folder: Path, pattern: str) -> list[Path]:
    try:
        return [path for path in folder.glob(pattern) if path.is_dir()][:MAX_FILES]
    except OSError:
        return []
