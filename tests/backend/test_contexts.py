"""Contexts follow their plans: they grow by copying, change their scaling, shrink, or come back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwq_local.backend.api import ReplyRequest
from qwq_local.backend.local import LocalBackend
from qwq_local.backend.planner import Planner
from qwq_local.backend.weights import ActiveContext, Contexts
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.engine.api import ContextSettings, SamplerSettings
from qwq_local.engine.model import LoadedModel
from qwq_local.errors import AbortFlag, DoesNotFit, PromptTooLong
from qwq_local.events import Event, Notice, Planned, Prefill
from qwq_local.paths import Directories
from qwq_local.planning.memory import Device, DeviceKind, Machine
from qwq_local.planning.plan import Plan
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import profile_folders, resolve
from qwq_local.text import GIB
from tests.command import ROOT
from tests.single_sequence import SingleSequence

GREEDY = SamplerSettings(temperature=0)


def profile(tmp_path: Path, *settings: str) -> Profile:
    folders = profile_folders(Directories(tmp_path, tmp_path, tmp_path))
    small = ("temperature=0", "thinking_budget=32", "answer_reserve=32", "max_tokens=2")
    return resolve("miniature", "chat", folders, {}, [*small, *settings]).profile


@pytest.fixture
def backend(miniature: Callable[[str], Path], tmp_path: Path) -> Iterator[LocalBackend]:
    with closing(LocalBackend(miniature("Q8_0"), profile(tmp_path), 1, AbortFlag())) as made:
        yield made


def asked(backend: LocalBackend, n_words: int) -> list[Event]:
    question = "How many r's are in the word strawberry? " + "hello " * n_words
    return list(backend.reply(ReplyRequest([Message(Role.USER, question)])))


def planned(events: list[Event]) -> Planned:
    return next(event for event in events if isinstance(event, Planned))


def notices(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Notice) and "thinking of" not in event.text]


def cached(events: list[Event]) -> int:
    return next(event.cached for event in events if isinstance(event, Prefill))


def continued(context: SingleSequence, count: int = 24) -> list[int]:
    context.start_sampling(GREEDY)
    tokens = []
    for _ in range(count):
        tokens.append(context.sample())
        context.append(tokens[-1])
    return tokens


@pytest.mark.parametrize(
    ("kv_type", "flash"), [("f16", False), ("f16", True), ("q8_0", True), ("q4_0", True)]
)
def test_a_copied_cache_continues_like_the_original(loaded: LoadedModel, kv_type: str, flash: bool) -> None:
    settings = ContextSettings(512, 256, 256, kv_type, kv_type, flash_attention=flash, threads=1)
    tokens = loaded.vocabulary.encode_text("How many r's are in the word strawberry? " * 4)
    with closing(SingleSequence(loaded, settings)) as small:
        list(small.prefill(tokens))
        state = small.saved_state()
        expected = continued(small)
    with closing(SingleSequence(loaded, replace(settings, n_ctx=1024))) as large:
        assert large.restore(state)
        assert list(large.tokens) == tokens
        assert next(large.prefill(tokens)).cached == len(tokens) - 1
        list(large.prefill(tokens))
        assert continued(large) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"yarn_factor": 2.0, "yarn_origin": 1024},
        {"kv_type_k": "q8_0", "kv_type_v": "q8_0"},
        {"flash_attention": False},
        {"n_ctx": 256},
    ],
)
def test_a_state_of_another_context_is_refused_and_leaves_an_empty_cache(
    loaded: LoadedModel, other: dict[str, object]
) -> None:
    settings = ContextSettings(1024, 256, 256, flash_attention=True, threads=1)
    with closing(SingleSequence(loaded, settings)) as context:
        list(context.prefill(loaded.vocabulary.encode_text("hello " * 90)))
        state = context.saved_state()
        assert len(state.tokens) > 256
    with closing(SingleSequence(loaded, replace(settings, **other))) as context:  # type: ignore[arg-type]
        list(context.prefill([5, 6, 7]))
        assert not context.restore(state)
        assert list(context.tokens) == []
        list(context.prefill([5, 6, 7]))
        assert continued(context, 2)


def test_a_larger_context_copies_the_cache_instead_of_prefilling_again(backend: LocalBackend) -> None:
    first = asked(backend, 20)
    second = asked(backend, 90)
    assert planned(first).n_ctx < planned(second).n_ctx <= 1024
    assert cached(second) > planned(first).prompt_tokens - 20
    assert notices(second) == []


def test_yarn_turns_on_past_the_window_and_off_for_a_short_prompt(
    backend: LocalBackend,
) -> None:
    assert planned(asked(backend, 20)).yarn_factor == 1
    long = asked(backend, 200)
    assert (planned(long).yarn_factor, planned(long).yarn_origin) == (2, 1024)
    assert [line.split(":")[1] for line in notices(long)] == [
        " YaRN 2 over 1,024 from here, the prompt is read anew."
    ]
    assert "tokens of prompt, thinking and answer outgrow 1,024" in notices(long)[0]
    assert cached(long) == 0
    further = asked(backend, 260)
    assert planned(further).yarn_factor == 2
    assert (notices(further), cached(further) > 1000) == ([], True)
    longest = asked(backend, 600)
    assert planned(longest).yarn_factor == 4
    assert "outgrow 2,048" in notices(longest)[0]
    again = asked(backend, 20)
    assert planned(again).yarn_factor == 1
    assert "YaRN is off" in notices(again)[0]
    with pytest.raises(PromptTooLong, match=r"4,096 \(factor 4 over 1,024\)"):
        asked(backend, 1000)


def test_a_notice_reports_a_first_prompt_past_the_window(backend: LocalBackend) -> None:
    assert [line.partition(" need ")[2] for line in notices(asked(backend, 200))] == [
        "YaRN 2 over 1,024: a context of 1,280."
    ]


@contextmanager
def little_memory_left() -> Iterator[None]:
    """Limits the address space to a little more than is in use, like a full memory."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class _Failing(Planner):
    """A planner whose plans ask for four million tokens, which no memory holds, after a switch is set."""

    fails = False

    def plan(self, prompt_tokens: int, n_gpu_layers: int | None = None) -> Plan:
        plan = super().plan(prompt_tokens, n_gpu_layers)
        return replace(plan, n_ctx=1 << 22) if self.fails else plan

    def note_failure(self, plan: Plan) -> None:
        self.fails = False
        raise DoesNotFit("nothing smaller")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
