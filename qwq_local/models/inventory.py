"""The models on this machine, listed and removed.

The list has what was pulled or converted, what the user added, what is in the Hugging Face cache, and the
QwQ models of ollama and LM Studio, which are used in place. No header is read for it. Removing deletes only
what is ours: pulled files with their links, and files that were converted into our own folder. A file that
the user added is only forgotten.

Ollama: `manifests/<host>/<namespace>/<model>/<tag>` is JSON. Its layer of the media type below names a blob,
`blobs/sha256-<hex>`, which is a GGUF (ollama's docs/faq and its manifest package). LM Studio:
`models/<publisher>/<repository>/<file>.gguf`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from qwq_local.errors import QwqError, UsageError
from qwq_local.hub.cache import HubCache
from qwq_local.models.catalog import Catalog, blob_sha256, file_type_of, is_model, part_of, parts_of
from qwq_local.models.registry import ModelRecord, Registry, RegistryState
from qwq_local.paths import Directories
from qwq_local.text import decimal_size

MAX_FILES = 5000
OLLAMA_MODEL_LAYER = "application/vnd.ollama.image.model"
MAX_MANIFEST_BYTES = 2**20
_OLLAMA_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_ABOUT_QWQ = re.compile(r"qwq", re.IGNORECASE)


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
        return sum(part.stat().st_size for part in self.parts if _is_there(part))

    @property
    def stated_sha256(self) -> str:
        """The sha256 that the file should have, from its record or its blob's name; empty when unknown."""
        return self.record.sha256 or blob_sha256(self.path)


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


def local_model(
    state: RegistryState, name: str, path: Path, origin: ModelOrigin, file_type: str, repo: str = ""
) -> LocalModel:
    """A model with what the registry knows of its files."""
    verified = all(state.is_verified(part) for part in parts_of(path))
    return LocalModel(name, path, origin, file_type, state.of(path), repo, verified)


def local_models(places: Places, state: RegistryState | None = None) -> list[LocalModel]:
    """Every model, each file once, ours before those of other programs."""
    state = places.registry.read() if state is None else state
    found: dict[Path, LocalModel] = {}
    for models in (_added(state), _in_hub_cache(places, state), other_models(places, state)):
        for model in models:
            found.setdefault(model.path.resolve(), model)
    return list(found.values())


def hub_name(catalog: Catalog, repo: str, file_type: str, path: Path) -> str:
    """A repository's file by name: `qwq-32b:Q4_K_M` in the catalog's repository, else `owner/name:TYPE`."""
    short = catalog.name if repo == catalog.repo else repo
    return f"{short}:{file_type}" if file_type else f"{short}/{path.stem}"


def _added(state: RegistryState) -> Iterator[LocalModel]:
    origins = {"add": ModelOrigin.ADDED, "convert": ModelOrigin.CONVERTED}
    for record in state.records.values():
        path = Path(record.path)
        if (origin := origins.get(record.origin)) is not None and _is_there(path):
            file_type = record.file_type or file_type_of(path.name)
            yield local_model(state, record.alias or path.stem, path, origin, file_type, record.repo)


def _in_hub_cache(places: Places, state: RegistryState) -> Iterator[LocalModel]:
    """The GGUFs of repositories with QwQ in their name, and of all repositories that were pulled from."""
    pulled = {record.repo for record in state.records.values() if record.origin == "pull"}
    for folder in _found(places.hub_cache.root, "models--*"):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        if not _ABOUT_QWQ.search(repo) and repo not in pulled:
            continue
        main = _short_text(folder / "refs" / "main").strip()
        snapshots = sorted(_found(folder / "snapshots", "*"), key=lambda path: path.name != main)
        for path in (path for snapshot in snapshots for path in _found(snapshot, "**/*.gguf")):
            if _is_whole_model(path):
                file_type, record = file_type_of(path.name), state.of(path)
                origin = ModelOrigin.PULLED if record.origin == "pull" else ModelOrigin.HUB_CACHE
                name = record.alias or hub_name(places.catalog, repo, file_type, path)
                yield local_model(state, name, path, origin, file_type, repo)


