"""The hub's list of a repository's files, with sizes and hashes.

huggingface_hub's own client asks, so HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and proxies work as it documents
them. Everything that comes back is checked here before it is used.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from qwq_local import __version__
from qwq_local.errors import PullError, UsageError
from qwq_local.hub.cache import Digest
from qwq_local.hub.source import RemoteFile, Source
from qwq_local.hub.transfer import (
    ByteRange,
    ContentChanged,
    NoRangeSupport,
    RetryWait,
    TransferSettings,
    connection_errors,
    transient_status,
    with_retries,
)

MAX_FILE_BYTES = 2**50
MAX_NAME_CHARS = 500
MAX_FILES = 20_000
ATTEMPTS = 4  # fewer than for a download: a user waits for the first answer


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]

    def find(self, name: str) -> RemoteFile:
        """The file of that name. Raises PullError naming the nearest ones."""
        for file in self.files:
            if file.name == name:
                return file
        near = get_close_matches(name, [file.name for file in self.files], n=3, cutoff=0.4)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise PullError(
            f"{self.repo} has no file {name}.{hint} `qwq pull --list --repo {self.repo}` shows all."
        )


class Hub:
    """The hub that HF_ENDPOINT names, or another one that is given."""

    def __init__(self, settings: TransferSettings, endpoint: str | None = None) -> None:
        self.settings = settings
        self._endpoint = endpoint or constants.ENDPOINT
        self._api = HfApi(endpoint=self._endpoint, library_name="qwq-local", library_version=__version__)

    def list_files(self, repo: str) -> Generator[RetryWait, None, Listing]:
        """The files of a repository on its branch `main`; yields the waits between tries.

        Raises PullError when the hub does not answer, refuses, or answers nonsense, and UsageError when the
        name is not of the form OWNER/NAME.
        """
        settings = replace(self.settings, attempts=ATTEMPTS)
        return (yield from with_retries(lambda: self._list_files(repo), settings))

    def source(self, listing: Listing, file: RemoteFile, etag: str = "") -> Source:
        """The bytes of a file at the listing's commit; `etag` as for Source."""
        url = hf_hub_url(listing.repo, file.name, revision=listing.commit, endpoint=self._endpoint)
        headers = build_hf_headers(library_name="qwq-local", library_version=__version__)
        return Source(file, url, headers, etag)

    def read_range(
        self, listing: Listing, file: RemoteFile, wanted: ByteRange
    ) -> Generator[RetryWait, None, bytes]:
        """The bytes of a range, in memory. Raises PullError, also when the server sends whole files only."""
        if not wanted.n_bytes:
            return b""
        source = self.source(listing, file)

        def read() -> bytes:
            is_whole = wanted.n_bytes == file.n_bytes
            with source.open_whole() if is_whole else source.open(wanted) as chunks:
                return b"".join(chunks)

        try:
            return (yield from with_retries(read, self.settings))
        except (ContentChanged, NoRangeSupport):
            raise PullError(
                f"{file.name}: the server sends no parts of files: --convert needs that."
            ) from None

    def _list_files(self, repo: str) -> Listing:
        host = urlsplit(self._endpoint).hostname or self._endpoint
        try:
            timeout = constants.HF_HUB_ETAG_TIMEOUT
            with connection_errors(host):
                try:
                    info = self._api.model_info(repo, revision="main", timeout=timeout, files_metadata=True)
                except (httpx2.UnsupportedProtocol, httpx2.InvalidURL):
                    raise PullError(
                        f"HF_ENDPOINT is {self._endpoint[:100]!r}: give it as https://HOST."
                    ) from None
        except HFValidationError:
            raise UsageError(
                f"--repo {repo[:100]}: write it as owner/name, such as Qwen/QwQ-32B-GGUF."
            ) from None
        except GatedRepoError:
            raise PullError(
                f"{repo} is gated. Accept its terms at {self._endpoint}/{repo}, then set HF_TOKEN to a token "
                "of that account (or run `hf auth login`)."
            ) from None
        except RepositoryNotFoundError:
            raise PullError(self._no_such(repo)) from None
        except HfHubHTTPError as error:
            raise _refused(repo, host, error) from None
        except UnicodeEncodeError:
            raise PullError("HF_TOKEN holds characters that no token has. Set it again.") from None
        except httpx2.TooManyRedirects:
            raise PullError(f"{host} redirects in a circle. Check HF_ENDPOINT and the proxy.") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, httpx2.HTTPError):
            raise PullError(
                f"{host} did not answer as a hub does. Check HF_ENDPOINT, or open a browser: "
                "a login page may be in the way."
            ) from None
        return _checked_listing(repo, info)

    def _no_such(self, repo: str) -> str:
        name = repo.rpartition("/")[2]
        try:
            found = [model.id for model in self._api.list_models(search=name, limit=50)]
            near = get_close_matches(repo, [str(other) for other in found], n=3, cutoff=0.5)
        except (httpx2.HTTPError, OSError, ValueError, TypeError, KeyError):
            near = []
        hint = f" Nearest: {', '.join(near)}." if near else ""
        return (
            f"the hub has no repository {repo}, or keeps it private.{hint} Check the name; "
            "for a private one set HF_TOKEN (or run `hf auth login`)."
        )


def _refused(repo: str, host: str, error: HfHubHTTPError) -> Exception:
    if (transient := transient_status(host, error.response)) is not None:
        return transient
    status = error.response.status_code
    if status in (401, 403):
        return PullError(
            f"{host} refuses {repo} ({status}): the token is wrong or may not read it. "
            "Set HF_TOKEN to one that may (or run `hf auth login`)."
        )
    return PullError(f"{host} answered {status} for {repo}. Check --repo and try again later.")


def _checked_listing(repo: str, info: Any) -> Listing:
    """The hub's answer as a listing. Raises PullError for one that cannot be right."""
    commit, siblings = getattr(info, "sha", None), getattr(info, "siblings", None)
    if not isinstance(commit, str) or not constants.REGEX_COMMIT_OID.fullmatch(commit) or len(commit) != 40:
        raise PullError(f"the hub states no commit for {repo}. Check HF_ENDPOINT.")
    if not isinstance(siblings, list) or len(siblings) > MAX_FILES:
        raise PullError(f"the hub's list of files of {repo} is missing or too long. Check HF_ENDPOINT.")
    files = tuple(_checked_file(repo, sibling) for sibling in siblings)
    return Listing(repo, commit, files)


def _checked_file(repo: str, sibling: Any) -> RemoteFile:
    name = checked_name(repo, sibling.rfilename)
    lfs, n_bytes = sibling.lfs, sibling.size
    if lfs is not None:
        n_bytes = lfs.size
    if isinstance(n_bytes, bool) or not isinstance(n_bytes, int) or not 0 <= n_bytes <= MAX_FILE_BYTES:
        raise PullError(f"{repo}: the hub states no believable size for {name}. Try again later.")
    try:
        if lfs is not None:
            return RemoteFile(name, n_bytes, Digest("sha256", lfs.sha256))
        return RemoteFile(name, n_bytes, Digest("git-sha1", sibling.blob_id))
    except (ValueError, TypeError):
        raise PullError(f"{repo}: the hub states no hash for {name}, so it cannot be verified.") from None


def checked_name(repo: str, name: object) -> str:
    """A file's name from the hub. Raises PullError for one that leaves its folder."""
    if isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and name.isprintable():
        parts = name.split("/")
        if all(part not in ("", ".", "..") and not any(sign in part for sign in "\\:") for part in parts):
            return name
    raise PullError(f"{repo} names a file {str(name)[:80]!r}, which could leave its folder: refused.")
