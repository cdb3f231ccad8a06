"""`qwq pull --convert`: shards on a small disk give the same bytes as the whole folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from qwq_convert.checkpoint import CheckpointFolder
from qwq_convert.gguf_file import read_header
from qwq_convert.pipeline import ConversionDone, TensorDone, run_conversion
from qwq_convert.plan import ConvertRequest
from qwq_convert.safetensors import SourceTensor

from qwq_local.hub.cache import HubCache
from qwq_local.hub.checkpoint import RemoteCheckpoint, ShardCaches
from qwq_local.hub.conversion import convert_weights
from tests.checkpoints import INDEX, CheckpointSpec, edit_json, write_checkpoint
from tests.command import QWQ, Ran, Terminal, environment, qwq
from tests.hub.client import Client, content
from tests.hub_server import COMMIT, LocalHub, StoredFile, wrong_bytes

REPO = "Qwen/Tiny"
SPEC = CheckpointSpec(n_layers=6, hidden_size=256, intermediate_size=1024, n_shards=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint laid out as in the Hugging Face cache, so that its label is the repository's."""
    base = tmp_path_factory.mktemp("weights") / "models--Qwen--Tiny" / "snapshots"
    base.mkdir(parents=True)
    return write_checkpoint(base / COMMIT, SPEC)


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a conversion of the whole folder."""
    out = tmp_path_factory.mktemp("out") / "Tiny-Q8_0.gguf"
    return run_conversion(ConvertRequest(folder, "Q8_0", out)).read_bytes()


@pytest.fixture
def hub(folder: Path) -> Iterator[LocalHub]:
    files = {
        path.name: StoredFile(path.read_bytes(), is_large=path.suffix == ".safetensors")
        for path in folder.iterdir()
    }
    hub = LocalHub({REPO: files})
    with hub.served():
        yield hub


def pull(hub: LocalHub, cache: Path, *arguments: str) -> Ran:
    return qwq(cache, "pull", "--repo", REPO, "--convert", "Q8_0", *arguments, HF_ENDPOINT=hub.hub_url)


def output(cache: Path) -> Path:
    return cache / "data" / "models" / "Tiny-Q8_0.gguf"


def shard_sizes(hub: LocalHub) -> list[int]:
    return sorted(
        len(file.content) for name, file in hub.repos[REPO].items() if name.endswith(".safetensors")
    )


def on_disk(cache: Path) -> int:
    """The bytes of weights and output on the disk, without holes."""
    places = (cache / "weights", cache / "data" / "models")
    paths = [
        path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()
    ]
    total = 0
    for path in paths:
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def test_the_bytes_are_those_of_the_folder_and_the_disk_holds_two_shards(
    hub: LocalHub, tmp_path: Path, expected: bytes
) -> None:
    seen: list[int] = []
    n_shards: list[int] = []

    def look(_number: int) -> None:
        seen.append(on_disk(tmp_path))
        blobs = (tmp_path / "weights").rglob("blobs/*")
        n_shards.append(len({path.name.partition(".")[0] for path in blobs}))

    hub.on_storage_request = look
    ran = pull(hub, tmp_path)
    assert ran.status == 0, ran.stderr
    assert output(tmp_path).read_bytes() == expected
    sizes = shard_sizes(hub)
    assert max(n_shards) <= 2
    bound = len(expected) + sizes[-1] + sizes[-2] + 64 * 1024
    assert sizes[-1] < max(seen) <= bound < len(expected) + sum(sizes)
    assert list((tmp_path / "weights").rglob("blobs/*")) == []
    assert "Tiny-Q8_0 is ready" in ran.stderr

    listed = json.loads(qwq(tmp_path, "models", "--json").stdout)
    assert [(row["name"], row["from"], row["default"]) for row in listed] == [
        ("Tiny-Q8_0", "converted", True)
    ]


def test_every_check_comes_before_the_weights(hub: LocalHub, tmp_path: Path, folder: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    edit_json(broken / "config.json", hidden_size=128)
    hub.repos[REPO]["config.json"] = StoredFile((broken / "config.json").read_bytes(), is_large=False)
    ran = pull(hub, tmp_path)
    assert ran.status == 1
    assert hub.sent < 5 * 70_000, "only the headers were asked for"
    assert not output(tmp_path).exists()


def test_kills_cost_little_and_change_no_byte(hub: LocalHub, tmp_path: Path, expected: bytes) -> None:
    total = sum(shard_sizes(hub))
    command = [*QWQ, "pull", "--repo", REPO, "--convert", "Q8_0"]
    for _ in range(3):
        hub.hold_at, hub.held, hub.released = hub.sent + total // 4, threading.Event(), threading.Event()
        process = subprocess.Popen(
            command, env=environment(tmp_path, HF_ENDPOINT=hub.hub_url), stderr=subprocess.DEVNULL
        )
        while not hub.held.wait(0.05):
            assert process.poll() is None, "it ended before the hub held"
        process.kill()
        process.wait()
        hub.released.set()
    hub.hold_at = None
    ran = pull(hub, tmp_path)
    assert ran.status == 0, ran.stderr
    assert output(tmp_path).read_bytes() == expected
    assert list((tmp_path / "weights").rglob("blobs/*")) == []


def test_a_shard_with_wrong_bytes_is_fetched_again(hub: LocalHub, tmp_path: Path, expected: bytes) -> None:
    n_headers = 5
    hub.faults += [lambda _reply: None] * (n_headers + 1) + [wrong_bytes]
    ran = pull(hub, tmp_path)
    assert ran.status == 0, ran.stderr
    assert "another sha256 than the hub states" in ran.stderr
    assert output(tmp_path).read_bytes() == expected


def test_a_shard_that_is_never_right_leaves_no_model(hub: LocalHub, tmp_path: Path) -> None:
    name = sorted(name for name in hub.repos[REPO] if name.endswith(".safetensors"))[2]
    whole = hub.repos[REPO][name].content
    hub.repos[REPO][name] = StoredFile(whole, stated=whole + content(1))
    hub.repos[REPO][name].stated_size = len(whole)
    ran = pull(hub, tmp_path)
    assert ran.status == 1
    assert "another sha256 than the hub states, twice" in ran.stderr
    assert not output(tmp_path).exists()
    assert json.loads(qwq(tmp_path, "models", "--json").stdout) == []


def test_keep_weights_keeps_them_where_other_tools_find_them(
    hub: LocalHub, tmp_path: Path, expected: bytes
) -> None:
    assert pull(hub, tmp_path, "--keep-weights").status == 0
    snapshot = next((tmp_path / "huggingface").rglob(COMMIT))
    for name, file in hub.repos[REPO].items():
        assert (snapshot / name).read_bytes() == file.content
    sent = hub.sent
    output(tmp_path).unlink()
    assert pull(hub, tmp_path).status == 0
    assert hub.sent - sent < 5 * 70_000, "the kept weights were read in place"
    assert output(tmp_path).read_bytes() == expected
    assert {path.name for path in snapshot.iterdir() if path.exists()} == set(hub.repos[REPO])


def test_a_shard_name_that_leaves_its_folder_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    index = json.loads(hub.repos[REPO][INDEX].content)
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "../../evil.safetensors"
    hub.repos[REPO][INDEX] = StoredFile(json.dumps(index).encode(), is_large=False)
    ran = pull(hub, tmp_path)
    assert ran.status == 1
    assert "is no file name" in ran.stderr
    assert not list(tmp_path.rglob("evil*"))


def test_ctrl_c_ends_download_and_conversion_and_the_next_run_continues(
    hub: LocalHub, tmp_path: Path, expected: bytes
) -> None:
    hub.hold_at = sum(shard_sizes(hub)) // 2
    variables = environment(tmp_path, HF_ENDPOINT=hub.hub_url)
    with Terminal(["pull", "--repo", REPO, "--convert", "Q8_0"], variables, columns=160) as terminal:
        terminal.wait_for(hub.held.is_set)
        terminal.interrupt()
        assert terminal.read_to_end() == 130
        assert "what came and what is converted is kept" in terminal.text
    hub.hold_at = None
    hub.released.set()
    assert pull(hub, tmp_path).status == 0
    assert output(tmp_path).read_bytes() == expected


def test_every_event_of_the_conversion_is_yielded(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", CheckpointSpec(n_layers=2))
    hub = LocalHub(
        {
            REPO: {
                path.name: StoredFile(path.read_bytes(), path.suffix == ".safetensors")
                for path in source.iterdir()
            }
        }
    )
    with hub.served() as url:
        client = Client(url, tmp_path / "own")
        request = ConvertRequest(Path("unused"), "Q8_0", tmp_path / "out.gguf")
        events = convert_weights(
            client.puller, REPO, request, ShardCaches(HubCache(tmp_path / "shared"), client.cache)
        )
        reported = list(events)
    tensors = [event.name for event in reported if isinstance(event, TensorDone)]
    assert len(tensors) == len(set(tensors)) == len(read_header(tmp_path / "out.gguf").tensors)
    assert reported[-1] == ConversionDone((tmp_path / "out.gguf",), (tmp_path / "out.gguf").stat().st_size)


def test_one_shard_is_fetched_ahead_and_a_third_only_when_one_is_done(
    hub: LocalHub, tmp_path: Path, folder: Path
) -> None:
    client = Client(hub.hub_url, tmp_path / "own")
    listing = client.list_files(REPO)
    caches = ShardCaches(HubCache(tmp_path / "shared"), client.cache)

    def asked_for() -> set[str]:
        return {asked.path.rpartition("/")[2].partition("?")[0] for asked in hub.storage_requests()}

    with (
        CheckpointFolder(folder) as local,
        closing(RemoteCheckpoint(client.puller, listing, local, caches)) as checkpoint,
        closing(checkpoint.download()) as download,
        ThreadPoolExecutor(1) as pool,
    ):
        tensors = {tensor.shard: tensor for tensor in local.tensors.values()}
        first, second, third = (tensors[shard.name] for shard in checkpoint.shards[:3])

        def reading(tensor: SourceTensor) -> Future[bytes]:
            return pool.submit(checkpoint.read, tensor, 0, 100)

        def read(future: Future[bytes]) -> bytes:
            while not future.done():
                next(download)
            return future.result()

        assert read(reading(first)) == local.read(first, 0, 100)
        assert read(reading(second)) == local.read(second, 0, 100)
        waiting = reading(third)
        while not checkpoint.is_starved:
            next(download)
        assert next(download) is None
        assert not waiting.done()
        assert asked_for() == {first.shard, second.shard}
        assert checkpoint.read(first, 0, 100) == local.read(first, 0, 100)
        checkpoint.release_finished(
            {name for name, each in local.tensors.items() if each.shard == first.shard}
        )
        assert read(waiting) == local.read(third, 0, 100)
        assert first.shard not in {path.name for path in (tmp_path / "own").rglob("*.safetensors")}
