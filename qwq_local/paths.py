"""The directories of this user, and the folders that ship with the program. Nothing is created unasked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import platformdirs

from qwq_local.errors import QwqError, UsageError

APP_NAME = "qwq"
PACKAGE = Path(__file__).resolve().parent

BundledKind = Literal["profiles", "miniature"]

_IN_CHECKOUT: Mapping[BundledKind, str] = {"profiles": "profiles", "miniature": "miniature/checkpoint"}
_OUR_NAME = re.compile(rb'^name\s*=\s*"qwq-local"\s*$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Directories:
    """The user's directories: `config` has profiles, `cache` has what can be made again, `data` the rest."""

    config: Path
    cache: Path
    data: Path


def directories(environ: Mapping[str, str]) -> Directories:
    """The three directories, each moved by QWQ_CONFIG_DIR, QWQ_CACHE_DIR or QWQ_DATA_DIR.

    They may be missing. Raises UsageError for a variable that is no path.
    """
    return Directories(
        config=_moved(environ, "QWQ_CONFIG_DIR") or platformdirs.user_config_path(APP_NAME, appauthor=False),
        cache=_moved(environ, "QWQ_CACHE_DIR") or platformdirs.user_cache_path(APP_NAME, appauthor=False),
        data=_moved(environ, "QWQ_DATA_DIR") or platformdirs.user_data_path(APP_NAME, appauthor=False),
    )


def _moved(environ: Mapping[str, str], variable: str) -> Path | None:
    value = environ.get(variable, "")
    if not value:
        return None
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise UsageError(f"{variable}={value}: {error}. Give an absolute path.") from error


def make_private(directory: Path) -> Path:
    """`directory`; created for its owner alone (0700) when it is missing.

    An existing directory keeps its permissions: it may be shared on purpose. Raises QwqError.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise QwqError(
            f"cannot make the directory {directory}: {error.strerror}. "
            "QWQ_CONFIG_DIR, QWQ_CACHE_DIR and QWQ_DATA_DIR move it."
        ) from error
    return directory


def bundled(kind: BundledKind, package: Path = PACKAGE) -> Path:
    """The folder that ships with the program, in a checkout or in an installation.

    `package` is the folder of the package qwq_local. Raises QwqError when the folder is missing.
    """
    in_checkout = _is_checkout(package.parent)
    folder = package.parent / _IN_CHECKOUT[kind] if in_checkout else package / "bundled" / kind
    if not folder.is_dir():
        advice = "Restore the checkout." if in_checkout else "Install qwq-local again."
        raise QwqError(f"this installation lacks {folder}. {advice}")
    return folder


def _is_checkout(root: Path) -> bool:
    try:
        return _OUR_NAME.search((root / "pyproject.toml").read_bytes()) is not None
    except OSError:
        return False
