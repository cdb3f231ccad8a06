"""The QwQ models that ollama and LM Studio downloaded. They are used in place, and never changed or deleted.

Ollama: `manifests/<host>/<namespace>/<model>/<tag>` is JSON. Its layer of the media type below names a blob,
`blobs/sha256-<hex>`, which is a GGUF (ollama's docs/faq and its manifest package). LM Studio:
`models/<publisher>/<repository>/<file>.gguf`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwq_local.models.catalog import file_type_of, is_model, part_of, parts_of

MODEL_LAYER = "application/vnd.ollama.image.model"
MAX_MANIFEST_BYTES = 2**20
MAX_FILES = 5000
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_ABOUT_QWQ = re.compile(r"qwq", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class OtherModel:
    """A GGUF of another program: its name there, and its type if the name says it."""

    tool: str
    name: str
    path: Path
    file_type: str
    sha256: str = ""


def other_models(environ: Mapping[str, str], home: Path) -> Iterator[OtherModel]:
    """The QwQ models of ollama and LM Studio. A folder that cannot be read counts as empty."""
    for folder in ollama_folders(environ, home):
        yield from ollama_models(folder)
    for folder in lm_studio_folders(home):
        yield from lm_studio_models(folder)


def ollama_folders(environ: Mapping[str, str], home: Path) -> list[Path]:
    """Where ollama keeps models: OLLAMA_MODELS, else the user's folder and that of its Linux service."""
    if chosen := environ.get("OLLAMA_MODELS"):
        return [Path(chosen)]
    folders = [home / ".ollama" / "models"]
    if sys.platform.startswith("linux"):
        folders.append(Path("/usr/share/ollama/.ollama/models"))
    return folders


def ollama_models(folder: Path) -> Iterator[OtherModel]:
    """The QwQ models with a manifest in the folder, each named `model:tag` or `namespace/model:tag`."""
    root = folder / "manifests"
    for manifest in _files(root, "*/*/*/*"):
        _host, namespace, model, tag = manifest.relative_to(root).parts
        name = f"{model}:{tag}" if namespace == "library" else f"{namespace}/{model}:{tag}"
        if not _ABOUT_QWQ.search(name) or (digest := _model_digest(manifest)) is None:
            continue
        blob = folder / "blobs" / f"sha256-{digest}"
        if is_there(blob):
            yield OtherModel("ollama", f"ollama/{name}", blob, file_type_of(tag), digest)


def lm_studio_folders(home: Path) -> list[Path]:
    """Where LM Studio keeps models: the folder in its settings, its default, that of older versions."""
    pointer = home / ".lmstudio-home-pointer"
    base = Path(_short_text(pointer).strip() or home / ".lmstudio")
    chosen = _json(base / "settings.json").get("downloadsFolder")
    folders = [base / "models", home / ".cache" / "lm-studio" / "models"]
    return [Path(chosen), *folders] if isinstance(chosen, str) and chosen else folders


def lm_studio_models(folder: Path) -> Iterator[OtherModel]:
    """The QwQ models in the folder, each named by publisher, repository and type."""
    for path in _files(folder, "*/*/*.gguf"):
        publisher, repository, file_name = path.relative_to(folder).parts
        part = part_of(file_name)
        if part.number != 1 or not is_model(file_name) or not _ABOUT_QWQ.search(f"{repository}/{file_name}"):
            continue
        if not all(map(is_there, parts_of(path))):
            continue
        file_type = file_type_of(file_name)
        name = (
            f"{publisher}/{repository}:{file_type}" if file_type else f"{publisher}/{repository}/{part.stem}"
        )
        yield OtherModel("lmstudio", f"lmstudio/{name}", path, file_type)


def is_there(path: Path) -> bool:
    """Whether there is a file. One that the system does not let us look at counts as missing."""
    try:
        return path.is_file()
    except OSError:
        return False


def _model_digest(manifest: Path) -> str | None:
    """The sha256 of the model in a manifest; None when there is none, or it is not a plain digest."""
    layers = _json(manifest).get("layers")
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict) and layer.get("mediaType") == MODEL_LAYER:
            # Only a digest, so that a manifest cannot name a file outside of the folder.
            match = _DIGEST.fullmatch(str(layer.get("digest")))
            return match[1] if match else None
    return None


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    try:
        for number, path in enumerate(sorted(folder.glob(pattern))):
            if number >= MAX_FILES:
                return
            if is_there(path):
                yield path
    except (OSError, ValueError):  # ValueError: the other program's settings hold an impossible name
        return


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
    except OSError:
        return ""
