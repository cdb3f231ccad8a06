"""`qwq ask --each`: reads questions and writes answers as lines of JSON, with one load of the model.

A question is an object with `question`, and optionally `id` and `seed`. Every prompt begins with the system
prompt and the files, so these are prefilled once. A line that is not a question gets an error line, and the
next line is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwq_local.backend.api import Backend, ReplyRequest
from qwq_local.cli.environment import Environment, ReplyInterrupt
from qwq_local.cli.output import EventWriter
from qwq_local.dialogue.conversation import Framing
from qwq_local.engine.api import AnswerConstraint
from qwq_local.errors import Aborted, ExitStatus, PromptTooLong, UsageError
from qwq_local.events import Answer, Event, Finished, FinishReason, Notice, Thinking
from qwq_local.utf8 import MAX_TEXT_BYTES, decode_utf8
from qwq_local.wire import json_line, readable, write_line


@dataclass(frozen=True, slots=True)
class _EachLine:
    """A line of input: its number from 1, its id, and the question or what is wrong with it."""

    number: int
    id: object = None
    question: str = ""
    seed: int | None = None
    problem: str = ""


def answer_each(
    environment: Environment,
    framing: Framing,
    constraint: AnswerConstraint | None,
    backend: Backend,
    writer: EventWriter,
    interrupt: ReplyInterrupt,
) -> int:
    """Answers every line of standard input; 0 when all got an answer, 1 when some did not."""
    status = ExitStatus.ANSWERED
    for line in _lines(environment):
        problem = line.problem
        if not problem:
            try:
                question = ReplyRequest(framing.messages(line.question), constraint, line.seed)
                finished = _finished(interrupt.watch(backend.reply(question)), writer, line.number)
            except (UsageError, PromptTooLong) as error:
                problem = str(error)
            except Aborted:
                return ExitStatus.INTERRUPTED
        if problem:
            failed = {"id": line.id, "line": line.number, "error": problem}
            write_line(environment.stdout, json_line(failed))
            status = ExitStatus.FAILED
            continue
        fields = ("answer", "thinking", "reason", "stats")
        answered = {name: readable(getattr(finished, name)) for name in fields}
        write_line(environment.stdout, json_line({"id": line.id, **answered}))
        if finished.reason is FinishReason.INTERRUPTED:
            return ExitStatus.INTERRUPTED
        if finished.reason is not FinishReason.STOP:
            status = ExitStatus.FAILED
    return status


def _finished(events: Iterable[Event], writer: EventWriter, number: int) -> Finished:
    """Runs one turn and shows its progress and notices; its text goes into the line of JSON."""
    for event in events:
        match event:
            case Finished():
                return event
            case Notice(text):
                writer.show(Notice(f"line {number}: {text}"))
            case Thinking() | Answer():
                pass
            case _:
                writer.show(event)
    raise AssertionError("a turn always ends with Finished")


def _lines(environment: Environment) -> Iterator[_EachLine]:
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


def _parsed(number: int, raw: bytes) -> _EachLine:
    try:
        value = json.loads(decode_utf8(raw, f"line {number}"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UsageError as error:
        return _EachLine(number, problem=str(error))
    except UnicodeEncodeError:
        return _EachLine(number, problem=f"line {number} holds half a surrogate pair.")
    except (ValueError, RecursionError) as error:
        return _EachLine(number, problem=f"line {number} is not JSON: {error}")
    if not isinstance(value, dict):
        return _EachLine(number, problem=f"line {number} is not an object with a question.")
    given_id, question, seed = value.get("id"), value.get("question"), value.get("seed")
    if not isinstance(question, str) or not question.strip():
        return _EachLine(number, given_id, problem=f"line {number} has no text under 'question'.")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**32 - 1):
        return _EachLine(number, given_id, problem=f"line {number}: the seed must be 0 to {2**32 - 2}.")
    if unknown := sorted(set(value) - {"id", "question", "seed"}):
        return _EachLine(number, given_id, problem=f"line {number}: unknown keys {', '.join(unknown)[:200]}.")
    return _EachLine(number, given_id, question, seed)
