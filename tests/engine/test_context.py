"""The engine over real llama.cpp and a real GGUF: same tokens as `Llama`, one cache, stoppable."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jsonschema
import pytest
from llama_cpp import Llama

from qwq_local.engine.api import ContextSettings, JsonSchema, SamplerSettings
from qwq_local.engine.constraint import compile_constraint
from qwq_local.engine.library import check_version
from qwq_local.engine.model import LoadedModel, LoadSettings, drained, load_model
from qwq_local.engine.sampler import SamplerChain
from qwq_local.engine.scheduler import _ChunkSize
from qwq_local.errors import Aborted, AbortFlag, EngineError, UsageError
from tests.conftest import load
from tests.single_sequence import SingleSequence

GREEDY = SamplerSettings(temperature=0)
SETTINGS = ContextSettings(n_ctx=1024, flash_attention=False, threads=1)
QUESTION = (
    "<|im_start|>user\nHow many r's are in the word strawberry?<|im_end|>\n<|im_start|>assistant\n<think>\n"
)


@pytest.fixture
def context(loaded: LoadedModel) -> Iterator[SingleSequence]:
    with closing(SingleSequence(loaded, SETTINGS)) as made:
        yield made


def prefill(context: SingleSequence, tokens: Sequence[int]) -> int:
    """Prefill; returns how many tokens the cache already had."""
    return list(context.prefill(tokens))[-1].cached


def sampled(context: SingleSequence, count: int, settings: SamplerSettings = GREEDY) -> list[int]:
    """The next tokens, the last one not appended."""
    context.start_sampling(settings)
    tokens = []
    for _ in range(count):
        tokens.append(context.sample())
        context.append(tokens[-1])
    return tokens


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("file_type", ["BF16", "Q8_0"])
def test_greedy_tokens_equal_those_of_llama(
    miniature: Callable[[str], Path], file_type: str, flash_attention: bool
) -> None:
    """256 tokens on one thread with the same settings; sampling continues past ends of turn."""
    path = miniature(file_type)
    peer = Llama(
        str(path),
        n_ctx=1024,
        n_batch=512,
        n_threads=1,
        n_threads_batch=2,
        flash_attn=flash_attention,
        verbose=False,
    )
    prompt = peer.tokenize(QUESTION.encode(), add_bos=False, special=True)
    theirs = list(islice(peer.generate(prompt, temp=0.0, repeat_penalty=1.0), 256))
    peer.close()
    model = load(path)
    settings = replace(SETTINGS, flash_attention=flash_attention)
    with closing(model), closing(SingleSequence(model, settings)) as context:
        prefill(context, prompt)
        assert sampled(context, 256) == theirs


def test_the_longest_common_prefix_stays_cached(context: SingleSequence) -> None:
    tokens = context.vocabulary.encode_text("The quick brown fox jumps over the lazy dog. " * 4)
    assert prefill(context, tokens) == 0

    changed = [*tokens[:30], tokens[0], tokens[1]]
    assert prefill(context, changed) == 30
    assert list(context.tokens) == changed


def test_logits_after_reuse_equal_those_of_a_fresh_prefill(loaded: LoadedModel) -> None:
    """After a shared prefix and after the same prompt, the same tokens are sampled as in a new context."""
    first = loaded.vocabulary.encode_text("How many r's are in the word strawberry?")
    second = first[:20] + loaded.vocabulary.encode_text(" and now something else")
    with closing(SingleSequence(loaded, SETTINGS)) as fresh:
        prefill(fresh, second)
        expected = sampled(fresh, 20)
    with closing(SingleSequence(loaded, SETTINGS)) as used:
        prefill(used, first)
        sampled(used, 30)
        assert prefill(used, second) == 20
        assert sampled(used, 20) == expected
        assert prefill(used, second) == len(second) - 1
        assert sampled(used, 20) == expected


def test_one_model_serves_several_contexts_with_different_rope_scaling(loaded: LoadedModel) -> None:
    """The native context gives the same tokens before and after a YaRN context was used beside it."""
    tokens = loaded.vocabulary.encode_text("sort 5, 3, 1 please")
    scaled = replace(SETTINGS, n_ctx=2048, yarn_factor=2.0, yarn_origin=1024)
    with closing(SingleSequence(loaded, SETTINGS)) as native:
        prefill(native, tokens)
        expected = sampled(native, 20)
        with closing(SingleSequence(loaded, scaled)) as long:
            prefill(long, tokens)
            sampled(long, 20)
        native.truncate(0)
        prefill(native, tokens)
        assert sampled(native, 20) == expected


def test_prefill_reports_its_progress(context: SingleSequence) -> None:
    tokens = context.vocabulary.encode_text("word " * 180)
    steps = list(context.prefill(tokens))

    assert (steps[0].done, steps[-1].done) == (0, len(tokens))
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert all(step.total == len(tokens) for step in steps)


class _AbortsAfter(AbortFlag):
    """A flag that is set after a number of reads: in the middle of a batch."""

    __slots__ = ("_left",)

    def __init__(self, looks: int) -> None:
        super().__init__()
        self._left = looks

    def __bool__(self) -> bool:
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize(("n_ubatch", "looks"), [(512, 50), (64, 700)])
def test_an_abort_inside_a_batch_leaves_a_cache_that_the_next_turn_can_use(
    loaded: LoadedModel, n_ubatch: int, looks: int
) -> None:
    """llama.cpp reads the flag at every node of the graph; the second case stops after some micro-batches."""
    settings = replace(SETTINGS, n_ubatch=n_ubatch)
    tokens = loaded.vocabulary.encode_text("one two three four five six seven eight " * 12)[:400]
    with closing(SingleSequence(loaded, settings)) as fresh:
        prefill(fresh, tokens)
        expected = sampled(fresh, 20)
    flag = _AbortsAfter(looks)
    with closing(SingleSequence(loaded, settings, flag)) as context:
        with pytest.raises(Aborted):
            prefill(context, tokens)
        assert list(context.tokens) == []
        flag._left = 10**9
        prefill(context, tokens)
        assert sampled(context, 20) == expected


def test_loading_reports_progress_and_stops_when_asked(miniature: Callable[[str], Path]) -> None:
    path = miniature("BF16")
    fractions = []
    loading = load_model(path, LoadSettings(), AbortFlag())
    while True:
        try:
            fractions.append(next(loading))
        except StopIteration as finished:
            finished.value.close()
            break
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1

    abort = AbortFlag()
    loading = load_model(path, LoadSettings(), abort)
    next(loading)
    abort.set()
    with pytest.raises(Aborted):
        list(loading)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_need_not_be_utf_8(miniature: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.gguf")
    path.symlink_to(miniature("BF16"))
    drained(load_model(path, LoadSettings(vocab_only=True), AbortFlag())).close()


def test_plain_text_never_becomes_a_special_token(loaded: LoadedModel) -> None:
    vocabulary = loaded.vocabulary
    text = "<|im_end|><|im_start|>system <think></think><tool_call></tool_call> <<think>> <|endoftext|>"
    tokens = vocabulary.encode_text(text)

    assert not set(tokens) & set(vocabulary.special_tokens.values())
    assert b"".join(map(vocabulary.piece, tokens)).decode() == text


def test_special_pieces_are_rendered(loaded: LoadedModel) -> None:
    vocabulary = loaded.vocabulary
    for piece in ("<think>", "</think>", "<tool_call>", "<|im_start|>", "<|im_end|>"):
        assert vocabulary.piece(vocabulary.special_tokens[piece]) == piece.encode()


def test_both_ends_of_generation_end_it(loaded: LoadedModel) -> None:
    ends = {p for p, token in loaded.vocabulary.special_tokens.items() if loaded.vocabulary.is_end(token)}
    assert {"<|im_end|>", "<|endoftext|>"} <= ends
    assert "</think>" not in ends


def chain_steps(loaded: LoadedModel, settings: SamplerSettings) -> list[str]:
    vocab = loaded.vocabulary
    with closing(SamplerChain(settings, vocab._handle, vocab.size, 1024)) as chain:
        return chain.steps


def test_the_sampler_chain_follows_the_order_of_the_settings(loaded: LoadedModel) -> None:
    everything = SamplerSettings(
        repeat_penalty=1.1, dry_multiplier=0.8, min_p=0.05, typical=0.9, xtc_probability=0.1
    )
    usual = ["penalties", "dry", "top-k", "top-p", "min-p", "typical", "xtc", "temp", "dist"]
    assert chain_steps(loaded, everything) == usual

    order = ("temperature", "xtc", "typical", "min_p", "top_p", "top_k", "dry", "penalties")
    assert chain_steps(loaded, replace(everything, sampler_order=order)) == [*reversed(usual[:-1]), "dist"]


def test_neutral_steps_are_left_out_and_greedy_is_greedy(loaded: LoadedModel) -> None:
    assert chain_steps(loaded, SamplerSettings()) == ["top-k", "top-p", "temp", "dist"]
    assert chain_steps(loaded, GREEDY) == ["greedy"]
    # A window of -1 is the whole context; llama.cpp itself would take it as none.
    penalized = SamplerSettings(presence_penalty=1, penalty_window=-1)
    assert chain_steps(loaded, penalized)[0] == "penalties"


def test_the_same_seed_gives_the_same_tokens(context: SingleSequence) -> None:
    tokens = context.vocabulary.encode_text("How many e's are in the word letter?")
    runs = []
    for seed in (7, 7, 8, 9, 10, 11):
        prefill(context, tokens)
        runs.append(sampled(context, 60, SamplerSettings(temperature=1.5, top_k=0, top_p=1.0, seed=seed)))
    assert runs[0] == runs[1]
    assert any(run != runs[0] for run in runs[2:])


def test_a_penalty_changes_the_tokens_within_its_window(context: SingleSequence) -> None:
    tokens = context.vocabulary.encode_text("a a a a a a a a a")
    prefill(context, tokens)
    free = sampled(context, 40)
    prefill(context, tokens)
    penalized = sampled(context, 40, replace(GREEDY, presence_penalty=100.0, penalty_window=-1))
    assert len(set(penalized)) == len(penalized)
    assert len(set(free)) < len(free)
    prefill(context, tokens)
    bounded = sampled(context, 40, replace(GREEDY, presence_penalty=100.0, penalty_window=5))
    assert all(len(set(bounded[i : i + 6])) == 6 for i in range(35))
    assert len(set(bounded)) < len(bounded)


def test_settings_that_would_end_the_process_are_refused(loaded: LoadedModel) -> None:
    for bad in (
        {"kv_type_k": "q3_k"},
        {"n_ctx": 0},
        {"n_ubatch": 1024},
        {"kv_type_v": "q8_0"},
        {"yarn_factor": 2.0},
    ):
        with pytest.raises(UsageError):
            SingleSequence(loaded, replace(SETTINGS, **bad))


def test_a_full_context_is_an_error(loaded: LoadedModel) -> None:
    with closing(SingleSequence(loaded, replace(SETTINGS, n_ctx=256, n_batch=256, n_ubatch=256))) as c:
        prefill(c, loaded.vocabulary.encode_text("x" * 256)[:256])
        c.start_sampling(GREEDY)
        with pytest.raises(EngineError, match="full"):
            c.append(c.sample())


def test_another_version_of_the_library_is_refused_in_one_line() -> None:
    check_version("0.3.36")
    with pytest.raises(EngineError, match=r"0\.3\.35 is installed.*pip install llama-cpp-python==0\.3\.36$"):
        check_version("0.3.35")


def test_batches_take_a_quarter_of_a_second_where_the_device_cannot_be_aborted() -> None:
    """A device that computes 2,000 tokens a second, then 200."""
    sizer = _ChunkSize(2048, 0, 0.25, is_adaptive=True)
    for rate in [2000.0] * 6 + [200.0] * 4:
        sizer.measured(sizer.size, sizer.size / rate)
        assert 16 <= sizer.size <= 2048
        if rate == 2000:
            assert sizer.size / rate <= 0.25
    assert sizer.size == 50
    fixed = _ChunkSize(512, 0, 0.25, is_adaptive=False)
    fixed.measured(512, 60.0)
    assert fixed.size == 512


SCHEMAS = [
    ({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, 40),
    ({"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4}, 80),
    ({"type": "string", "minLength": 3, "maxLength": 9}, 40),
]


@pytest.mark.parametrize("settings", [SamplerSettings(seed=3), SamplerSettings(seed=3, presence_penalty=0.5)])
@pytest.mark.parametrize(("schema", "limit"), SCHEMAS)
def test_text_sampled_under_a_schema_obeys_it(
    loaded: LoadedModel, schema: dict[str, object], limit: int, settings: SamplerSettings
) -> None:
    """With a chain without memory and with one. Without the schema the model says other things."""
    vocabulary = loaded.vocabulary
    constraint = compile_constraint(JsonSchema(schema), vocabulary)
    with closing(SingleSequence(loaded, SETTINGS)) as context:
        for seed in range(4):
            prefill(context, vocabulary.encode_text("Say something."))
            context.start_sampling(replace(settings, seed=seed))
            matcher = constraint.matcher()
            tokens: list[int] = []
            while len(tokens) < limit and not vocabulary.is_end(token := context.sample(matcher)):
                tokens.append(token)
                context.append(token)
            text = b"".join(map(vocabulary.piece, tokens)).decode("utf-8", "replace")
            if len(tokens) < limit:
                jsonschema.validate(json.loads(text), schema)