def test_when_the_new_context_fails_the_old_one_comes_back_with_its_cache(
    miniature: Callable[[str], Path], loaded: LoadedModel, tmp_path: Path
) -> None:
    planner = _Failing(miniature("Q8_0"), profile(tmp_path, "kv_type=f32"))
    tokens = loaded.vocabulary.encode_text("How many r's are in the word strawberry? ")
    with closing(planner), closing(Contexts(loaded, planner, 1)) as contexts:
        standing = drained(contexts.ready(len(tokens), 0))
        sequence = SingleSequence(loaded, standing.context.settings, context=standing.context)
        list(sequence.prefill(tokens))
        expected = continued(sequence)
        sequence.truncate(len(tokens))
        planner.fails = True
        seen: list[Notice] = []
        steps = contexts.ready(len(tokens) + 400, 0)
        with little_memory_left(), pytest.raises(DoesNotFit, match="nothing smaller"):
            seen.extend(steps)
        assert ["is back." in notice.text for notice in seen] == [True]
        context = drained(contexts.ready(len(tokens), 0)).context
        back = SingleSequence(loaded, context.settings, context=context)
        assert list(back.tokens) == tokens
        list(back.prefill(tokens))
        assert continued(back) == expected


def drained(steps: Generator[Notice, None, ActiveContext]) -> ActiveContext:
    """The value at the end of a generator."""
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            standing: ActiveContext = finished.value
            return standing


