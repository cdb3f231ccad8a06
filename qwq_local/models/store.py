"""A model name in, the path of a GGUF on this machine out.

A name is a path to a GGUF, `miniature` (the bundled checkpoint, converted on first use into the cache), or
`qwq-32b` (the official files, where the Hugging Face cache has them). `:TYPE` after a name chooses the
quantization type. Nothing is downloaded here.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwq_local.errors import ModelFileError, ModelNotFound, QwqError
from qwq_local.models.header import read_header
from qwq_local.paths import bundled, make_private

MINIATURE = "miniature"
MINIATURE_TYPE = "Q8_0"
# Raised when the converter's output changes, so that an older conversion in the cache is not reused.
CONVERSION = 1


@dataclass(frozen=True, slots=True)
class Catalog:
    """Where the files of the model called `name` may be: a hub repository and its files by type."""

    name: str
    repo: str
    files: Mapping[str, str]


def find_model(name: str, catalog: Catalog, cache: Path) -> Path:
    """The GGUF that `name` means. Raises ModelNotFound saying how to get one."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise ModelNotFound(f"{name}: {error}") from None
    if path.is_file():
        return path
    if path.is_dir() and len(path.parts) > 1:
        raise ModelNotFound(f"{path} is a directory. Give the path of a GGUF in it.")
    if path.suffix == ".gguf" or len(path.parts) > 1:
        raise ModelNotFound(f"there is no model file {path}. Give the path of a GGUF, or --model miniature.")
    stem, _, file_type = name.partition(":")
    if stem == MINIATURE:
        return converted_miniature(cache, file_type.upper() or MINIATURE_TYPE)
    if stem.lower() == catalog.name and (found := _downloaded(catalog, file_type.upper())):
        return found
    raise ModelNotFound(
        f"no model {name!r} on this machine. `qwq pull` will bring QwQ-32B; until this version has it: "
        f"hf download {catalog.repo} {next(iter(catalog.files.values()), '')}. "
        f"To try qwq now: --model miniature, or --model FILE.gguf."
    )


def _downloaded(catalog: Catalog, file_type: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for kind, file_name in catalog.files.items():
        if file_type in ("", kind):
            path = try_to_load_from_cache(catalog.repo, file_name)
            if isinstance(path, str):
                return Path(path)
    return None


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
    from qwq_convert.pipeline import ConvertRequest, run_conversion

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
