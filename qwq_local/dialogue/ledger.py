"""Who has the context: messages and token counts in, a Ledger out."""

from __future__ import annotations

from collections.abc import Sequence

from qwq_local.dialogue.conversation import Message, Role, answer_of
from qwq_local.dialogue.prompt import encode_plain
from qwq_local.engine.api import Vocabulary
from qwq_local.events import Ledger


def ledger_of(
    messages: Sequence[Message], files: Sequence[str], vocabulary: Vocabulary, prompt_tokens: int, n_ctx: int
) -> Ledger:
    """The tokens of system prompt, files, earlier turns and this question; what the template adds is its.

    `files` are the texts of attached files as they stand in the last message.
    """

    def count(text: str) -> int:
        return len(encode_plain(text, vocabulary)) if text else 0

    system = history = spared = 0
    for message in messages[:-1]:
        if message.role is Role.SYSTEM:
            system += count(message.content)
            continue
        kept = message.content
        if message.role is Role.ASSISTANT:
            kept = answer_of(message.content)
            if kept != message.content:
                spared += count(message.content) - count(kept)
        history += count(kept)
    attached = sum(count(text) for text in files)
    prompt = max(0, prompt_tokens - system - attached - history)
    return Ledger(system, attached, history, prompt, max(0, n_ctx - prompt_tokens), spared)