def test_a_conversation_starts_with_the_largest_native_context(
    miniature: Callable[[str], Path], loaded: LoadedModel, tmp_path: Path
) -> None:
    planner = Planner(miniature("Q8_0"), profile(tmp_path), takes_largest=True)
    with closing(planner), closing(Contexts(loaded, planner, 1)) as contexts:
        first = drained(contexts.ready(20, 0))
        assert (first.plan.n_ctx, first.plan.rope.factor) == (1024, 1)
        assert drained(contexts.ready(800, 0)).context is first.context


def test_a_failure_on_a_card_leaves_the_limit_of_system_memory_alone(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    card = Device("GPU0", "card", DeviceKind.GPU, 8 * GIB, 8 * GIB)
    where = Machine("test", (card,), 16 * GIB, 16 * GIB, cores=4, is_described=True)
    large = profile(tmp_path, "native_window=32768", "thinking_budget=16384")
    with closing(Planner(miniature("Q8_0"), large, where)) as planner:
        first = planner.plan(100)
        planner.note_failure(first)
        second = planner.plan(100, first.n_gpu_layers)
        assert second.uses[0].total < first.uses[0].total
        assert (second.uses[-1].usable, second.kv_type) == (first.uses[-1].usable, "q8_0")


SHORT_OF_MEMORY = """
import json, resource, sys
from pathlib import Path
from qwq_local.backend.local import LocalBackend
from qwq_local.backend.api import ReplyRequest
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.errors import AbortFlag
from qwq_local.errors import QwqError
from qwq_local.events import Loading, Notice, Planned
from qwq_local.paths import Directories
from qwq_local.profiles.layers import profile_folders, resolve

here = Path(sys.argv[2])
folders = profile_folders(Directories(here, here, here))
settings = ["native_window=262144", "yarn=off", "temperature=0", "max_tokens=2", *sys.argv[4:]]
profile = resolve("miniature", "chat", folders, {}, settings).profile
backend = LocalBackend(Path(sys.argv[1]), profile, 1, AbortFlag())
report = {"notices": [], "planned": []}

def ask():
    for event in backend.reply(ReplyRequest([Message(Role.USER, "hi")], seed=1)):
        if isinstance(event, Loading) and event.fraction == 1:
            # Another program takes the memory, after it was asked for and before it is taken.
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = mapped + int(sys.argv[3])
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if isinstance(event, Notice):
            report["notices"].append(event.text)
        if isinstance(event, Planned):
            report["planned"].append([event.n_ctx, event.kv_type, event.thinking_budget])
            return

try:
    ask()
    ask()
except QwqError as error:
    report["error"] = str(error)
    report["status"] = error.exit_status
print(json.dumps(report))
"""


def short_of_memory(path: Path, tmp_path: Path, spare_mib: int, *settings: str) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, str(path), str(tmp_path), str(spare_mib << 20), *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'convert'}"},
    )
    assert ran.returncode == 0, ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout)
    return report


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
def test_when_memory_runs_out_the_next_smaller_plan_is_used_and_remembered(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    """A quarter of a million tokens take half a gigabyte in f16: with 400 MiB left it must be q8_0."""
    report = short_of_memory(miniature("Q8_0"), tmp_path, 500, "thinking_budget=250000")
    assert "error" not in report, report
    assert report["planned"][0][1] == "q8_0"
    assert report["planned"][1] == report["planned"][0]
    tried = [line for line in report["notices"] if "does not fit; trying" in line]
    assert tried
    assert "with f16 KV does not fit; trying" in tried[0]
    assert len(tried) == len(set(tried))
    assert any(
        line.startswith("the memory is short, given up: f16 KV for q8_0") for line in report["notices"]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
def test_when_no_smaller_plan_fits_the_status_is_4_with_the_numbers(
    miniature: Callable[[str], Path], tmp_path: Path
) -> None:
    report = short_of_memory(miniature("Q8_0"), tmp_path, 60, "n_ctx=250000", "kv_type=f16")
    assert report["status"] == 4
    assert "a context of 250,000 tokens (f16 KV) does not fit" in report["error"]
    assert "What would fit: (1)" in report["error"]
    assert report["planned"] == []
