"""A repository id in, the folder of its downloaded snapshot in the Hugging Face cache out."""

from __future__ import annotations

import re
from pathlib import Path

from qwq_local.errors import ModelNotFound

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_repository(name: str) -> bool:
    """Whether `name` has the form OWNER/NAME."""
    return _REPOSITORY.fullmatch(name) is not None


def find_snapshot(repository: str) -> Path:
    """The snapshot folder of a repository that was downloaded before. Raises ModelNotFound."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json")
    if not isinstance(found, str):
        raise ModelNotFound(
            f"{repository}: no such folder, and no such repository was downloaded to this machine. "
            f"Download it first: hf download {repository}"
        )
    return Path(found).parent
