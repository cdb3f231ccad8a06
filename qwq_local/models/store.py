"""The model that a name means, and the bundled miniature.

A name is looked up in this order:

1. the path of a GGUF;
2. `miniature` or `miniature:TYPE`, the bundled model;
3. a name or alias as `qwq models` lists it, in any case;
4. `REPO:TYPE`, the repository with or without its owner; `qwq-32b` alone means its default;
5. a type alone, such as `Q4_K_M`;
6. the beginning of exactly one name or type, with or without the owner before it.

The first rule that finds something decides. When it finds several files, that is an error which lists them.
Nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qwq_local.errors import ModelFileError, ModelNotFound, QwqError, UsageError
from qwq_local.hub.cache import HubCache
from qwq_local.models.catalog import Catalog
from qwq_local.models.inventory import LocalModel, ModelOrigin, Places, local_models
from qwq_local.models.registry import Registry, RegistryState
from qwq_local.paths import Directories, bundled, make_private

MINIATURE = "miniature"
MINIATURE_TYPE = "Q8_0"
# Increase it when the converter's output changes, so that an older conversion in the cache is not used.
CONVERSION = 1
USE_NOTED_EVERY_S = 60.0

_OURS = (ModelOrigin.PULLED, ModelOrigin.CONVERTED, ModelOrigin.ADDED, ModelOrigin.HUB_CACHE)


def find_model(name: str, catalog: Catalog, cache: Path, data: Path | None = None) -> Path:
    """The GGUF that `name` means; `data` is the folder of the registry.

    Raises ModelNotFound with how to get one, UsageError when the name means several.
    """
    if (path := path_of(name)) is not None:
        return path
    if is_miniature(name):
        return converted_miniature(cache, name.partition(":")[2].upper() or MINIATURE_TYPE)
    places = Places(Directories(cache, cache, data or cache), catalog, HubCache.here())
    state = RegistryState() if data is None else places.registry.read()
    model = resolve_name(name, local_models(places, state), catalog, state.default)
    if model is None:
        raise ModelNotFound(
            f"no model {name!r} on this machine; `qwq models` lists what is here. `qwq pull` brings QwQ-32B. "
            "To try qwq now: --model miniature, or --model FILE.gguf."
        )
    if data is not None:
        _note_use(model.path, data)
    return model.path


def is_miniature(name: str) -> bool:
    """Whether the name means the bundled model, of any type."""
    return name.partition(":")[0] == MINIATURE


def path_of(name: str) -> Path | None:
    """The file, when `name` is a path; None when it is a name. Raises ModelNotFound for a missing file."""
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (RuntimeError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelNotFound(f"{name[:200]}: {reason}. Give the path of a GGUF, or a name.") from None
    if is_file:
        return path
    if is_folder and len(path.parts) > 1:
        raise ModelNotFound(f"{path} is a directory. Give the path of a GGUF in it.")
    is_name = ":" in path.name and not path.is_absolute() and not name.startswith((".", "~"))
    if path.suffix == ".gguf" or (len(path.parts) > 1 and not is_name):
        raise ModelNotFound(f"there is no model file {path}. Give the path of a GGUF, or --model miniature.")
    return None


def resolve_name(
    name: str, models: Sequence[LocalModel], catalog: Catalog, default: str
) -> LocalModel | None:
    """The model by the rules from the third on, or None. Raises UsageError when several match."""
    wanted = name.lower()
    if wanted == catalog.name:
        return default_model(models, catalog, default)
    rules: tuple[Callable[[LocalModel], bool], ...] = (
        lambda model: model.name.lower() == wanted,
        lambda model: wanted in _full_names(model, catalog),
        lambda model: model.file_type.lower() == wanted,
        lambda model: model.name.lower().startswith(wanted) or model.file_type.lower().startswith(wanted),
        lambda model: any(each.startswith(wanted) for each in _full_names(model, catalog)),
    )
    for rule in rules:
        if found := [model for model in models if rule(model)]:
            return _only(name, found)
    return None


def default_model(models: Sequence[LocalModel], catalog: Catalog, default: str) -> LocalModel | None:
    """The chosen default, else the last one pulled, else the first of the catalog, else any model."""
    for model in models:
        if default and model.name == default:
            return model
    # A model that was pulled and cannot be run has no time.
    fetched = [m for m in models if m.record.origin in ("pull", "convert") and m.record.added_at > 0]
    if fetched:
        return max(fetched, key=lambda model: model.record.added_at)
    order = list(catalog.files)
    own = [model for model in models if model.repo == catalog.repo and model.file_type in order]
    if own:
        return min(own, key=lambda model: order.index(model.file_type))
    return models[0] if models else None


def _only(name: str, found: list[LocalModel]) -> LocalModel:
    if len(found) > 1:
        # A model of ours is preferred to another program's copy of it.
        found = [model for model in found if model.origin in _OURS] or found
    if len(found) > 1:
        names = sorted({model.name for model in found})
        listed = ", ".join(names if len(names) == len(found) else [str(model.path) for model in found])
        raise UsageError(f"{name!r} is ambiguous: {listed}. Name one of them.")
    return found[0]


def _full_names(model: LocalModel, catalog: Catalog) -> list[str]:
    """`owner/name:type` and `name:type` in lower case, and the same with the catalog's short name."""
    if not model.repo or not model.file_type:
        return [model.name.lower().partition("/")[2]] if "/" in model.name else []
    repos = [model.repo, model.repo.rpartition("/")[2]]
    if model.repo == catalog.repo:
        repos.append(catalog.name)
    return [f"{repo}:{model.file_type}".lower() for repo in repos]


def _note_use(path: Path, data: Path) -> None:
    registry, now = Registry(data), time.time()
    if now - registry.read().of(path).last_used > USE_NOTED_EVERY_S:
        # A data folder that cannot be written must not stop the answer.
        with suppress(QwqError):
            registry.change(lambda state: state.with_record(replace(state.of(path), last_used=now)))


def converted_miniature(cache: Path, file_type: str) -> Path:
    """The bundled miniature as a GGUF of `file_type`; converted into the cache when it is not there.

    Raises ConvertError for an unknown type. Of two processes at once, each converts; the last rename wins.
    """
    from qwq_local.models.header import read_header  # imports numpy

    source = bundled("miniature")
    folder = make_private(cache / "miniature")
    path = folder / f"miniature-{_fingerprint(source)}-{file_type}.gguf"
    with suppress(ModelFileError):  # a damaged one is converted again
        if path.is_file() and read_header(path).tensors:
            return path
    try:
        return _convert(source, file_type, path)
    except OSError as error:
        raise QwqError(f"{folder} cannot be written: {error.strerror}. QWQ_CACHE_DIR moves it.") from error


def _convert(source: Path, file_type: str, path: Path) -> Path:
    from qwq_convert.pipeline import run_conversion
    from qwq_convert.plan import ConvertRequest

    work = Path(tempfile.mkdtemp(prefix=".converting-", dir=path.parent))
    try:
        made = run_conversion(
            ConvertRequest(source, file_type, work / "miniature.gguf", name="QwQ miniature")
        )
        made.replace(path)
        for older in path.parent.glob(f"miniature-*-{file_type}.gguf"):
            if older != path:
                older.unlink(missing_ok=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _fingerprint(folder: Path) -> str:
    """A name for the checkpoint by its files' names, sizes and times, without reading them."""
    digest = hashlib.sha256(f"{CONVERSION}".encode())
    for file in sorted(folder.iterdir()):
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:12]
