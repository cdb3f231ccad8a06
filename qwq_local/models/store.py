"""A model name in, the path of a GGUF on this machine out.

What a name can be, and in which order, is said in names.py. Here are the two rules that need the disk, paths
and the bundled miniature, which is converted on first use into the cache; and a note of when a model was last
used. Nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_local.errors import ModelFileError, ModelNotFound, QwqError
from qwq_local.models.catalog import Catalog as Catalog
from qwq_local.models.header import read_header
from qwq_local.paths import Directories, bundled, make_private

if TYPE_CHECKING:
    from qwq_local.models.inventory import LocalModel

MINIATURE = "miniature"
MINIATURE_TYPE = "Q8_0"
# Raised when the converter's output changes, so that an older conversion in the cache is not reused.
CONVERSION = 1
USE_IS_NEWS_AFTER_S = 60.0


def find_model(name: str, catalog: Catalog, cache: Path, data: Path | None = None) -> Path:
    """The GGUF that `name` means, in the order that names.py documents; `data` holds the registry.

    Raises ModelNotFound saying how to get one, UsageError when several are meant.
    """
    if (path := path_of(name)) is not None:
        return path
    if is_miniature(name):
        return converted_miniature(cache, name.partition(":")[2].upper() or MINIATURE_TYPE)
    model = find_listed(name, catalog, cache, data)
    if model is None:
        raise ModelNotFound(
            f"no model {name!r} on this machine; `qwq models` lists what is here. `qwq pull` brings QwQ-32B. "
            "To try qwq now: --model miniature, or --model FILE.gguf."
        )
    if data is not None:
        _note_use(model.path, data)
    return model.path


def is_miniature(name: str) -> bool:
    """Whether the bundled model is meant, of whatever type."""
    return name.partition(":")[0] == MINIATURE


def path_of(name: str) -> Path | None:
    """The file when `name` is a path, None when it is a name. Raises ModelNotFound for a lost path."""
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


def find_listed(name: str, catalog: Catalog, cache: Path, data: Path | None) -> LocalModel | None:
    """The listed model of that name, None when there is none. Raises UsageError when several are meant."""
    from qwq_local.hub.cache import HubCache
    from qwq_local.models.inventory import Places, local_models
    from qwq_local.models.names import resolve_name
    from qwq_local.models.registry import State

    places = Places(Directories(cache, cache, data or cache), catalog, HubCache.here())
    state = State() if data is None else places.registry.read()
    return resolve_name(name, local_models(places, state), catalog, state.default)


def _note_use(path: Path, data: Path) -> None:
    from qwq_local.models.registry import Registry

    registry, now = Registry(data), time.time()
    if now - registry.read().of(path).last_used > USE_IS_NEWS_AFTER_S:
        # A data folder that cannot be written must not keep anyone from asking.
        with suppress(QwqError):
            registry.change(lambda state: state.with_record(replace(state.of(path), last_used=now)))


def converted_miniature(cache: Path, file_type: str) -> Path:
    """The bundled miniature as a GGUF of `file_type`, converted unless this very checkpoint was before.

    Raises ConvertError for an unknown type. Two processes at once each convert; the last rename wins.
    """
    source = bundled("miniature")
    folder = make_private(cache / "miniature")
    path = folder / f"miniature-{_fingerprint(source)}-{file_type}.gguf"
    if _is_whole(path):
        return path
    try:
        return _convert(source, file_type, path)
    except OSError as error:
        raise QwqError(f"{folder} cannot be written: {error.strerror}. QWQ_CACHE_DIR moves it.") from error


def _is_whole(path: Path) -> bool:
    """Whether the conversion is there and was not damaged since."""
    try:
        return path.is_file() and bool(read_header(path).tensors)
    except ModelFileError:
        return False


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
    """Names the checkpoint's content by its files' names, sizes and times; reading it would cost more."""
    digest = hashlib.sha256(f"{CONVERSION}".encode())
    for file in sorted(folder.iterdir()):
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:12]