def other_models(places: Places, state: RegistryState) -> Iterator[LocalModel]:
    """The QwQ models of ollama and LM Studio. A folder that cannot be read counts as empty."""
    home = places.home
    ollama_folders = [home / ".ollama" / "models"]
    if chosen := places.environ.get("OLLAMA_MODELS"):
        ollama_folders = [Path(chosen)]
    elif sys.platform.startswith("linux"):
        # Where ollama's system service has them.
        ollama_folders.append(Path("/usr/share/ollama/.ollama/models"))
    for folder in ollama_folders:
        yield from ollama_models(folder, state)
    base = Path(_short_text(home / ".lmstudio-home-pointer").strip() or home / ".lmstudio")
    own = _json(base / "settings.json").get("downloadsFolder")
    lm_studio_folders = [Path(own)] if isinstance(own, str) and own else []
    # The default folder, and that of older versions.
    for folder in (*lm_studio_folders, base / "models", home / ".cache" / "lm-studio" / "models"):
        yield from lm_studio_models(folder, state)


def ollama_models(folder: Path, state: RegistryState) -> Iterator[LocalModel]:
    """The QwQ models with a manifest in the folder, each named `model:tag` or `namespace/model:tag`."""
    root = folder / "manifests"
    for manifest in _found(root, "*/*/*/*"):
        _host, namespace, model, tag = manifest.relative_to(root).parts
        name = f"{model}:{tag}" if namespace == "library" else f"{namespace}/{model}:{tag}"
        if _ABOUT_QWQ.search(name) and (digest := _model_digest(manifest)) is not None:
            blob = folder / "blobs" / f"sha256-{digest}"
            if _is_there(blob):
                yield local_model(state, f"ollama/{name}", blob, ModelOrigin.OLLAMA, file_type_of(tag))


def lm_studio_models(folder: Path, state: RegistryState) -> Iterator[LocalModel]:
    """The QwQ models in the folder, each named by publisher, repository and type."""
    for path in _found(folder, "*/*/*.gguf"):
        publisher, repository, file_name = path.relative_to(folder).parts
        if _ABOUT_QWQ.search(f"{repository}/{file_name}") and _is_whole_model(path):
            file_type = file_type_of(file_name)
            ending = f":{file_type}" if file_type else f"/{part_of(file_name).stem}"
            name = f"lmstudio/{publisher}/{repository}{ending}"
            yield local_model(state, name, path, ModelOrigin.LM_STUDIO, file_type)


def _model_digest(manifest: Path) -> str | None:
    """The sha256 of the model in a manifest; None when there is none, or it is not a plain digest."""
    layers = _json(manifest).get("layers")
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict) and layer.get("mediaType") == OLLAMA_MODEL_LAYER:
            # Only a digest, so that a manifest cannot name a file outside of the folder.
            match = _OLLAMA_DIGEST.fullmatch(str(layer.get("digest")))
            return match[1] if match else None
    return None


def _is_whole_model(path: Path) -> bool:
    """Whether the file is the first part of a model, and all parts are there."""
    is_first = part_of(path.name).number == 1 and is_model(path.name)
    return is_first and all(map(_is_there, parts_of(path)))


def _is_there(path: Path) -> bool:
    """Whether there is a file. One that the system does not let us look at counts as missing."""
    try:
        return path.is_file()
    except OSError:
        return False


def _found(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))[:MAX_FILES]
    except (OSError, ValueError):  # ValueError: another program's settings hold an impossible name
        return []


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_short_text(path))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _short_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES).decode("utf-8", "replace")
    except (OSError, ValueError):
        return ""


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
        if not _is_inside(blob, folder):
            raise UsageError(f"{blob} lies outside {folder}: it is not qwq's to delete. Remove it yourself.")
    links = [path for path in sorted((folder / "snapshots").rglob("*.gguf")) if path.resolve() in blobs]
    return [*links, *sorted(blobs - set(links))]


def _is_inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents
