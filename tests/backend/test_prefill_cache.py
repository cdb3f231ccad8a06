"""Ten questions about one file cost one prefill: `qwq ask` in one process after the other, the file first."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from qwq_local.backend.api import ReplyRequest
from qwq_local.backend.local import LocalBackend
from qwq_local.backend.prefill_cache import PrefillCache
from qwq_local.dialogue.conversation import Attachment, Framing, Message, Role
from qwq_local.engine.kv_entry import Entry
from qwq_local.engine.kv_store import kv_folder
from qwq_local.errors import Aborted, AbortFlag, QwqError
from qwq_local.events import Finished, Planned, Prefill
from qwq_local.models.identity import ModelIdentities
from qwq_local.paths import Directories
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import profile_folders, resolve
from tests.command import ROOT, TIMEOUT_S, qwq
from tests.tiny_models import constant_model

SHORT = (
    "thinking_budget=4",
    "answer_reserve=16",
    "max_tokens=2",
    "loop_guard=off",
    "native_window=1024",
    "yarn_origin=1024",
    "kv_store_min_tokens=200",
    "threads=1",
    "temperature=0",
)
BOOK = " ".join(f"On day {i} the fox saw {i * i} dogs." for i in range(20))
# A question and the text that the template writes around it.
FEW = 40
CUT = 6


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return constant_model(tmp_path_factory.mktemp("model"), "a", layers=4, hidden=128)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache for this test alone."""
    return tmp_path / "cache"


def asked(cache: Path, *arguments: object, kv_store: str = "1") -> dict[str, Any]:
    """The last line of a `qwq ask --jsonl` that ran to its end, and its stderr."""
    settings = [word for setting in SHORT for word in ("--set", setting)]
    ran = qwq(cache, "ask", "--jsonl", *settings, *map(str, arguments), QWQ_KV_STORE=kv_store)
    assert ran.status == CUT, ran.stderr
    last: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    assert last["event"] == "finished"
    return {"stderr": ran.stderr, **last["stats"]}


def computed(stats: dict[str, Any]) -> int:
    return int(stats["prompt_tokens"] - stats["cached_tokens"])


def entries(cache: Path) -> list[Entry]:
    return kv_folder(cache).entries()


def test_a_second_process_prefills_only_the_question(model_file: Path, book: Path, cache: Path) -> None:
    first = asked(cache, "-m", model_file, "-f", book, "What did the fox see?")
    second = asked(cache, "-m", model_file, "-f", book, "And on day 17?")
    assert computed(first) == first["prompt_tokens"] > 400
    assert computed(second) < FEW
    assert len(entries(cache)) == 1
    assert first["stderr"] == second["stderr"] == ""
    listed = qwq(cache, "cache").stdout.splitlines()
    assert f"{first['prompt_tokens']:,}" in listed[1]
    assert qwq(cache, "cache", "clear").stdout.startswith("removed 1 text, ")
    assert computed(asked(cache, "-m", model_file, "-f", book, "And on day 17?")) == second["prompt_tokens"]


def test_private_writes_nothing_and_leaves_no_trace_of_reading(
    model_file: Path, book: Path, cache: Path
) -> None:
    question = ("-m", model_file, "-f", book, "What did the fox see?")
    asked(cache, "--private", *question)
    assert not any(path.is_file() for path in cache.rglob("*"))
    asked(cache, *question)
    (entry,) = entries(cache)
    os.utime(entry.path, (1, 1))
    assert computed(asked(cache, "--private", *question)) < FEW
    assert [each.used_s for each in entries(cache)] == [1]


@pytest.mark.parametrize("setting", ["kv_store=off", "kv_store_min_tokens=1000"])
def test_profile_keys_turn_it_off_and_set_the_shortest_prompt(
    model_file: Path, book: Path, cache: Path, setting: str
) -> None:
    asked(cache, "-m", model_file, "-f", book, "--set", setting, "What did the fox see?")
    assert entries(cache) == []


def test_another_window_scaling_or_kv_type_prefills_again(model_file: Path, book: Path, cache: Path) -> None:
    """Entries of the others stay: each setting finds its own again."""
    question = ("-m", model_file, "-f", book, "What did the fox see?")
    ways = ((), ("--set", "kv_type=q8_0"), ("--set", "yarn=2"), ("--set", "flash_attention=off"))
    for way in ways:
        assert computed(asked(cache, *question, *way)) > 400
    for way in ways:
        assert computed(asked(cache, *question, *way)) == 1
    assert computed(asked(cache, *question, "--set", "n_ctx=900")) == 1
    assert len(entries(cache)) == len(ways)


def test_a_failure_to_keep_an_entry_is_reported_after_the_answer(
    model_file: Path, book: Path, cache: Path
) -> None:
    stats = asked(cache, "-m", model_file, "-f", book, "What?", kv_store="0.0001")
    assert stats["stderr"].startswith("note: what was prefilled is not kept for the next question: ")
    assert "--set kv_store=GIB" in stats["stderr"]


