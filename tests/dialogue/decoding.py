"""Runs one reply on a real context, through a scheduler."""

from __future__ import annotations

from collections.abc import Iterator

from qwq_local.dialogue.control import Opening, ReplyControl
from qwq_local.dialogue.reply import Reply, ReplySettings
from qwq_local.engine.context import LlamaContext
from qwq_local.engine.scheduler import GenerationJob, Scheduler
from qwq_local.events import Event


def decode(
    context: LlamaContext, settings: ReplySettings, opening: Opening, control: ReplyControl | None = None
) -> Iterator[Event]:
    """The events of a reply."""
    reply = Reply(context.vocabulary, settings, opening, control)
    job = GenerationJob((*opening.prompt, *reply.generated), settings.window, settings.sampler)
    yield from Scheduler(context).submit(reply, job)
