"""The real `qwq pull` against a local hub: killed, interrupted, twice at once, with tokens, offline."""

from __future__ import annotations

import io
import itertools
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest

from qwq_local.cli.pull import PullScreen, list_lines
from qwq_local.files import allocated_bytes
from qwq_local.hub.pull import BytesReceived, DownloadRestarted, FileStarted
from qwq_local.models.facts import Fit
from qwq_local.terminal.output import Output
from tests.command import QWQ, ROOT, Ran, Terminal, environment, qwq
from tests.hub.client import MIB, NAME, REPO, content, hub_with, leftovers
from tests.hub_server import LocalHub, StoredFile, cut, whole_files_only

TOKEN = "hf_secretsecretsecretsecretsecret"


@pytest.fixture
def model(miniature: Callable[[str], Path]) -> bytes:
    """A GGUF that qwq can run."""
    return miniature("Q8_0").read_bytes()


def padded(model: bytes, n_bytes: int) -> bytes:
    """The model with bytes after its tensors, which readers ignore."""
    return model + content(n_bytes - len(model))


def pull(hub: LocalHub, cache: Path, *arguments: str, **variables: str) -> Ran:
    return qwq(cache, "pull", *arguments, stdin=None, HF_ENDPOINT=hub.hub_url, **variables)


@pytest.fixture
def served(model: bytes) -> Iterator[LocalHub]:
    """A hub that offers the model as QwQ-32B."""
    hub = hub_with(model)
    with hub.served():
        yield hub


def test_one_command_brings_a_model_that_answers(served: LocalHub, tmp_path: Path, model: bytes) -> None:
    # The smallest KV cache, for machines with little memory.
    ran = pull(served, tmp_path, QWQ_KV_TYPE="q4_0")
    assert ran.status == 0, ran.stderr
    lines = ran.stderr.splitlines()
    assert lines[0].startswith(
        "Q4_K_M (5.1 MB) is the largest of 1 types that leaves room for 16,384 tokens: "
    )
    assert "qwq-32b:Q4_K_M is ready" in lines[-1]
    assert ran.stdout == ""

    settings = [f"--set={text}" for text in ("n_ctx=256", "thinking_budget=8", "max_tokens=4")]
    asked = qwq(tmp_path, "ask", *settings, "hi")
    assert asked.status in (0, 6), asked.stderr
    assert asked.stdout.strip()

    again = pull(served, tmp_path, "q4_k_m")
    assert again.status == 0
    assert "is here already" in again.stderr
    assert served.sent == len(model)


