"""Decode speed: our turn against a bare llama_decode loop, against `Llama`, and under a JSON schema.

    python bench/decode.py [--part rates|peer|overheads] [--tokens 192] [--pairs 5]

Everything runs in this process on the standard model (bench/make_model.py): the same prompt, sampler
settings, context, batch and threads. Rates are sampled tokens per second of decode. Then the time per token
outside llama_decode at token 8,000 against that at token 100, on a model of few layers with the same
vocabulary. `Llama` is given four times as many tokens: its cost per token grows with the answer.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from compare import machine, pair_ratios, summary
from llama_cpp import Llama, StoppingCriteriaList
from make_model import bench_model

from qwq_local.dialogue.turn import Turn, TurnSettings
from qwq_local.engine.api import (
    AbortFlag,
    ContextSettings,
    Grammar,
    JsonSchema,
    PrefillProgress,
    SamplerSettings,
)
from qwq_local.engine.constraint import compile_constraint
from qwq_local.engine.context import LlamaContext
from qwq_local.engine.library import library
from qwq_local.engine.model import LoadedModel, LoadSettings, drained, load_model
from qwq_local.engine.sampler import SamplerChain
from qwq_local.engine.vocabulary import LlamaVocabulary
from qwq_local.machine.hardware import physical_cores
from qwq_local.models.header import read_header, special_token_ids

SAMPLER = SamplerSettings(seed=1)
THREADS = physical_cores()
CONTEXT = ContextSettings(n_ctx=2048, flash_attention=False, threads=THREADS)
TEXT = "the quick brown fox jumps over the lazy dog and then it goes on " * 4
SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}


def load(path: Path) -> LoadedModel:
    """The model of a GGUF."""
    special_ids = special_token_ids(read_header(path))
    return drained(load_model(path, LoadSettings(special_ids=special_ids), AbortFlag()))


def bare_rate(context: LlamaContext, prompt: Sequence[int], n_tokens: int) -> float:
    """llama_decode and llama_sampler_sample in a loop, and nothing else."""
    lib = library()
    list(context.prefill(prompt))
    handle, vocab = context._handle, lib.llama_model_get_vocab(context._model.handle)
    token = (ctypes.c_int32 * 1)()
    with closing(SamplerChain(SAMPLER, vocab, context.vocabulary.size, CONTEXT.n_ctx)) as chain:
        for number in range(n_tokens):
            token[0] = lib.llama_sampler_sample(chain.handle, handle, -1)
            lib.llama_decode(handle, lib.llama_batch_get_one(token, 1))
            if number == 0:
                began = time.perf_counter()
        elapsed = time.perf_counter() - began
    lib.llama_memory_seq_rm(context._memory, 0, len(prompt), -1)
    return (n_tokens - 1) / elapsed


def turn_rate(
    context: LlamaContext, prompt: Sequence[int], n_tokens: int, grammar: Grammar | None = None
) -> float:
    """Our turn, every event drained; the rate of its sampled tokens, from the end of the first decode on.

    Without a grammar the tokens are thinking, with one they are the answer.
    """
    engine = TimedEngine(context)
    budget = 0 if grammar else n_tokens
    settings = TurnSettings(
        SAMPLER,
        thinking_budget=budget,
        answer_reserve=64,
        max_tokens=n_tokens if grammar else 1,
        grammar=grammar,
    )
    for _ in Turn(engine, settings).events(prompt):
        pass
    times = engine.appended_at[:n_tokens]
    if len(times) < n_tokens:
        raise SystemExit(f"the random model ended after {len(times)} tokens; try another seed")
    return (n_tokens - 1) / (times[-1] - times[0])


def llama_rate(llama: Llama, prompt: Sequence[int], n_tokens: int) -> float:
    """`Llama.create_completion(stream=True)` with the same settings, timed at each token it samples."""
    times: list[float] = []

    def on_token(_tokens: object, _logits: object) -> bool:
        times.append(time.perf_counter())
        return False

    stream = llama.create_completion(
        list(prompt), max_tokens=n_tokens, temperature=0.6, top_k=40, top_p=0.95, min_p=0.0,
        repeat_penalty=1.0, stream=True, seed=1, stopping_criteria=StoppingCriteriaList([on_token]),
    )  # fmt: skip
    for _ in stream:
        pass
    return (len(times) - 1) / (times[-1] - times[0])


class TimedEngine:
    """An engine that keeps the time at which each append ended, and how long after the last one it began."""

    def __init__(self, engine: LlamaContext) -> None:
        self._engine = engine
        self._resumed = 0.0
        self.outside_s: list[float] = []
        self.appended_at: list[float] = []

    @property
    def vocabulary(self) -> LlamaVocabulary:
        return self._engine.vocabulary

    @property
    def settings(self) -> ContextSettings:
        return self._engine.settings

    @property
    def tokens(self) -> Sequence[int]:
        return self._engine.tokens

    def prefill(self, tokens: Sequence[int]) -> Iterator[PrefillProgress]:
        yield from self._engine.prefill(tokens)
        self._resumed = time.perf_counter()

    def start_sampling(self, settings: SamplerSettings) -> None:
        self._engine.start_sampling(settings)

    def remember(self, tokens: Sequence[int]) -> None:
        self._engine.remember(tokens)

    def sample(self, grammar: Grammar | None = None) -> int:
        return self._engine.sample(grammar)

    def append(self, token: int) -> None:
        self.outside_s.append(time.perf_counter() - self._resumed)
        self._engine.append(token)
        self._resumed = time.perf_counter()
        self.appended_at.append(self._resumed)

    def truncate(self, n_tokens: int) -> None:
        self._engine.truncate(n_tokens)


def outside_growth(model: LoadedModel) -> tuple[float, float]:
    """Seconds per token outside llama_decode around token 100 and around token 8,000 of one thinking."""
    settings = replace(CONTEXT, n_ctx=8704)
    with closing(LlamaContext(model, settings, AbortFlag())) as context:
        engine = TimedEngine(context)
        turn = Turn(engine, TurnSettings(SAMPLER, thinking_budget=8200, answer_reserve=64, max_tokens=1))
        for _ in turn.events(model.vocabulary.encode_text(TEXT)):
            pass
    return statistics.median(engine.outside_s[20:220]), statistics.median(engine.outside_s[7900:8100])


def compare_rates(n_tokens: int, pairs: int) -> None:
    """Print our turn's rate against a bare loop's, and under a schema, on the standard model."""
    path = bench_model()
    print(f"{machine()}; {path.name}, {THREADS} threads, {n_tokens} tokens", flush=True)
    model = load(path)
    prompt = model.vocabulary.encode_text(TEXT)
    context = LlamaContext(model, CONTEXT, AbortFlag())
    constraint = compile_constraint(JsonSchema(SCHEMA), model.vocabulary)

    def ours() -> float:
        return turn_rate(context, prompt, n_tokens)

    ours(), bare_rate(context, prompt, n_tokens)  # warm up
    bare = pair_ratios(ours, lambda: bare_rate(context, prompt, n_tokens), pairs)
    print(summary("turn / bare llama_decode loop", bare, "at least 0.97"), flush=True)
    schema = pair_ratios(lambda: turn_rate(context, prompt, n_tokens, constraint.matcher()), ours, pairs)
    print(summary("turn under a schema / free turn", schema, "at least 0.9"), flush=True)
    print(f"our rate: {statistics.median(ours() for _ in range(3)):.1f} tokens/s", flush=True)
    context.close()
    model.close()


def compare_peer(n_tokens: int, pairs: int) -> None:
    """Print our turn's rate against that of the `Llama` class, on the standard model."""
    path = bench_model()
    print(f"{machine()}; {path.name}, {THREADS} threads, {n_tokens} tokens", flush=True)
    model, llama = load(path), peer_of(path)
    prompt = model.vocabulary.encode_text(TEXT)
    with closing(LlamaContext(model, CONTEXT, AbortFlag())) as context:
        turn_rate(context, prompt, 64), llama_rate(llama, prompt, 64)  # warm up
        ratios = pair_ratios(
            lambda: turn_rate(context, prompt, n_tokens), lambda: llama_rate(llama, prompt, n_tokens), pairs
        )
    print(summary("turn / Llama.create_completion(stream=True)", ratios, "more than 1"), flush=True)
    llama.close()
    model.close()


