"""The Hugging Face cache on this machine: where blobs, snapshots, refs and locks of a repository lie.

The layout is huggingface_hub's (its guide "Understand caching"): `blobs/<etag>`, `snapshots/<commit>/<name>`
linking there, `refs/main`, and `.locks/<repo>/<etag>.lock`, the very lock that its own downloads take. Knows
no network.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from qwq_local.errors import PullError
from qwq_local.files import LockHeld, allocated_bytes, free_bytes, lock_file, write_atomically
from qwq_local.hub.partial import PARTIAL, remove_partial

STALE_AFTER_S = 14 * 24 * 3600
"""A partial file that no run has touched for so long is taken for abandoned."""


@dataclass(frozen=True, slots=True)
class HubCache:
    """The cache in the folder `root`."""

    root: Path

    @classmethod
    def here(cls) -> HubCache:
        """The one that HF_HUB_CACHE or HF_HOME name."""
        return cls(Path(constants.HF_HUB_CACHE))

    def folder(self, repo: str) -> Path:
        """The folder of a repository."""
        return self.root / f"models--{repo.replace('/', '--')}"

    def blob(self, repo: str, etag: str) -> Path:
        """Where the content with that hash lies or would lie."""
        return self.folder(repo) / "blobs" / etag

    def snapshot(self, repo: str, commit: str, name: str) -> Path:
        """Where the file of that name lies or would lie. ValueError should it leave the snapshot."""
        folder = self.folder(repo) / "snapshots" / commit
        path = folder.joinpath(*name.split("/"))
        if folder not in path.parents or ".." in path.parts:
            raise ValueError(f"{name!r} leaves {folder}")
        return path

    def find(self, repo: str, name: str) -> Path | None:
        """The file as huggingface_hub finds it offline, or None."""
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
        """Link the blob into its snapshot, make that snapshot `main`; the linked path. Raises PullError."""
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

    def free_bytes(self, repo: str) -> int:
        """What is free on the disk that a repository's blobs lie on."""
        return free_bytes(self.folder(repo))

    def used_bytes(self) -> int:
        """What all blobs and partial files take on the disk."""
        return sum(allocated_bytes(path) for path in self.root.glob("models--*/blobs/*"))

    def remove_stale(self, now: float) -> None:
        """Delete what nothing has touched for two weeks. Only for a cache that is ours alone."""
        self.remove_stale_partials(now)
        for path in self.root.glob("models--*/blobs/*"):
            with suppress(OSError):
                if now - path.stat().st_mtime > STALE_AFTER_S:
                    path.unlink()

    def remove_stale_partials(self, now: float) -> int:
        """Delete our own partial files that nobody works on and nobody needs; the bytes that this frees.

        Those are the ones untouched for two weeks, and those whose blob has come by another way.
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
    """Make `path` the blob: by a relative link, by the same file under two names, or by moving it there."""
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
