"""The Hugging Face cache on this machine, and the hashes that name its files.

The layout is huggingface_hub's (its guide "Understand caching"): `blobs/<etag>`, `snapshots/<commit>/<name>`
linking to it, `refs/main`, and `.locks/<repo>/<etag>.lock`, the same lock that huggingface_hub's downloads
take.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwq_local.errors import ModelNotFound, PullError
from qwq_local.files import LockHeld, allocated_bytes, lock_file, write_atomically

BLOCK_BYTES = 2**20
PARTIAL = ".qwq-partial"
JOURNAL = ".qwq-journal"
STALE_AFTER_S = 14 * 24 * 3600
"""After this time without a change a partial file counts as abandoned."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_DIGEST_FORMS = {"sha256": re.compile(r"[0-9a-f]{64}"), "git-sha1": re.compile(r"[0-9a-f]{40}")}


@dataclass(frozen=True, slots=True)
class Digest:
    """The hash that the hub states for a file, in lower-case hexadecimal. Anything else is a ValueError.

    Large files have a sha256 (Git LFS). Small ones have git's blob id, the sha1 of a header and the content
    (git-hash-object(1)). The hub's ETag is this digest, and names the file in the cache.
    """

    algorithm: Literal["sha256", "git-sha1"]
    hex: str

    def __post_init__(self) -> None:
        if not _DIGEST_FORMS[self.algorithm].fullmatch(self.hex):
            raise ValueError(f"{self.hex[:80]!r} is no {self.algorithm}")

    def running(self, n_bytes: int) -> hashlib._Hash:
        """A hash of this kind, to be updated with a content of `n_bytes`."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % n_bytes, usedforsecurity=False)

    def matches(self, content: bytes) -> bool:
        """Whether this is the digest of `content`."""
        running = self.running(len(content))
        running.update(content)
        return running.hexdigest() == self.hex


def hash_file(path: Path, running: hashlib._Hash) -> Iterator[int]:
    """Hash a file's content; yields the number of bytes hashed, after each block. Raises OSError."""
    done = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            running.update(block)
            done += len(block)
            yield done


def is_repository(name: str) -> bool:
    """Whether `name` has the form OWNER/NAME."""
    return _REPOSITORY.fullmatch(name) is not None


def find_snapshot(repo: str) -> Path:
    """The snapshot folder of a repository that was downloaded before. Raises ModelNotFound."""
    found = HubCache.here().find(repo, "config.json")
    if found is None:
        raise ModelNotFound(
            f"{repo}: no such folder, and no such repository was downloaded to this machine. "
            f"Download it first: hf download {repo}"
        )
    return found.parent


@dataclass(frozen=True, slots=True)
class HubCache:
    """The cache in the folder `root`."""

    root: Path

    @classmethod
    def here(cls) -> HubCache:
        """The cache that HF_HUB_CACHE or HF_HOME name."""
        from huggingface_hub import constants

        return cls(Path(constants.HF_HUB_CACHE))

    def folder(self, repo: str) -> Path:
        """The folder of a repository."""
        return self.root / f"models--{repo.replace('/', '--')}"

    def blob(self, repo: str, etag: str) -> Path:
        """The place of the content with that hash, whether it is there or not."""
        return self.folder(repo) / "blobs" / etag

    def snapshot(self, repo: str, commit: str, name: str) -> Path:
        """The place of the file of that name, which was checked to stay in its folder."""
        return self.folder(repo) / "snapshots" / commit / name

    def find(self, repo: str, name: str) -> Path | None:
        """The file where huggingface_hub finds it offline, or None."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(repo, name, cache_dir=self.root)
        return Path(path) if isinstance(path, str) else None

    @contextmanager
    def lock(self, repo: str, etag: str) -> Iterator[bool]:
        """Hold the lock of a blob within the block; False when another process has it."""
        path = self.root / ".locks" / self.folder(repo).name / f"{etag}.lock"
        with ExitStack() as held:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(lock_file(path, mode=0o664))
                is_mine = True
            except LockHeld:
                is_mine = False
            except OSError as error:
                reason = error.strerror or error
                raise PullError(
                    f"{path} cannot be locked ({reason}). Set HF_HUB_CACHE to another folder."
                ) from None
            yield is_mine

    def publish(self, repo: str, commit: str, name: str, etag: str) -> Path:
        """Link the blob into its snapshot, make that snapshot `main`, return the link. Raises PullError."""
        path = self.snapshot(repo, commit, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _link(self.blob(repo, etag), path)
            main = self.folder(repo) / "refs" / "main"
            main.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(main, commit.encode("ascii"), sync=False)
        except OSError as error:
            raise PullError(f"{path} cannot be written ({error.strerror}). Check its folder.") from None
        return path

    def used_bytes(self) -> int:
        """The bytes that all blobs and partial files take on the disk."""
        return sum(allocated_bytes(path) for path in self.root.glob("models--*/blobs/*"))

    def remove_stale(self, now: float) -> None:
        """Delete everything that was not touched for two weeks. Only for a cache of our own."""
        for path in self.root.glob("models--*/blobs/*"):
            with suppress(OSError):
                if now - path.stat().st_mtime > STALE_AFTER_S:
                    path.unlink()

    def remove_stale_partials(self, now: float) -> int:
        """Delete partial files of ours that were abandoned. Returns the bytes that this frees.

        A partial file is abandoned after two weeks without a change, or when its blob came in another way.
        """
        freed = 0
        for path in self.root.glob(f"models--*/blobs/*{PARTIAL}"):
            etag = path.name.removesuffix(PARTIAL)
            repo = path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
            try:
                is_stale = now - path.stat().st_mtime > STALE_AFTER_S or path.with_name(etag).exists()
                if not is_stale or self.folder(repo) != path.parent.parent:
                    continue
                with self.lock(repo, etag) as is_free:
                    if is_free:
                        freed += allocated_bytes(path)
                        remove_partial(path)
            except OSError:
                continue
        return freed


def _link(blob: Path, path: Path) -> None:
    """Make `path` the blob: a relative link, else a hard link, else the moved blob itself."""
    from huggingface_hub import constants

    if path.exists() and path.samefile(blob):
        return
    beside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
    try:
        if constants.HF_HUB_DISABLE_SYMLINKS:
            raise OSError
        beside.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        try:
            os.link(blob, beside)
        except OSError:
            blob.replace(beside)
    beside.replace(path)


def partial_path(blob: Path) -> Path:
    """Where the bytes of a blob are until it is complete."""
    return blob.with_name(blob.name + PARTIAL)


def remove_partial(path: Path) -> None:
    """Delete a partial file, its journal and the journal's replacement, as far as they are there."""
    stem = path.name.removesuffix(PARTIAL)
    for name in (path.name, stem + JOURNAL, stem + JOURNAL + ".new"):
        path.with_name(name).unlink(missing_ok=True)
