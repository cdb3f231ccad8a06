"""`qwq ask --each`: questions in as lines of JSON, answers out as lines of JSON, one model load.

A question is an object with `question`, and if wanted `id` and `seed`. What all questions share, the system
prompt and the files, is the beginning of every prompt, so it is prefilled once. A line that is no question
gets an error line, and the next one is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from qwq_local.backend.local import LocalBackend
from qwq_local.backend.question import Question
from qwq_local.cli.environment import Environment
from qwq_local.cli.sinks import Sink
from qwq_local.dialogue.conversation import Framing
from qwq_local.engine.api import Aborted
from qwq_local.errors import ExitStatus, PromptTooLong, UsageError
from qwq_local.events import Answer, Finished, FinishReason, Notice, Thinking
from qwq_local.reading import MAX_TEXT_BYTES, decoded
from qwq_local.wire import answer_line, error_line, write_line


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of input: its number from 1, the id in it, and the question or what is wrong with it."""

    number: int
    asked: object = None
    question: str = ""
    seed: int | None = None
    problem: str = ""


def answer_each(
    environment: Environment,
    framing: Framing,
    schema: Mapping[str, object] | None,
    backend: LocalBackend,
    sink: Sink,
) -> int:
    """Answer every line of standard input; 0 when each got an answer, 1 when some did not."""
    status = ExitStatus.ANSWERED
    for line in _lines(environment):
        problem = line.problem
        if not problem:
            try:
                question = Question(framing.messages(line.question), schema, line.seed)
                finished = _finished(backend, question, sink, line.number)
            except (UsageError, PromptTooLong) as error:
                problem = str(error)
            except Aborted:
                return ExitStatus.INTERRUPTED
        if problem:
            write_line(environment.stdout, error_line(line.asked, line.number, problem))
            status = ExitStatus.FAILED
            continue
        write_line(environment.stdout, answer_line(line.asked, finished))
        if finished.reason is FinishReason.INTERRUPTED:
            return ExitStatus.INTERRUPTED
        if finished.reason is not FinishReason.STOP:
            status = ExitStatus.FAILED
    return status


def _finished(backend: LocalBackend, question: Question, sink: Sink, number: int) -> Finished:
    """Run one turn; its progress and notices are shown, its text is kept for the line of JSON."""
    for event in backend.reply(question):
        match event:
            case Finished():
                return event
            case Notice(text):
                sink.show(Notice(f"line {number}: {text}"))
            case Thinking() | Answer():
                pass
            case _:
                sink.show(event)
    raise AssertionError("a turn always ends with Finished")


def _lines(environment: Environment) -> Iterator[_Line]:
    if environment.stdin is None:
        return
    number = 0
    while raw := environment.stdin.readline(MAX_TEXT_BYTES + 1):
        number += 1
        rest = raw
        while len(rest) > MAX_TEXT_BYTES and not rest.endswith(b"\n"):
            rest = environment.stdin.readline(MAX_TEXT_BYTES + 1)
        if raw.strip():
            yield _parsed(number, raw)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _parsed(number: int, raw: bytes) -> _Line:
    try:
        value = json.loads(decoded(raw, f"line {number}"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UsageError as error:
        return _Line(number, problem=str(error))
    except UnicodeEncodeError:
        return _Line(number, problem=f"line {number} holds half a surrogate pair.")
    except (ValueError, RecursionError) as error:
        return _Line(number, problem=f"line {number} is not JSON: {error}")
    if not isinstance(value, dict):
        return _Line(number, problem=f"line {number} is not an object with a question.")
    asked, question, seed = value.get("id"), value.get("question"), value.get("seed")
    if not isinstance(question, str) or not question.strip():
        return _Line(number, asked, problem=f"line {number} has no text under 'question'.")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**32 - 1):
        return _Line(number, asked, problem=f"line {number}: the seed must be 0 to {2**32 - 2}.")
    if unknown := sorted(set(value) - {"id", "question", "seed"}):
        return _Line(number, asked, problem=f"line {number}: unknown keys {', '.join(unknown)[:200]}.")
    return _Line(number, asked, question, seed)
