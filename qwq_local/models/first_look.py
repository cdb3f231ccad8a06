"""The first bytes of a GGUF on the hub in; why qwq could not run it, before the rest is fetched.

Every writer of GGUFs puts the architecture first. What the first bytes leave open is for the reader of the
whole header, once the file is here.
"""

from __future__ import annotations

import struct
from collections.abc import Generator

from qwq_convert.strict_json import shown

from qwq_local.errors import ModelFileError, PullError
from qwq_local.hub.client import Hub, Listing, RemoteFile
from qwq_local.hub.ranges import Span
from qwq_local.hub.skeleton import fetch_span
from qwq_local.hub.workers import Pace, Wait
from qwq_local.models.architecture import SUPPORTED

FIRST_BYTES = 4096
_KEY = b"general.architecture"
_TEXT = 8  # GGUF_METADATA_VALUE_TYPE_STRING
# Magic, version, numbers of tensors and key-values; then a key and the type of its value.
_START = struct.Struct(f"<4sIQQQ{len(_KEY)}sI")
_LONGEST_NAME = 64


def look_first(hub: Hub, listing: Listing, file: RemoteFile, pace: Pace) -> Generator[Wait, None, None]:
    """Ask for the first bytes of a file. Raises ModelFileError where they show that qwq cannot run it."""
    try:
        first = yield from fetch_span(hub, listing, file, Span(0, min(FIRST_BYTES, file.n_bytes)), pace)
    except PullError:
        return  # the download itself knows better what to say, and needs no ranges
    if not first.startswith(b"GGUF"):
        raise ModelFileError(f"{file.name} is no GGUF. Nothing was downloaded; choose another file.")
    architecture = _architecture(first)
    if architecture is not None and architecture not in SUPPORTED:
        raise ModelFileError(
            f"{file.name} holds a model of architecture {shown(architecture)}; qwq runs "
            f"{', '.join(SUPPORTED)}. Nothing was downloaded."
        )


def _architecture(first: bytes) -> str | None:
    """The architecture where it is the first key, as a text of a sensible length."""
    if len(first) < _START.size + 8:
        return None
    *_, n_key, key, kind = _START.unpack_from(first)
    (n_bytes,) = struct.unpack_from("<Q", first, _START.size)
    if (n_key, key, kind) != (len(_KEY), _KEY, _TEXT) or n_bytes > _LONGEST_NAME:
        return None
    return first[_START.size + 8 :][:n_bytes].decode("utf-8", "replace")
