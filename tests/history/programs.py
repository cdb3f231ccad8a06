"""Programs that the tests of the history run in their own processes, to kill them or fill their disk.

python -m tests.history.programs think PATH N        a turn that waits after N pieces of thinking
python -m tests.history.programs converse PATH N     N whole turns, each printed when it is kept
python -m tests.history.programs overflow PATH BYTES a turn while no file may grow past BYTES
python -m tests.history.programs hold PATH           the error for a history that this user may only read
python -m tests.history.programs read PATH WORD      that user's thoughts, the place of WORD, and rm's error
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qwq_local.errors import HistoryError
from qwq_local.events import (
    Answer,
    CloseReason,
    Event,
    Finished,
    FinishReason,
    Generated,
    Planned,
    Prompted,
    Thinking,
    ThinkingClosed,
    TurnStats,
)
from qwq_local.history.archive import Archive
from qwq_local.history.records import TurnStart

ROOT = Path(__file__).parent.parent.parent
NOBODY = 65_534
PLAN = Planned(
    model="miniature",
    n_ctx=4096,
    prompt_tokens=3,
    thinking_budget=1024,
    answer_reserve=256,
    yarn_factor=1.0,
    kv_type="f16",
    n_gpu_layers=0,
    seed=7,
)


def thoughts(count: int) -> list[str]:
    """Pieces of thinking, each one different."""
    return [f"Thought {number}: 我们讨论量子纠缠.\n" for number in range(count)]


def turn_events(count: int, label: str = "") -> Iterator[Event]:
    """The events of a whole turn: `count` pieces of thinking of a token each, and one of answer."""
    answer = f"It is {label or 'so'}."
    yield PLAN
    yield Prompted((1, 2, 3))
    for number, text in enumerate(thoughts(count)):
        yield Thinking(text)
        if number % 10 == 9:
            yield Generated(number - 9, tuple(range(number - 9, number + 1)), number + 1)
    yield ThinkingClosed(CloseReason.MODEL, count, 1.5)
    yield Answer(answer)
    yield Generated(count // 10 * 10, (*range(count // 10 * 10, count), 9), count)
    yield Finished(FinishReason.STOP, TurnStats(3, 0, count, 1, 0.1, 2.0), "".join(thoughts(count)), answer)


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """One of these programs in its own process, killed after the block."""
    variables = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'convert'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "tests.history.programs", *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def think(path: Path, count: int) -> None:
    archive = Archive.open(path)
    conversation = archive.begin("miniature", "default", "")
    recorder = archive.begin_turn(TurnStart(conversation, None, "What is it?", "What is it? Think."))
    recorder.feed(PLAN)
    recorder.feed(Prompted((1, 2, 3)))
    for text in thoughts(count):
        recorder.feed(Thinking(text))
    recorder.feed(Generated(0, tuple(range(count)), count))
    print(recorder.turn_id, flush=True)
    while True:
        time.sleep(60)


def converse(path: Path, count: int) -> None:
    with Archive.open(path) as archive:
        conversation = archive.begin("miniature", "default", "")
        parent = None
        for number in range(count):
            start = TurnStart(conversation, parent, f"Question {number}?", f"Question {number}?")
            recorder = archive.begin_turn(start)
            for event in turn_events(25, f"answer {number}"):
                recorder.feed(event)
            parent = recorder.turn_id
            print(recorder.problem or parent, flush=True)


def overflow(path: Path, n_bytes: int) -> None:
    """Print the notices about a turn that does not fit the disk, and the turn as this process has it."""
    import resource

    archive = Archive.open(path)
    conversation = archive.begin("miniature", "default", "")
    recorder = archive.begin_turn(TurnStart(conversation, None, "Why?", "Why?"))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    for event in turn_events(20_000):
        recorder.feed(event)
    problem = recorder.problem
    whole = archive.turn(recorder.turn_id)
    on_path = archive.path(conversation)[0]
    n_tokens = len(whole.generated)
    reported = [problem, len(whole.thinking), n_tokens, whole.answer, whole.state, on_path == whole]
    try:
        archive.begin_turn(TurnStart(conversation, recorder.turn_id, "And?" * 100_000, "And?" * 100_000))
    except HistoryError as error:
        reported.append(str(error))
    with Archive.private() as private:
        copy = private.adopt(archive.conversation(conversation), archive.path(conversation))
        reported.append(private.path(copy)[0].answer)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    archive.close()
    print(json.dumps([*reported, recorder.problem]), flush=True)


def be_nobody() -> None:
    """Give up the right to write everything."""
    import filelock  # noqa: F401 (NOBODY may not read where it is installed)

    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)


def hold(path: Path) -> None:
    be_nobody()
    try:
        with Archive.open(path) as archive:
            archive.begin("miniature", "default", "")
    except HistoryError as error:
        print(error, flush=True)


def read(path: Path, word: str) -> None:
    be_nobody()
    reported: list[object] = []
    try:
        with Archive.to_read(path) as archive:
            archive.pick_up()
            records = archive.conversations()
            reported += [[turn.thinking for turn in archive.path(record.id)] for record in records]
            reported.append(sorted({str(hit.part) for hit in archive.search(word)}))
            archive.remove(records[0].id)
    except HistoryError as error:
        reported.append(str(error))
    print(json.dumps(reported), flush=True)


if __name__ == "__main__":
    programs = {"think": think, "converse": converse, "overflow": overflow}
    if sys.argv[1] == "hold":
        hold(Path(sys.argv[2]))
    elif sys.argv[1] == "read":
        read(Path(sys.argv[2]), sys.argv[3])
    else:
        programs[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
