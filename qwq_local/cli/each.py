"""`qwq ask --each`: reads questions and writes answers as lines of JSON, with one load of the model.

A question is an object with `question`, and optionally `id` and `seed`. Every prompt begins with the system
prompt and the files, so these are prefilled once. A line that is not a question gets an error line, and the
next line is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from typing import BinaryIO

from qwq_local.backend.api import Backend, ReplyRequest
from qwq_local.cli.environment import Environment, ReplyInterrupt
from qwq_local.cli.output import EventWriter
from qwq_local.dialogue.conversation import Framing
from qwq_local.engine.api import AnswerConstraint
from qwq_local.errors import Aborted, ExitStatus, PromptTooLong, UsageError
from qwq_local.events import Answer, Event, Finished, FinishReason, Notice, Thinking
from qwq_local.utf8 import MAX_TEXT_BYTES, decode_utf8
from qwq_local.wire import json_line, readable, write_line


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
    for number, raw in enumerate(_lines(environment.stdin or BytesIO()), 1):
        if not raw.strip():
            continue
        given: Mapping[str, object] = {}
        try:
            given = _object(raw, f"line {number}")
            request = _request(given, f"line {number}", framing, constraint)
            finished = _finished(interrupt.watch(backend.reply(request)), writer, number)
        except (UsageError, PromptTooLong) as error:
            failed = {"id": given.get("id"), "line": number, "error": str(error)}
            write_line(environment.stdout, json_line(failed))
            status = ExitStatus.FAILED
            continue
        except Aborted:
            return ExitStatus.INTERRUPTED
        fields = ("answer", "thinking", "reason", "stats")
        answered = {name: readable(getattr(finished, name)) for name in fields}
        write_line(environment.stdout, json_line({"id": given.get("id"), **answered}))
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


def _lines(stdin: BinaryIO) -> Iterator[bytes]:
    """The lines of standard input. Of a huge one there is only the beginning."""
    while raw := stdin.readline(MAX_TEXT_BYTES + 1):
        rest = raw
        while len(rest) > MAX_TEXT_BYTES and not rest.endswith(b"\n"):
            rest = stdin.readline(MAX_TEXT_BYTES + 1)
        yield raw


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _object(raw: bytes, line: str) -> Mapping[str, object]:
    """The object of a line. Raises UsageError."""
    try:
        value = json.loads(decode_utf8(raw, line), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{line} holds half a surrogate pair.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{line} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{line} is not an object with a question.")
    return value


def _request(
    given: Mapping[str, object], line: str, framing: Framing, constraint: AnswerConstraint | None
) -> ReplyRequest:
    """The question of an object. Raises UsageError."""
    question, seed = given.get("question"), given.get("seed")
    if not isinstance(question, str) or not question.strip():
        raise UsageError(f"{line} has no text under 'question'.")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**32 - 1):
        raise UsageError(f"{line}: the seed must be 0 to {2**32 - 2}.")
    if unknown := sorted(set(given) - {"id", "question", "seed"}):
        raise UsageError(f"{line}: unknown keys {', '.join(unknown)[:200]}.")
    return ReplyRequest(framing.messages(question), constraint, seed)
