"""The miniature's figures, through the project's own converter, prompt and engine, as a user meets it.

    python -m miniature.evaluate
    python -m miniature.evaluate --types Q8_0 --cases 100 --past-window 0

The checkpoint becomes a GGUF of each type; each is asked cases that training never draws, at the model
card's sampling (temperature 0.6, top_p 0.95, top_k 40) with the case's number as seed. Prints tables, and
writes everything to a JSON file for `miniature.curves`. Needs no PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random

from qwq_convert.pipeline import run_conversion
from qwq_convert.plan import ConvertRequest

from miniature import cases as made
from miniature.cases import Conversation, Setting
from miniature.long_texts import losses_by_position, past_the_window
from miniature.make_tokenizer import N_CTX
from miniature.tasks import TASKS, sample
from qwq_local.backend.api import ReplyRequest
from qwq_local.backend.local import LocalBackend
from qwq_local.dialogue.conversation import Message, Role
from qwq_local.errors import AbortFlag, PromptTooLong
from qwq_local.events import Event, Finished, FinishReason
from qwq_local.paths import Directories
from qwq_local.profiles.layers import profile_folders, resolve

HERE = Path(__file__).parent
TYPES = ("BF16", "Q8_0", "Q4_K_M")
QUESTIONS = {
    "How many r's are in the word strawberry?": "3",
    "Which is larger, 9.9 or 9.11?": "9.9",
}
SEEDS = 20

Json = dict[str, object]
Ask = Callable[[ReplyRequest], Iterator[Event]]


@contextmanager
def opened(path: Path, *settings: str) -> Iterator[LocalBackend]:
    """The model of a GGUF behind the local backend, with the miniature's profile and `settings` over it."""
    # The folders do not exist, so no profile of the user applies.
    nowhere = path.parent / "nowhere"
    folders = profile_folders(Directories(nowhere, nowhere, nowhere))
    profile = resolve("miniature", "chat", folders, {}, settings).profile
    with closing(LocalBackend(path, profile, 1, AbortFlag())) as backend:
        yield backend


def reply(ask: Ask, messages: Iterable[made.Message], seed: int) -> Finished | None:
    """How the turn ended, or None where the question does not fit the window."""
    asked = [Message(Role(each.role), each.content) for each in messages]
    try:
        *_, last = ask(ReplyRequest(asked, seed=seed))
    except PromptTooLong:
        return None
    return last if isinstance(last, Finished) else None


def is_right(case: Conversation, turn: Finished) -> bool:
    """Whether the turn ended by itself with the expected answer, boxed or as a whole."""
    if turn.reason is not FinishReason.STOP:
        return False
    expected = made.boxed(case.answer)
    if expected is None:
        return turn.answer.strip() == case.answer
    return made.boxed(turn.answer) == expected


def share_right(ask: Ask, cases: Iterable[Conversation], n_cases: int, show: int) -> dict[str, int]:
    """How many of the first `n_cases` that fit the window are answered right."""
    asked = right = 0
    for case in cases:
        turn = reply(ask, case.messages, seed=asked)
        if turn is None:
            continue
        asked += 1
        if is_right(case, turn):
            right += 1
        elif show > 0:
            show -= 1
            print(f"{case.messages!r}\n{turn.thinking}\n{turn.answer}\nexpected {case.result}\n", flush=True)
        if asked == n_cases:
            break
    return {"right": right, "of": asked}


def unseen(task: str, seed: int) -> Iterator[Conversation]:
    """Cases of a task at full difficulty that training never draws, the same ones for the same seed."""
    rng = Random(seed)
    while True:
        yield sample(rng, {task: 1.0}, Setting(held_out=True))


def tasks_right(ask: Ask, options: argparse.Namespace) -> Json:
    """The share of right answers of each task, and of the two questions over all seeds."""
    figures: Json = {}
    show = options.show_wrong
    for task in options.tasks:
        figures[task] = found = share_right(ask, unseen(task, options.seed), options.cases, show)
        print(f"  {task:8} {shown(found)}", flush=True)
    for question, answer in QUESTIONS.items():
        messages = (made.Message("user", question),)
        case = Conversation("question", messages, "", f"\\boxed{{{answer}}}", answer)
        figures[question] = found = share_right(ask, [case] * SEEDS, SEEDS, show)
        print(f"  {shown(found)}  {question}", flush=True)
    return figures


def beyond(path: Path, n_cases: int) -> Json:
    """Pass keys in texts longer than the window, and the loss by position; with YaRN and without."""
    figures: Json = {}
    # Without YaRN the profile must state a larger window, or it refuses.
    for name, setting in (("yarn 2", "yarn=2"), ("no yarn", "native_window=2048")):
        with opened(path, setting, f"n_ctx={2 * N_CTX}") as backend:
            figures[name] = found = share_right(backend.reply, past_the_window(Random(0)), n_cases, 0)
        print(f"  pass keys past the window, {name}: {shown(found)}", flush=True)
    figures["loss"] = {
        "yarn 2": losses_by_position(path, 2),
        "no yarn": losses_by_position(path, 1),
    }
    return figures


def shown(figure: dict[str, int]) -> str:
    """`291 of 300   97.0 %`."""
    right, of = figure["right"], figure["of"]
    return f"{right:3} of {of:3}  {right / of:6.1%}" if of else "none"


def evaluate(options: argparse.Namespace) -> Json:
    """All figures of all types, printed as they come."""
    figures: Json = {"cases": options.cases, "seed": options.seed, "cpu_cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        for file_type in options.types:
            path = Path(folder) / f"miniature-{file_type}.gguf"
            run_conversion(ConvertRequest(options.checkpoint, file_type, path))
            print(f"{file_type}, {path.stat().st_size / 1e6:.1f} MB", flush=True)
            start = time.monotonic()
            with opened(path) as backend:
                of_type = tasks_right(backend.reply, options)
            if file_type == options.past_window_of and options.past_window:
                of_type["past the window"] = beyond(path, options.past_window)
            of_type["seconds"] = round(time.monotonic() - start)
            figures[file_type] = of_type
    return figures


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the miniature through its GGUF.")
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1, help="which cases are drawn")
    parser.add_argument("--past-window", type=int, default=150, help="cases longer than the window; 0: none")
    parser.add_argument("--past-window-of", default="Q8_0", help="the type that is asked those")
    parser.add_argument("--show-wrong", type=int, default=0, help="wrong replies to print a task")
    parser.add_argument("--out", type=Path, default=HERE / ".work" / "figures.json")
    return parser.parse_args()


def main() -> None:
    """Measure, print and keep."""
    options = read_options()
    figures = evaluate(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Figures of other types from earlier runs stay.
    earlier = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    options.out.write_text(json.dumps({**earlier, **figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