def compare_overheads(pairs: int) -> None:
    """Print what a token costs beside llama_decode, where llama_decode itself is quick."""
    path = bench_model("wide")
    print(f"{machine()}; {path.name}, {THREADS} threads", flush=True)
    model, llama = load(path), peer_of(path)
    prompt = model.vocabulary.encode_text(TEXT)
    with closing(LlamaContext(model, CONTEXT, AbortFlag())) as context:
        turn_rate(context, prompt, 64), llama_rate(llama, prompt, 64)  # warm up
        peer = pair_ratios(
            lambda: turn_rate(context, prompt, 1024), lambda: llama_rate(llama, prompt, 1024), pairs
        )
        print(summary("turn / Llama, 1,024 tokens of a quick model", peer, "more than 1"), flush=True)
    llama.close()
    early, late = zip(*(outside_growth(model) for _ in range(pairs)), strict=True)
    at_100, at_8000 = (1e6 * statistics.median(times) for times in (early, late))
    ratios = [after / before for before, after in zip(early, late, strict=True)]
    print(f"outside llama_decode: {at_100:.0f} µs at token 100, {at_8000:.0f} µs at token 8,000")
    print(summary("outside llama_decode, token 8,000 / token 100", ratios, "at most 1.1"), flush=True)
    model.close()


def peer_of(path: Path) -> Llama:
    """The `Llama` class on the same file with the same settings."""
    return Llama(
        str(path), n_ctx=CONTEXT.n_ctx, n_batch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False
    )


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--part", choices=("rates", "peer", "overheads"), action="append")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    parts = arguments.part or ["rates", "peer", "overheads"]
    if "rates" in parts:
        compare_rates(arguments.tokens, arguments.pairs)
    if "peer" in parts:
        compare_peer(4 * arguments.tokens, arguments.pairs)
    if "overheads" in parts:
        compare_overheads(arguments.pairs)


if __name__ == "__main__":
    main()