def test_each_question_of_a_batch_uses_the_kept_prefill(model_file: Path, book: Path, cache: Path) -> None:
    lines = b'{"question": "What?"}\n{"question": "When?"}\n'
    settings = [word for setting in SHORT for word in ("--set", setting)]
    counts = []
    for _ in range(2):
        ran = qwq(cache, "ask", "-m", str(model_file), "--each", "-f", str(book), *settings, stdin=lines)
        answers = [json.loads(line) for line in ran.stdout.splitlines()]
        counts.append([computed(answer["stats"]) for answer in answers])
    assert counts[0][0] > 400
    assert max(counts[0][1], *counts[1]) < FEW


def test_the_output_ends_before_the_entry_is_written() -> None:
    """The pipe ends while the process still has something to do: here, to read a line."""
    program = (
        "import sys; from qwq_local.cli.environment import finish_stdout; print('the answer'); "
        "finish_stdout(sys.stdout); print('goes nowhere'); sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    watchdog.start()
    with process:
        assert process.stdout is not None
        assert process.stdout.read() == b"the answer\n"
        assert process.poll() is None
    watchdog.cancel()
    assert process.returncode == 0


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    folders = profile_folders(Directories(tmp_path, tmp_path, tmp_path))
    return resolve("miniature", "chat", folders, {}, SHORT).profile


@pytest.fixture
def backends(model_file: Path, profile: Profile, cache: Path) -> Iterator[Callable[[], LocalBackend]]:
    """New backends over one store, like new processes."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(
            closing(
                LocalBackend(model_file, profile, 1, AbortFlag(), prefill_cache=PrefillCache(cache, profile))
            )
        )


def replied(backend: LocalBackend, *messages: Message) -> tuple[int, Finished]:
    """How many prompt tokens were computed, and the end of the turn; the generator stays suspended."""
    prefilled: list[Prefill] = []
    for event in backend.reply(ReplyRequest(messages)):
        if isinstance(event, Prefill):
            prefilled.append(event)
        if isinstance(event, Finished):
            return prefilled[-1].total - prefilled[-1].cached, event
    raise AssertionError("a turn always ends with Finished")


def with_book(question: str) -> Message:
    return Framing("", (Attachment("book.txt", BOOK),)).messages(question)[0]


def test_ten_questions_cost_one_prefill(backends: Callable[[], LocalBackend], cache: Path) -> None:
    counts = []
    for number in range(10):
        backend = backends()
        counts.append(replied(backend, with_book(f"What did the fox see on day {number}?"))[0])
        assert list(backend.keep()) == []
    assert counts[0] > 400
    assert max(counts[1:]) < FEW
    assert len(entries(cache)) == 1


def test_a_resumed_conversation_prefills_only_new_tokens(
    backends: Callable[[], LocalBackend], cache: Path
) -> None:
    """Its history is prefilled once too, except for turns too short for an entry."""
    history, counts = [with_book("What did the fox see?")], []
    for turn in range(3):
        backend = backends()
        count, finished = replied(backend, *history)
        assert list(backend.keep()) == []
        counts.append(count)
        answer = Message(Role.ASSISTANT, f"{finished.answer} dogs and cats, {turn} of them.")
        history += [answer, Message(Role.USER, "And then? " * 12)]
    assert counts[0] > 400
    assert max(counts[1:]) < 200 + 150
    assert len(entries(cache)) <= 2


def test_a_turn_without_a_context_keeps_nothing(backends: Callable[[], LocalBackend], cache: Path) -> None:
    backend = backends()
    replied(backend, with_book("What?"))
    with pytest.raises(QwqError):
        replied(backend, Message(Role.USER, "far too much " * 5000))
    assert list(backend.keep()) == []
    backend.close()
    assert list(backend.keep()) == []
    assert entries(cache) == []


def test_a_turn_is_kept_once(backends: Callable[[], LocalBackend], cache: Path) -> None:
    backend = backends()
    replied(backend, with_book("What?"))
    assert list(backend.keep()) == []
    (entry,) = entries(cache)
    entry.path.unlink()
    assert list(backend.keep()) == []
    assert entries(cache) == []


def test_a_stop_while_an_entry_is_read_takes_effect(
    model_file: Path, profile: Profile, cache: Path, backends: Callable[[], LocalBackend]
) -> None:
    first = backends()
    replied(first, with_book("What?"))
    assert list(first.keep()) == []
    abort = AbortFlag()
    second = LocalBackend(model_file, profile, 1, abort, prefill_cache=PrefillCache(cache, profile))
    with closing(second):
        events = second.reply(ReplyRequest([with_book("When?")]))
        assert any(isinstance(event, Planned) for event in events)
        abort.set()
        with pytest.raises(Aborted):
            next(events)


def test_a_copy_of_the_model_is_recognised_by_its_content(
    model_file: Path, profile: Profile, cache: Path, tmp_path: Path
) -> None:
    """The same weights in another file with another time, as after a second download."""
    copy = Path(shutil.copy(model_file, tmp_path / "copy.gguf"))
    identities = ModelIdentities(cache / "identities")
    for path in (model_file, copy):
        identities.record(path, "0" * 64)
    counts = []
    for path in (model_file, copy):
        backend = LocalBackend(path, profile, 1, AbortFlag(), prefill_cache=PrefillCache(cache, profile))
        with closing(backend):
            counts.append(replied(backend, with_book("What?"))[0])
            assert list(backend.keep()) == []
    assert counts[0] > 400
    assert counts[1] == 1