def test_the_unmodified_client_finds_a_pulled_model_without_a_server(
    served: LocalHub, tmp_path: Path
) -> None:
    assert pull(served, tmp_path, "Q4_K_M").status == 0
    program = (
        "import sys\nfrom huggingface_hub import hf_hub_download, try_to_load_from_cache, scan_cache_dir\n"
        f"print(try_to_load_from_cache({REPO!r}, {NAME!r}))\n"
        f"print(hf_hub_download({REPO!r}, {NAME!r}))\n"
        "print(len(scan_cache_dir().repos), len(scan_cache_dir().warnings))\n"
    )
    found = []
    for endpoint, offline in ((served.hub_url, ""), ("http://127.0.0.1:9", ""), (served.hub_url, "1")):
        variables = environment(tmp_path, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE=offline)
        result = subprocess.run(
            [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
        )
        found.append(result.stdout.split())
    assert len(set(found[0][:2])) == 1
    assert found[0][2:] == ["1", "0"]
    assert found[1] == found[2] == found[0]
    assert len(served.storage_requests()) == 2, "ours asked for its two spans, the client for nothing"


def partial_bytes(folder: Path) -> int:
    """The bytes of partial files on the disk, without holes."""
    return sum(allocated_bytes(path) for path in folder.rglob("*.qwq-partial"))


def test_ten_kills_cost_no_more_than_the_bytes_under_way(tmp_path: Path, model: bytes) -> None:
    """Ten times the hub stops at a random byte and the process is killed; then the download completes."""
    data = padded(model, 96 * MIB)
    hub = hub_with(data)
    places = sorted(random.Random(5).sample(range(MIB, len(data)), 10))
    with hub.served():
        for place in places:
            hub.hold_at, hub.held = place, threading.Event()
            hub.released = threading.Event()
            process = subprocess.Popen(
                [*QWQ, "pull", "Q4_K_M"],
                env=environment(tmp_path, HF_ENDPOINT=hub.hub_url),
                stderr=subprocess.DEVNULL,
            )
            while not hub.held.wait(0.05):
                assert process.poll() is None, "it ended before the hub held"
            process.kill()
            process.wait()
            hub.released.set()
        hub.hold_at = None
        ran = pull(hub, tmp_path, "Q4_K_M")
    assert ran.status == 0, ran.stderr
    assert "are here already" in ran.stderr
    # The limit is 16 MiB for each kill; two connections have at most 3 MiB each under way.
    assert hub.sent <= len(data) + 10 * 6 * MIB
    (blob,) = (tmp_path / "huggingface").rglob("blobs/*")
    assert blob.read_bytes() == data


def test_ctrl_c_keeps_the_received_bytes_and_says_how_to_continue(tmp_path: Path, model: bytes) -> None:
    data = padded(model, 24 * MIB)
    hub = hub_with(data)
    hub.hold_at = 9 * MIB
    with hub.served():
        variables = environment(tmp_path, HF_ENDPOINT=hub.hub_url)
        with Terminal(["pull", "Q4_K_M"], variables, columns=120) as terminal:
            # Bytes that the client has not read yet are lost; this test does not count them.
            terminal.wait_for(lambda: hub.held.is_set() and partial_bytes(tmp_path) >= hub.sent)
            terminal.interrupt()
            assert terminal.read_to_end() == 130
            assert "stopped; what came is kept" in terminal.text
        hub.hold_at = None
        hub.released.set()
        sent = hub.sent
        assert pull(hub, tmp_path, "Q4_K_M").status == 0
    assert hub.sent <= len(data) + 1 * MIB, "what had arrived was not asked for again"
    assert 0 < sent < len(data)


def test_two_at_once_download_the_file_once(tmp_path: Path, model: bytes) -> None:
    data = padded(model, 16 * MIB)
    hub = hub_with(data)
    hub.hold_at = 2 * MIB
    with hub.served():
        variables = environment(tmp_path, HF_ENDPOINT=hub.hub_url)
        first = subprocess.Popen([*QWQ, "pull", "Q4_K_M"], env=variables, stderr=subprocess.PIPE)
        while not hub.held.wait(0.05):
            assert first.poll() is None
        second = subprocess.Popen([*QWQ, "pull", "Q4_K_M"], env=variables, stderr=subprocess.PIPE, text=True)
        assert second.stderr is not None
        line = second.stderr.readline()
        while "another process is downloading" not in line:
            assert line, "the second one ended"
            line = second.stderr.readline()
        hub.hold_at = None
        hub.released.set()
        assert "is here already" in second.communicate()[1]
        first.communicate()
        assert (first.returncode, second.returncode) == (0, 0)
    assert hub.sent <= len(data) + 12 * MIB


def test_a_token_goes_to_the_hub_and_nowhere_else(tmp_path: Path, model: bytes) -> None:
    hub = hub_with(model)
    hub.gated, hub.token = {REPO}, TOKEN
    hub.faults += [cut(10)]
    with hub.served():
        refused = pull(hub, tmp_path, "Q4_K_M", HF_TOKEN=TOKEN[::-1])
        assert refused.status == 1
        assert "HF_TOKEN" in refused.stderr
        ran = pull(hub, tmp_path, "Q4_K_M", HF_TOKEN=TOKEN, HF_DEBUG="1")
    assert ran.status == 0, ran.stderr
    assert {asked.headers.get("authorization") for asked in hub.storage_requests()} == {None}
    for text in (refused.stderr, refused.stdout, ran.stderr, ran.stdout):
        assert TOKEN not in text
        assert TOKEN[::-1] not in text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_without_a_network_it_says_so_unless_the_file_is_here(served: LocalHub, tmp_path: Path) -> None:
    offline = pull(served, tmp_path, "Q4_K_M", HF_HUB_OFFLINE="1")
    assert offline.status == 1
    assert "HF_HUB_OFFLINE is set" in offline.stderr
    assert pull(served, tmp_path, "Q4_K_M").status == 0
    here = pull(served, tmp_path, "Q4_K_M", HF_HUB_OFFLINE="1")
    assert here.status == 0
    assert "is here already" in here.stderr


def test_a_proxy_is_used(served: LocalHub, tmp_path: Path) -> None:
    """The hub acts as the proxy: it gets requests with full addresses of a host that does not exist."""
    variables = {"HTTP_PROXY": served.hub_url, "http_proxy": served.hub_url, "NO_PROXY": "", "no_proxy": ""}
    ran = qwq(tmp_path, "pull", "Q4_K_M", stdin=None, HF_ENDPOINT="http://hub.invalid", **variables)
    asked = [request.path for request in served.asked]
    assert any(path.startswith("http://hub.invalid/api/models/") for path in asked), ran.stderr


def test_the_list_says_what_fits(served: LocalHub, tmp_path: Path) -> None:
    served.repos[REPO]["qwq-32b-q8_0.gguf"] = StoredFile(b"8", stated_size=2**42)
    ran = pull(served, tmp_path, "--list")
    assert ran.status == 0
    rows = [line.split() for line in ran.stdout.splitlines()[1:] if not line.startswith("(in brackets")]
    assert [row[0] for row in rows] == ["TYPE", "Q8_0", "Q4_K_M"]
    assert rows[1][3:5] == ["too", "large"]
    assert int(rows[2][3].strip("()").replace(",", "")) > 0
    assert rows[2][4] == NAME
    assert leftovers(tmp_path / "huggingface") == []


def test_a_missing_type_is_wrong_usage(served: LocalHub, tmp_path: Path) -> None:
    ran = pull(served, tmp_path, "Q4_K_S")
    assert ran.status == 2
    assert "it has Q4_K_M. Did you mean Q4_K_M?" in ran.stderr
    ran = pull(served, tmp_path, "--file", "qwq-32b-q4_k_s.gguf")
    assert ran.status == 1
    assert f"Nearest: {NAME}" in ran.stderr


def test_a_file_that_is_not_a_model_is_not_used_and_can_be_removed(tmp_path: Path, model: bytes) -> None:
    hub = hub_with(b"these are no weights" * 1000)
    hub.repos[REPO]["qwq-32b-q8_0.gguf"] = StoredFile(model)
    with hub.served():
        assert pull(hub, tmp_path, "Q8_0").status == 0
        ran = pull(hub, tmp_path, "Q4_K_M")
    assert ran.status == 1
    assert "qwq cannot run it" in ran.stderr
    listed = qwq(tmp_path, "models")
    assert "* qwq-32b:Q8_0" in listed.stdout
    assert "qwq-32b:Q4_K_M cannot be run: " in listed.stderr
    assert qwq(tmp_path, "models", "rm", "-y", "qwq-32b:Q4_K_M").status == 0
    assert "Q4_K_M" not in qwq(tmp_path, "models").stdout


def test_a_model_that_qwq_cannot_run_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_string("general.name", "x" * 100_000)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    llama = (tmp_path / "llama.gguf").read_bytes()
    hub = hub_with(llama)
    hub.repos[REPO]["notes-q8_0.gguf"] = StoredFile(b"no model at all" * 10_000)
    with hub.served():
        ran = pull(hub, tmp_path, "--file", NAME)
        assert ran.status == 1
        reason = "holds a model of architecture 'llama'; qwq runs qwen2, qwen3. Nothing was downloaded."
        assert reason in ran.stderr
        ran = pull(hub, tmp_path, "--repo", REPO, "Q8_0")
        assert ran.status == 1
        assert "notes-q8_0.gguf is no GGUF. Nothing was downloaded" in ran.stderr
        assert hub.sent == 2 * 4096


def test_the_first_bytes_of_a_model_that_can_run_cause_no_notice(served: LocalHub, tmp_path: Path) -> None:
    """Also where the server sends no ranges."""
    assert pull(served, tmp_path / "one", "--file", NAME).status == 0
    served.faults[:] = [whole_files_only(served.repos[REPO][NAME].content)] * 4
    assert pull(served, tmp_path / "two", "--file", NAME).status == 0


def test_only_our_own_abandoned_partial_files_are_removed(served: LocalHub, tmp_path: Path) -> None:
    blobs = tmp_path / "huggingface" / "hub" / "models--some--repo" / "blobs"
    blobs.mkdir(parents=True)
    old, young, foreign = (blobs / name for name in ("a.qwq-partial", "b.qwq-partial", "c.1234.incomplete"))
    for path in (old, young, foreign):
        path.write_bytes(b"x" * 10_000)
    (blobs / "a.qwq-journal").write_text("{}\n")
    for path in (old, foreign):
        os.utime(path, (1, 1))
    ran = pull(served, tmp_path, "Q4_K_M")
    assert ran.status == 0
    assert "abandoned" in ran.stderr
    assert sorted(path.name for path in blobs.iterdir()) == [young.name, foreign.name]


def test_a_file_that_another_tool_left_damaged_is_fetched_again(
    served: LocalHub, tmp_path: Path, model: bytes
) -> None:
    blobs = tmp_path / "huggingface" / "hub" / "models--Qwen--QwQ-32B-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    blob = blobs / served.repos[REPO][NAME].sha256
    blob.write_bytes(model[:-1] + b"?")
    ran = pull(served, tmp_path, "Q4_K_M")
    assert ran.status == 0
    assert "is here, but damaged" in ran.stderr
    assert blob.read_bytes() == model


def test_a_path_imports_no_hub_client(tmp_path: Path) -> None:
    """`qwq ask` with a path does not pay for the hub's client."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom qwq_local.models.catalog import Catalog\n"
        "from qwq_local.models.store import find_model\n"
        "find_model(sys.argv[1], Catalog('a', 'b/c', {}), Path('.'))\n"
        "print([m for m in sys.modules if m.startswith(('huggingface_hub', 'httpx2'))])"
    )
    path = tmp_path / "x.gguf"
    path.write_bytes(b"")
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_amount_shown_never_goes_backwards(is_terminal: bool) -> None:
    seconds = itertools.count(0.0, 40.0)
    stream = io.StringIO()
    screen = PullScreen(
        Output(stream, is_terminal=is_terminal, size=lambda: (120, 24)), lambda: next(seconds)
    )
    screen.show(FileStarted("model.gguf", 0, 1, 10 * 10**9, 0))
    for done in (2, 5):
        screen.show(BytesReceived(done * 10**9))
    screen.show(DownloadRestarted("the server sends whole files only"))
    for done in (1, 4, 6, 10):
        screen.show(BytesReceived(done * 10**9))
    text = stream.getvalue()
    amounts = [float(amount) for amount in re.findall(r"([\d.]+) / 10\.00 GB", text)]
    assert amounts == sorted(amounts)
    assert amounts[0] == 2
    assert amounts[-1] == 10
    assert ("\r" in text) is is_terminal


def test_brackets_in_the_list_are_explained() -> None:
    fit = Fit(20 * 10**9, "main memory", "q8_0", 32_768, 131_072)
    sizes = {"a": 34_800_000_000, "b": 19_000_000_000, "c": 9_000_000_000}
    rows = [("Q4_K_M", size, 1, name) for name, size in sizes.items()]
    lines = list(list_lines("o/n", rows, fit))
    assert "too large" in lines[2]
    assert re.search(r" \([\d,]+\)  b$", lines[3])
    assert lines[-1].startswith("(in brackets: less than the 16,384 tokens ")
    assert not any("brackets" in line for line in list_lines("o/n", [rows[0], rows[2]], fit))
    assert {line.rindex("  ") for line in lines[1:5]} == {lines[1].rindex("  FILE")}


@pytest.mark.parametrize("endpoint", ["http://[::1", "http://127.0.0.1:99999"])
def test_an_invalid_address_is_refused_before_anything_else(tmp_path: Path, endpoint: str) -> None:
    ran = qwq(tmp_path, "models", stdin=None, HF_ENDPOINT=endpoint)
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"qwq: HF_ENDPOINT is {endpoint!r} (")
    assert ran.stderr.count("\n") == 1
