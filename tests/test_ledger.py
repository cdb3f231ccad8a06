"""The ledger: every token of the context has an owner, and thinking that is not kept is counted as spared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwq_local.dialogue.conversation import Attachment, Message, Role, fence, user_message
from qwq_local.dialogue.ledger import ledger_of
from qwq_local.dialogue.prompt import encode_prompt
from qwq_local.dialogue.template import ChatTemplate
from qwq_local.engine.model import LoadedModel
from qwq_local.events import Ledger
from qwq_local.models.header import read_header
from tests.fakes import FakeVocabulary

THOUGHT = "<think>\n01 s\n</think>\n\n"


def test_every_part_has_its_tokens_and_the_rest_is_this_prompt() -> None:
    """One token a character: 5 of the system, 5 + 6 of history, 10 of a file; the template wrote 20."""
    files = [fence(Attachment("f", "x"))]
    assert files == ["```f\nx\n```"]
    messages = [
        Message(Role.SYSTEM, "Obey."),
        Message(Role.USER, "first"),
        Message(Role.ASSISTANT, f"{THOUGHT}answer"),
        Message(Role.USER, f"{files[0]}\n\nsecond?"),
    ]
    used = 5 + 5 + 6 + len(messages[-1].content) + 20
    ledger = ledger_of(messages, files, FakeVocabulary(), used, 100)
    assert ledger == Ledger(
        system=5, files=10, history=11, prompt=20 + len("\n\nsecond?"), free=100 - used,
        thinking_spared=len(THOUGHT),
    )  # fmt: skip


def test_on_the_real_template_the_parts_are_the_whole(
    loaded: LoadedModel, miniature: Callable[[str], Path]
) -> None:
    """And dropping the thinking costs the context nothing: the prompt is that of the bare answer."""
    template = ChatTemplate(read_header(miniature("Q8_0")).text("tokenizer.chat_template"))
    attachment = Attachment("notes.txt", "some words in a file\n" * 5)

    def ledger(answer: str) -> tuple[Ledger, int]:
        messages = [
            Message(Role.SYSTEM, "Be brief."),
            Message(Role.USER, "How many r's are in the word strawberry?"),
            Message(Role.ASSISTANT, answer),
            user_message([attachment], "", "And in raspberry?"),
        ]
        prompt = encode_prompt(template, messages, loaded.vocabulary)
        tokens = len(prompt.tokens)
        return ledger_of(messages, [fence(attachment)], loaded.vocabulary, tokens, 1024), tokens

    kept, tokens = ledger(f"{THOUGHT}There are 3.")
    bare, bare_tokens = ledger("There are 3.")
    assert tokens == bare_tokens
    assert kept.system + kept.files + kept.history + kept.prompt == tokens == 1024 - kept.free
    assert min(kept.system, kept.files, kept.history, kept.prompt) > 0
    assert kept.thinking_spared > 0 == bare.thinking_spared
    assert (kept.history, kept.prompt) == (bare.history, bare.prompt)
