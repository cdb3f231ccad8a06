"""A turn that goes on: how much room it takes, so that it is planned as it was when it began."""

from __future__ import annotations

from qwq_local.dialogue.closing import Closings
from qwq_local.dialogue.control import Opening
from qwq_local.dialogue.transcript import Transcript
from qwq_local.engine.api import Vocabulary

_LEAST_OF_RESERVE = 4


def planned_prompt_tokens(
    opening: Opening, vocabulary: Vocabulary, thinking_budget: int, answer_reserve: int
) -> int:
    """The length of a prompt whose plan holds what was generated and what may follow, in tokens.

    It is the prompt's own while the budgets hold: then the plan is the same, and so is the rope scaling. The
    rest of an answer is what its reserve has left, but a quarter of the reserve at least.
    """
    transcript = Transcript(vocabulary, Closings(vocabulary), is_exact=False)
    transcript.replay(opening.generated)
    rest = max(answer_reserve - transcript.answer_tokens, answer_reserve // _LEAST_OF_RESERVE)
    if transcript.is_thinking:
        rest += max(0, thinking_budget - transcript.thinking_tokens)
    excess = len(opening.generated) + rest - thinking_budget - answer_reserve
    return len(opening.prompt) + max(0, excess)
