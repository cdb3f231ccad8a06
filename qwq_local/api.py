"""The public Python API: `open` a model and ask it. docs/python.md describes it with examples."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Self

from qwq_local.backend.api import Backend, Keeps, ReplyRequest
from qwq_local.backend.make import (
    BackendRequest,
    check_constraint,
    chosen_model,
    hardware_notice,
    make_backend,
)
from qwq_local.cli.environment import ReplyInterrupt, interrupts_stop
from qwq_local.dialogue.conversation import Attachment, Framing, Message, Role, check_conversation, fence
from qwq_local.engine.api import AnswerConstraint, JsonSchema, LarkGrammar, Regex
from qwq_local.errors import Aborted, ConstraintError, EngineError, QwqError, UsageError
from qwq_local.events import Event, Finished, FinishReason, Notice, TurnStats
from qwq_local.paths import directories
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.keys import MAX_SEED, Profile
from qwq_local.profiles.layers import profile_folders, resolve
from qwq_local.utf8 import read_text

__all__ = ["IncompleteAnswer", "Message", "Model", "Role", "open"]

Messages = str | Sequence[Message | Mapping[str, object]]
"""A question, or a conversation: each message is a Message, or a mapping with `role` and `content`."""

_ENDINGS = {
    FinishReason.MAX_TOKENS: "the answer was cut at max_tokens",
    FinishReason.CONTEXT: "the answer was cut: the context is full",
    FinishReason.LOOP: "the answer was cut: it repeated itself",
    FinishReason.NO_ANSWER: "no answer came out of the thinking",
    FinishReason.INTERRUPTED: "the reply was stopped",
}


class IncompleteAnswer(QwqError):
    """A reply that did not reach its end. `finished` has the reason and what came before it."""

    def __init__(self, finished: Finished) -> None:
        stats = finished.stats
        super().__init__(
            f"{_ENDINGS[finished.reason]}, after {stats.thinking_tokens:,} tokens of thinking and "
            f"{stats.answer_tokens:,} of the answer."
        )
        self.finished = finished


def open(
    model: str | Path = DEFAULT_MODEL, *, profile: str = "chat", private: bool = True, **settings: object
) -> Model:
    """Open a model by its name or the path of its GGUF. The first question loads it.

    `profile` is the name of a task's profile. `settings` are keys of profiles, such as `temperature=0.7` or
    `yarn="off"`; they win over variables such as QWQ_TEMPERATURE. With `private` nothing is written to disk.
    Without it, what was prefilled of a long prompt is kept for other processes. Raises ModelNotFound,
    ProfileError, UsageError, EngineError.
    """
    places = directories(os.environ)
    name = chosen_model(str(model), places)
    resolved = resolve(name, profile, profile_folders(places), os.environ, given=settings)
    backend = make_backend(BackendRequest(name, resolved, places, is_private=private))
    notices = [*resolved.notices, *filter(None, [hardware_notice(backend)])]
    return Model(backend, resolved.profile, notices)


class Model:
    """A model that answers one question at a time. Close it, or use it in a `with` block.

    Call it from one thread, except for `stop`.
    """

    def __init__(self, backend: Backend, profile: Profile, notices: Sequence[str] = ()) -> None:
        """For `open`. The `notices` come with the first reply."""
        self._backend = backend
        self._profile = profile
        self._notices = notices
        self._running: Generator[Event, None, None] | None = None
        self._is_closed = False

    def reply(
        self,
        messages: Messages,
        *,
        files: Sequence[str | Path] = (),
        json_schema: Mapping[str, object] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        seed: int | None = None,
    ) -> Generator[Event, None, None]:
        """The events of the reply to a question or a conversation; see qwq_local.events for their order.

        The `files` go before the last question. The answer obeys a JSON schema, a regular expression or a
        Lark grammar. The profile's system prompt comes first unless the conversation has its own. A reply
        that is still running ends. Ctrl-C stops the reply and raises KeyboardInterrupt. Raises QwqError.
        """
        if self._is_closed:
            raise UsageError("the model is closed. Open it again.")
        if seed is not None and not 0 <= seed <= MAX_SEED:
            raise UsageError(f"seed is {seed}, allowed: a whole number from 0 to {MAX_SEED:,}.")
        attachments = [Attachment(str(path), read_text(Path(path))) for path in files]
        request = ReplyRequest(
            self._conversation(messages, attachments),
            _constraint(json_schema, regex, grammar),
            seed,
            files=[fence(attachment) for attachment in attachments],
            wants_tokens=self._profile.logprobs is not None,
        )
        self._end_running()
        self._running = self._events(request)
        return self._running

    def answer(
        self,
        messages: Messages,
        *,
        files: Sequence[str | Path] = (),
        json_schema: Mapping[str, object] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        seed: int | None = None,
    ) -> str:
        """The answer to a question or a conversation, without the thinking; see `reply`.

        Raises IncompleteAnswer when the reply does not reach its end.
        """
        events = self.reply(
            messages, files=files, json_schema=json_schema, regex=regex, grammar=grammar, seed=seed
        )
        [finished] = [event for event in events if isinstance(event, Finished)]
        if finished.reason is not FinishReason.STOP:
            raise IncompleteAnswer(finished)
        return finished.answer

    def stop(self) -> None:
        """Stop the running reply, from any thread; it finishes as interrupted."""
        self._backend.stop()

    def close(self) -> None:
        """End the running reply and free the model. Closing twice is harmless."""
        self._is_closed = True
        self._end_running()
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _events(self, request: ReplyRequest) -> Generator[Event, None, None]:
        notices, self._notices = self._notices, ()
        yield from map(Notice, notices)
        finished = None
        with closing(_interruptible(self._backend.reply(request), self._backend.stop)) as events:
            for event in events:
                if isinstance(event, Finished):
                    finished = event
                yield event
        if finished is None:
            raise EngineError("the reply ended without saying why.")
        if isinstance(self._backend, Keeps) and finished.reason is not FinishReason.INTERRUPTED:
            yield from self._backend.keep()

    def _conversation(self, messages: Messages, files: Sequence[Attachment]) -> list[Message]:
        """The messages with the profile's system prompt and suffix, and the files in the last one."""
        given = [Message(Role.USER, messages)] if isinstance(messages, str) else [*map(_message, messages)]
        check_conversation(given)
        if files and given[-1].role is not Role.USER:
            raise UsageError("files go with a question: end the conversation with the user's message.")
        conversation = []
        for number, message in enumerate(given, 1):
            if message.role is Role.USER:
                attachments = tuple(files) if number == len(given) else ()
                framing = Framing("", attachments, self._profile.question_suffix)
                message = framing.messages(message.content)[-1]
            conversation.append(message)
        if self._profile.system and given[0].role is not Role.SYSTEM:
            conversation.insert(0, Message(Role.SYSTEM, self._profile.system))
        return conversation


