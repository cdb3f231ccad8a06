"""A model to be removed in; what is ours deleted, what belongs to another program refused with a hint.

Ours are pulled blobs with the links to them, and files that were converted into our own folder. A file that
the user added, or had converted to a place of their own, is only forgotten. Nothing outside the Hugging Face
cache and our own folder is ever deleted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwq_local.errors import QwqError, UsageError
from qwq_local.models.inventory import LocalModel, Origin, Places
from qwq_local.models.registry import State
from qwq_local.text import decimal_size


@dataclass(frozen=True, slots=True)
class Removal:
    """What would go: files and links, the bytes that this frees, and whether the file itself stays."""

    model: LocalModel
    paths: tuple[Path, ...]
    freed_bytes: int

    @property
    def only_forgets(self) -> bool:
        """Whether nothing on the disk is touched."""
        return not self.paths


def plan_removal(model: LocalModel, places: Places) -> Removal:
    """What removing the model means. Raises UsageError when it is another program's."""
    match model.origin:
        case Origin.OLLAMA:
            name = model.name.removeprefix("ollama/")
            raise UsageError(f"{model.name} belongs to ollama: qwq never deletes it. Run: ollama rm {name}")
        case Origin.LM_STUDIO:
            raise UsageError(f"{model.name} belongs to LM Studio: remove it there. It is {model.path}")
        case Origin.HUB_CACHE:
            raise UsageError(
                f"{model.name} was downloaded by another tool, which may need it. To remove it all the same: "
                f"hf cache rm model/{model.repo}"
            )
        case Origin.BUNDLED:
            raise UsageError(
                f"{model.name} comes with qwq and takes {decimal_size(model.n_bytes, 0)}: it stays."
            )
        case Origin.ADDED:
            return Removal(model, (), 0)
        case Origin.CONVERTED:
            if not all(_is_inside(part, places.converted) for part in model.parts):
                return Removal(model, (), 0)
            return Removal(model, model.parts, model.n_bytes)
        case Origin.PULLED:
            return Removal(model, tuple(_links_and_blobs(model, places)), model.n_bytes)


def carry_out(removal: Removal, places: Places) -> None:
    """Delete what was planned and forget the model. Raises QwqError when a file cannot be deleted."""
    try:
        for path in removal.paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise QwqError(f"{path} cannot be deleted ({error.strerror}).") from None

    def forgotten(state: State) -> State:
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
