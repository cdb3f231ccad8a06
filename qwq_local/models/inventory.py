"""The models on this machine, listed and removed.

The list has what was pulled or converted, what the user added, what is in the Hugging Face cache, and what
ollama and LM Studio have. No header is read for it. Removing deletes only what is ours: pulled files with
their links, and files that were converted into our own folder. A file that the user added is only forgotten.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from qwq_local.errors import QwqError, UsageError
from qwq_local.hub.cache import HubCache
from qwq_local.models.catalog import Catalog, file_type_of, is_model, part_of, parts_of
from qwq_local.models.other_programs import is_there, other_models
from qwq_local.models.registry import ModelRecord, Registry, RegistryState
from qwq_local.paths import Directories
from qwq_local.text import decimal_size

MAX_FILES = 5000
_SHA256 = re.compile(r"(?:sha256-)?([0-9a-f]{64})")


class ModelOrigin(Enum):
    """How a model came here, as the list shows it."""

    PULLED = "pulled"
    CONVERTED = "converted"
    ADDED = "added"
    HUB_CACHE = "hf cache"
    OLLAMA = "ollama"
    LM_STUDIO = "lm studio"
    BUNDLED = "bundled"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A GGUF on this machine, with the path of its first part and its record."""

    name: str
    path: Path
    origin: ModelOrigin
    file_type: str
    record: ModelRecord
    repo: str = ""
    is_verified: bool = False

    @property
    def parts(self) -> tuple[Path, ...]:
        """The files of all parts, the first one first."""
        return parts_of(self.path)

    @property
    def n_bytes(self) -> int:
        """The length of all parts that are there."""
        return sum(part.stat().st_size for part in self.parts if is_there(part))

    @property
    def stated_sha256(self) -> str:
        """The sha256 that the file should have, from its record or its blob's name; empty when unknown."""
        if self.record.sha256:
            return self.record.sha256
        # The Hugging Face cache and ollama name a blob by its content.
        match = _SHA256.fullmatch(self.path.resolve().name)
        return match[1] if match else ""


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look for models."""

    directories: Directories
    catalog: Catalog
    hub_cache: HubCache
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    home: Path = field(default_factory=Path.home)

    @property
    def registry(self) -> Registry:
        """The registry of models."""
        return Registry(self.directories.data)

    @property
    def converted(self) -> Path:
        """The folder of models that qwq converted."""
        return self.directories.data / "models"


def local_models(places: Places, state: RegistryState | None = None) -> list[LocalModel]:
    """Every model, each file once, ours before those of other programs."""
    state = places.registry.read() if state is None else state
    found: dict[Path, LocalModel] = {}
    for model in _all(places, state):
        found.setdefault(model.path.resolve(), model)
    return list(found.values())


def hub_name(catalog: Catalog, repo: str, file_type: str, path: Path) -> str:
    """A repository's file by name: `qwq-32b:Q4_K_M` in the catalog's repository, else `owner/name:TYPE`."""
    short = catalog.name if repo == catalog.repo else repo
    return f"{short}:{file_type}" if file_type else f"{short}/{path.stem}"


def _all(places: Places, state: RegistryState) -> Iterator[LocalModel]:
    yield from _added(state)
    yield from _in_hub_cache(places, state)
    for other in other_models(places.environ, places.home):
        origin = ModelOrigin.OLLAMA if other.tool == "ollama" else ModelOrigin.LM_STUDIO
        record = state.of(other.path)
        verified = state.is_verified(other.path)
        yield LocalModel(other.name, other.path, origin, other.file_type, record, is_verified=verified)


def _added(state: RegistryState) -> Iterator[LocalModel]:
    for record in state.records.values():
        path = Path(record.path)
        if record.origin in ("add", "convert") and is_there(path):
            origin = ModelOrigin.ADDED if record.origin == "add" else ModelOrigin.CONVERTED
            file_type = record.file_type or file_type_of(path.name)
            verified = state.is_verified(path)
            yield LocalModel(
                record.alias or path.stem, path, origin, file_type, record, record.repo, is_verified=verified
            )


def _in_hub_cache(places: Places, state: RegistryState) -> Iterator[LocalModel]:
    """The GGUFs of repositories with QwQ in their name, and of all repositories that were pulled from."""
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


def _hub_model(places: Places, state: RegistryState, repo: str, path: Path) -> LocalModel | None:
    if part_of(path.name).number != 1 or not is_model(path.name) or not is_there(path):
        return None
    file_type, record = file_type_of(path.name), state.of(path)
    origin = ModelOrigin.PULLED if record.origin == "pull" else ModelOrigin.HUB_CACHE
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


@dataclass(frozen=True, slots=True)
class Removal:
    """What removing a model deletes: files and links, and the bytes that this frees."""

    model: LocalModel
    paths: tuple[Path, ...]
    freed_bytes: int

    @property
    def only_forgets(self) -> bool:
        """Whether the model is only forgotten, and nothing is deleted."""
        return not self.paths


def plan_removal(model: LocalModel, places: Places) -> Removal:
    """What removing the model deletes. Raises UsageError when the model is not ours."""
    match model.origin:
        case ModelOrigin.OLLAMA:
            name = model.name.removeprefix("ollama/")
            raise UsageError(f"{model.name} belongs to ollama: qwq never deletes it. Run: ollama rm {name}")
        case ModelOrigin.LM_STUDIO:
            raise UsageError(f"{model.name} belongs to LM Studio: remove it there. It is {model.path}")
        case ModelOrigin.HUB_CACHE:
            raise UsageError(
                f"{model.name} was downloaded by another tool, which may need it. To remove it all the same: "
                f"hf cache rm model/{model.repo}"
            )
        case ModelOrigin.BUNDLED:
            raise UsageError(
                f"{model.name} comes with qwq and takes {decimal_size(model.n_bytes, 0)}: it stays."
            )
        case ModelOrigin.ADDED:
            return Removal(model, (), 0)
        case ModelOrigin.CONVERTED:
            if not all(_is_inside(part, places.converted) for part in model.parts):
                return Removal(model, (), 0)
            return Removal(model, model.parts, model.n_bytes)
        case ModelOrigin.PULLED:
            return Removal(model, tuple(_links_and_blobs(model, places)), model.n_bytes)


def remove_model(removal: Removal, places: Places) -> None:
    """Delete what was planned, and forget the model. Raises QwqError when a file cannot be deleted."""
    try:
        for path in removal.paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise QwqError(f"{path} cannot be deleted ({error.strerror}).") from None

    def forgotten(state: RegistryState) -> RegistryState:
        for part in (removal.model.path, *removal.model.parts):
            state = state.without(part)
        return state

    places.registry.change(forgotten)


def _links_and_blobs(model: LocalModel, places: Places) -> list[Path]:
    """Every link in the repository's snapshots to the model's blobs, then the blobs themselves."""
    folder = places.hub_cache.folder(model.repo)
    blobs = {part.resolve() for part in model.parts}
    for blob in blobs:
        _check_inside(blob, folder)
    links = [path for path in sorted((folder / "snapshots").rglob("*.gguf")) if path.resolve() in blobs]
    return [*links, *sorted(blobs - set(links))]


def _is_inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def _check_inside(path: Path, folder: Path) -> None:
    if not _is_inside(path, folder):
        raise UsageError(f"{path} lies outside {folder}: it is not qwq's to delete. Remove it yourself.")