def _message(given: Message | Mapping[str, object]) -> Message:
    if isinstance(given, Message):
        return given
    if unknown := sorted(given.keys() - {"role", "content"}):
        raise UsageError(f"a message has {', '.join(unknown)[:100]}, allowed: role and content.")
    role, content = given.get("role"), given.get("content")
    if role not in list(Role):
        raise UsageError(f"the role of a message is {role!r:.40}, allowed: {', '.join(Role)}.")
    return Message(Role(role), content)  # type: ignore[arg-type]  # Message checks it


def _constraint(
    json_schema: Mapping[str, object] | None, regex: str | None, grammar: str | None
) -> AnswerConstraint | None:
    """What the answer must obey. Raises UsageError for two of them, ConstraintError."""
    constraints: list[AnswerConstraint] = []
    if json_schema is not None:
        constraints.append(JsonSchema(_plain_json(json_schema)))
    if regex is not None:
        constraints.append(Regex(regex))
    if grammar is not None:
        constraints.append(LarkGrammar(grammar))
    if len(constraints) > 1:
        raise UsageError("an answer obeys one of json_schema, regex and grammar. Leave out the rest.")
    for constraint in constraints:
        check_constraint(constraint)
        return constraint
    return None


def _plain_json(schema: Mapping[str, object]) -> Mapping[str, object]:
    """The schema as json.load would read it."""
    try:
        plain: Mapping[str, object] = json.loads(json.dumps(dict(schema), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"json_schema is not JSON: {error}.") from None
    return plain


def _interruptible(events: Iterator[Event], stop: Callable[[], None]) -> Generator[Event, None, None]:
    """The events of a reply, Finished last. On Ctrl-C the reply runs to its end, then KeyboardInterrupt."""
    try:
        while True:
            with _ctrl_c_stops(stop) as interrupt:
                try:
                    event = next(events, None)
                except Aborted:  # stopped while it loaded
                    event = Finished(FinishReason.INTERRUPTED, TurnStats(), "", "")
                if interrupt.is_stopped():
                    with suppress(Aborted):
                        for _ in interrupt.watch(events):
                            pass
            if interrupt.is_stopped():
                raise KeyboardInterrupt
            if event is None:
                return
            yield event
    finally:
        if isinstance(events, Generator):
            events.close()


@contextmanager
def _ctrl_c_stops(stop: Callable[[], None]) -> Iterator[ReplyInterrupt]:
    """Within the block, Ctrl-C calls `stop`, unless the script handles it or this is not the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with interrupts_stop(stop) as interrupt:
            yield interrupt
    else:
        yield ReplyInterrupt(stop)
