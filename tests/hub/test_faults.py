"""Downloads from a faulty local hub: the whole file with the right hash, or one clear error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import try_to_load_from_cache

from qwq_local.errors import PullError, UsageError
from qwq_local.hub.cache import HubCache
from qwq_local.hub.pull import BytesReceived, DownloadRestarted
from qwq_local.hub.transfer import RetryWait, retry_after_s
from tests.hub.client import MIB, NAME, REPO, Client, content, hub_with, leftovers
from tests.hub_server import (
    Fault,
    StoredFile,
    another_range,
    cut,
    fine,
    longer,
    status,
    web_page,
    whole_files_only,
    wrong_bytes,
)

DATA = content(14 * MIB + 12_345)
ONE = 1


@pytest.mark.parametrize(
    ("faults", "connections"),
    [
        ([], 4),
        ([cut(0), cut(1), cut(65_536), cut(3 * MIB + 7)], 4),
        ([cut(12 * MIB - 1)], ONE),
        ([status(500), status(503), status(502)], 4),
        ([status(429, Retry_After="7")], 4),
        ([another_range, another_range], 4),
        ([fine, status(403)], ONE),
        ([fine, cut(100), status(404), cut(5)], ONE),
    ],
    ids=["none", "cuts", "cut-before-the-end", "5xx", "429", "other-range", "expired-address", "mixed"],
)
def test_after_a_passing_fault_the_file_is_complete(
    tmp_path: Path, faults: list[Fault], connections: int
) -> None:
    hub = hub_with(DATA)
    hub.faults += faults
    with hub.served() as url:
        client = Client(url, tmp_path, connections)
        (path,) = client.pull()
    assert path.read_bytes() == DATA
    digest = hashlib.sha256(DATA).hexdigest()
    assert leftovers(tmp_path) == sorted([digest, NAME, "main"])
    assert path.is_symlink()
    assert try_to_load_from_cache(REPO, NAME, cache_dir=tmp_path) == str(path)
    assert not hub.faults


def test_bytes_received_before_a_cut_are_not_requested_again(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    hub.faults += [cut(5 * MIB), fine, cut(3 * MIB)]
    with hub.served() as url:
        Client(url, tmp_path, ONE).pull()
    assert hub.sent == len(DATA)


def test_a_wait_that_the_server_asks_for_is_kept_and_reported(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    hub.faults += [status(429, Retry_After="7")]
    hub.api_faults += [(429, {"Retry-After": "11"}, b""), (503, {}, b"")]
    with hub.served() as url:
        client = Client(url, tmp_path, ONE)
        client.pull()
    assert [wait.seconds for wait in client.events_of(RetryWait)] == [11, 1.0, 7]
    assert client.waits == [11, 1.0, 7]


def test_a_wait_of_hours_is_an_error_and_keeps_the_received_bytes(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    hub.faults += [fine, status(429, Retry_After="7200")]
    with hub.served() as url:
        client = Client(url, tmp_path, ONE)
        with pytest.raises(PullError, match="120 minutes"):
            client.pull()
        sent = hub.sent
        client.pull()
    assert 0 < sent < len(DATA)
    assert hub.sent == len(DATA)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([web_page], "a web page came instead"),
        ([longer], "the hub states"),
        ([status(404)], "no such file"),
        ([status(403)], "HF_TOKEN"),
        ([status(500)] * 20, "answered 500; gave up after 6 attempts"),
        ([cut(0)] * 20, "was cut; gave up after 6 attempts"),
    ],
    ids=["web-page", "wrong-length", "404", "403", "always-500", "always-cut"],
)
def test_a_permanent_fault_is_one_clear_line(tmp_path: Path, faults: list[Fault], message: str) -> None:
    hub = hub_with(DATA)
    hub.faults += faults
    with hub.served() as url:
        client = Client(url, tmp_path, ONE)
        with pytest.raises(PullError, match=message) as raised:
            client.pull()
    assert "\n" not in str(raised.value)
    assert try_to_load_from_cache(REPO, NAME, cache_dir=tmp_path) is None
    assert not list(tmp_path.rglob("snapshots"))


def test_wrong_bytes_are_fetched_again_once_and_whole(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    hub.faults += [fine, wrong_bytes]
    with hub.served() as url:
        client = Client(url, tmp_path, ONE)
        (path,) = client.pull()
    assert path.read_bytes() == DATA
    assert hub.sent == 2 * len(DATA)
    assert len(client.events_of(DownloadRestarted)) == 1


def test_a_hash_that_is_never_right_leaves_nothing(tmp_path: Path) -> None:
    hub = hub_with(DATA, stated=DATA[:-1] + b"?")
    with hub.served() as url:
        client = Client(url, tmp_path)
        with pytest.raises(PullError, match=r"another sha256 than the hub states, twice\. Nothing"):
            client.pull()
    assert hub.sent == 2 * len(DATA)
    assert leftovers(tmp_path) == []


def test_a_server_without_ranges_sends_the_file_whole(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    hub.faults += [whole_files_only(DATA)] * 3
    cut_whole = whole_files_only(DATA)
    hub.faults[1] = lambda reply: (cut_whole(reply), cut(2 * MIB)(reply))[0]
    with hub.served() as url:
        client = Client(url, tmp_path, ONE)
        (path,) = client.pull()
    assert path.read_bytes() == DATA
    assert [type(event) for event in client.events if isinstance(event, DownloadRestarted | RetryWait)] == [
        DownloadRestarted,
        RetryWait,
    ]


def test_a_file_that_changes_between_two_requests_is_never_mixed(tmp_path: Path) -> None:
    """The second request gets another content of the same length with another entity tag."""
    other = content(len(DATA), seed=2)
    hub = hub_with(DATA, stated=other)
    with hub.served() as url:
        hub.on_storage_request = lambda number: hub.repos[REPO].update(
            {NAME: StoredFile(DATA if number == 1 else other, stated=other)}
        )
        client = Client(url, tmp_path, ONE)
        (path,) = client.pull()
    assert path.read_bytes() == other
    (restarted,) = client.events_of(DownloadRestarted)
    assert "changed meanwhile" in restarted.reason


def test_a_file_that_keeps_changing_is_an_error(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    with hub.served() as url:
        hub.on_storage_request = lambda number: hub.repos[REPO].update(
            {NAME: StoredFile(DATA, etag=f'"{number}"')}
        )
        client = Client(url, tmp_path, ONE)
        with pytest.raises(PullError, match="changed meanwhile, twice"):
            client.pull()
    assert leftovers(tmp_path) == []


def test_redirects_in_a_circle_are_an_error(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    hub.loops = True
    with hub.served() as url, pytest.raises(PullError, match="in a circle"):
        Client(url, tmp_path).pull()


@pytest.mark.parametrize("address", ["http://127.0.0.1:99999", "http://[::1", "http://127.0.0.1:x"])
def test_a_redirect_without_an_address_is_an_error(tmp_path: Path, address: str) -> None:
    hub = hub_with(DATA)
    with hub.served() as url:
        hub.storage_url = address
        with pytest.raises(PullError, match="which is no address"):
            Client(url, tmp_path).pull()


def test_four_connections_fetch_a_file(tmp_path: Path) -> None:
    """The server sends nothing before four are open."""
    hub = hub_with(DATA)
    hub.least_open = 4
    with hub.served() as url:
        (path,) = Client(url, tmp_path).pull()
    assert path.read_bytes() == DATA
    assert hub.most_open == 4
    assert hub.sent == len(DATA)


def test_progress_reaches_the_whole_length(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    with hub.served() as url:
        client = Client(url, tmp_path)
        client.pull()
    done = [event.done for event in client.events_of(BytesReceived)]
    assert done[-1] == len(DATA)
    assert max(done) == len(DATA)


@pytest.mark.parametrize(
    "name", ["../../evil.gguf", "/etc/evil.gguf", "a\\..\\evil.gguf", "a/../evil.gguf", "C:evil.gguf"]
)
def test_a_file_name_that_could_leave_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    hub = hub_with(DATA)
    hub.repos[REPO][name] = StoredFile(b"evil")
    with hub.served() as url, pytest.raises(PullError, match="could leave its folder: refused"):
        Client(url, tmp_path).list_files()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b'{"id": 3}', b'{"id": "a/b", "sha": "..", "siblings": []}', b"[" * 100_000]
)
def test_an_answer_that_is_not_from_a_hub_is_one_clear_error(tmp_path: Path, answer: bytes) -> None:
    hub = hub_with(DATA)
    hub.api_faults += [(200, {"Content-Type": "application/json"}, answer)]
    with hub.served() as url, pytest.raises(PullError, match="HF_ENDPOINT"):
        Client(url, tmp_path).list_files()


@pytest.mark.parametrize("endpoint", ["http://a\nb", "nonsense", "ftp://a"])
def test_an_endpoint_that_is_not_an_address_is_one_clear_error(tmp_path: Path, endpoint: str) -> None:
    with pytest.raises(PullError, match=r"HF_ENDPOINT is .*: give it as https://HOST"):
        Client(endpoint, tmp_path).list_files()


def test_an_unknown_repository_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with hub_with(DATA).served() as url:
        with pytest.raises(PullError, match=f"Nearest: {REPO}"):
            Client(url, tmp_path).list_files("Qwen/QwQ-32B-GUFF")
        with pytest.raises(UsageError, match="owner/name"):
            Client(url, tmp_path).list_files("a/b/c")


def test_a_gated_repository_says_what_to_do(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    hub.gated.add(REPO)
    with hub.served() as url, pytest.raises(PullError, match=r"is gated\. Accept its terms .* HF_TOKEN"):
        Client(url, tmp_path).list_files()


def test_too_little_disk_is_an_error_before_the_first_byte(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    hub.repos[REPO][NAME].stated_size = 2**49
    with hub.served() as url:
        client = Client(url, tmp_path)
        with pytest.raises(PullError, match=r"needs 524,288\.0 GiB more, .* are free"):
            client.pull()
    assert hub.sent == 0


def test_all_parts_of_a_split_model_are_downloaded(tmp_path: Path) -> None:
    hub = hub_with(DATA)
    parts = {f"q8/QwQ-Q8_0-{n:05}-of-00003.gguf": StoredFile(content(MIB, seed=n)) for n in (1, 2, 3)}
    hub.repos[REPO] = {**parts, "QwQ-Q6_K-00001-of-00002.gguf": StoredFile(b"its second part is lost")}
    with hub.served() as url:
        paths = Client(url, tmp_path).pull()
    assert [path.read_bytes() for path in paths] == [file.content for file in parts.values()]
    assert [path.parent.name for path in paths] == ["q8"] * 3


@pytest.mark.parametrize(
    ("journal", "resumed"),
    [
        ("", 0),
        ("{", 0),
        ("{HEAD}\n[0, 999999999999]\n[[[\n[-1, 4]\n[3, 1]\n", 0),
        ("{HEAD}\n[0, 4000000]\n[0, 90", 4_000_000),
        ("{HEAD}\n[0, 9000000]\n", 5_000_000),
        ("{OTHER}\n[0, 4000000]\n", 0),
    ],
    ids=["empty", "torn", "nonsense", "torn-line", "past-the-file", "of-another-length"],
)
def test_a_damaged_journal_only_costs_bytes(tmp_path: Path, journal: str, resumed: int) -> None:
    hub = hub_with(DATA)
    etag = hub.repos[REPO][NAME].sha256
    blob = HubCache(tmp_path).blob(REPO, etag)
    blob.parent.mkdir(parents=True)
    for mark, n_bytes in (("{HEAD}", len(DATA)), ("{OTHER}", len(DATA) + 1)):
        journal = journal.replace(mark, json.dumps({"qwq-pull": 1, "n_bytes": n_bytes}))
    blob.with_name(f"{etag}.qwq-journal").write_text(journal)
    blob.with_name(f"{etag}.qwq-partial").write_bytes(DATA[:5_000_000])
    with hub.served() as url:
        (path,) = Client(url, tmp_path).pull()
    assert path.read_bytes() == DATA
    assert hub.sent == len(DATA) - resumed


def test_wrong_bytes_on_the_disk_are_found_by_the_hash(tmp_path: Path) -> None:
    """As after a loss of power: the journal names bytes that never reached the disk."""
    hub = hub_with(DATA)
    etag = hub.repos[REPO][NAME].sha256
    blob = HubCache(tmp_path).blob(REPO, etag)
    blob.parent.mkdir(parents=True)
    head = json.dumps({"qwq-pull": 1, "n_bytes": len(DATA)})
    blob.with_name(f"{etag}.qwq-journal").write_text(f"{head}\n[0, 4000000]\n")
    blob.with_name(f"{etag}.qwq-partial").write_bytes(bytes(4_000_000))
    with hub.served() as url:
        client = Client(url, tmp_path)
        (path,) = client.pull()
    assert path.read_bytes() == DATA
    assert len(client.events_of(DownloadRestarted)) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "5"}, 5.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:16:50 GMT"}, 10.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"ratelimit": '"resolvers";r=0;t=55'}, 55.0),
        ({"ratelimit": '"resolvers";r=9;t=55'}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "-3"}, None),
        ({}, None),
    ],
)
def test_every_form_of_retry_after_is_understood(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, now=1000.0) == seconds
