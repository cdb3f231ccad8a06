"""The tokens that penalties and DRY look back at, with the real sampler chain: sampled or remembered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import pytest

from qwq_local.engine.api import ContextSettings, SamplerSettings
from qwq_local.engine.model import LoadedModel
from tests.single_sequence import SingleSequence

GREEDY = SamplerSettings(temperature=0)
PENALTIES = replace(GREEDY, repeat_penalty=1.4, frequency_penalty=0.3, presence_penalty=1.0)
DRY = replace(GREEDY, dry_multiplier=3.0, dry_base=2.0, dry_allowed_length=1)
MEMORIES = [
    PENALTIES,
    replace(PENALTIES, penalty_window=7),
    replace(PENALTIES, penalty_window=-1),
    DRY,
    replace(DRY, dry_window=11),
    replace(DRY, repeat_penalty=1.4, penalty_window=12, temperature=1.5, top_k=0, top_p=1.0, seed=5),
]
IDS = ["penalties", "a short window", "the whole context", "DRY", "DRY with a window", "both, sampled"]
COUNT = 60
TEXT = "Say something."  # without a penalty the miniature repeats one letter for ever


@pytest.fixture
def context(loaded: LoadedModel) -> Iterator[SingleSequence]:
    with closing(SingleSequence(loaded, ContextSettings(512, threads=1))) as made:
        yield made


def begin(context: SingleSequence, tokens: Sequence[int], settings: SamplerSettings) -> None:
    for _ in context.prefill(tokens):
        pass
    context.start_sampling(settings)


def sampled(context: SingleSequence, prompt: Sequence[int], *, remembers: bool = False) -> list[int]:
    """The next tokens; with `remembers` the chain gets all tokens so far before each of them."""
    for _ in range(COUNT):
        if remembers:
            context.remember(context.tokens[len(prompt) :])
        context.append(context.sample())
    return list(context.tokens[len(prompt) :])


@pytest.mark.parametrize("settings", MEMORIES, ids=IDS)
def test_remembering_its_own_tokens_changes_nothing(
    context: SingleSequence, settings: SamplerSettings
) -> None:
    """Neither the penalties nor the next random number change."""
    prompt = context.vocabulary.encode_text(TEXT)
    begin(context, prompt, settings)
    expected = sampled(context, prompt)
    begin(context, prompt, settings)
    assert sampled(context, prompt, remembers=True) == expected


@pytest.mark.parametrize("settings", MEMORIES[:5], ids=IDS[:5])
def test_a_new_chain_that_remembers_the_tokens_continues_like_the_old_one(
    context: SingleSequence, settings: SamplerSettings
) -> None:
    """A chain without them does not; otherwise the test would prove nothing."""
    prompt = context.vocabulary.encode_text(TEXT)
    begin(context, prompt, settings)
    whole = sampled(context, prompt)
    has_forgotten = False
    for n_tokens in range(1, COUNT, 3):
        begin(context, [*prompt, *whole[:n_tokens]], settings)
        has_forgotten |= context.sample() != whole[n_tokens]
        context.start_sampling(settings)
        context.remember(whole[:n_tokens])
        assert context.sample() == whole[n_tokens]
    assert has_forgotten


def test_remembered_tokens_replace_the_sampled_ones(context: SingleSequence) -> None:
    """The penalty is so large that a remembered token cannot come."""
    prompt = context.vocabulary.encode_text(TEXT)
    begin(context, prompt, replace(GREEDY, presence_penalty=100.0))
    first = context.sample()
    assert context.sample() != first
    context.remember([])
    assert context.sample() == first
