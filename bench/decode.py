"""Decode speed: our reply against a bare llama_decode loop, against `Llama`, and under a JSON schema.

    python bench/decode.py [--part rates|peer|overheads] [--tokens 192] [--pairs 5]

Everything runs in this process on the standard model (bench/make_model.py): the same prompt, sampler
settings, context, batch and threads. Rates are sampled tokens per second of decode. Then the time per token
outside llama_decode at token 8,000 against that at token 100, on a model of few layers with the same
vocabulary. `Llama` generates four times as many tokens: its cost per token grows with the answer.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from compare import machine, pair_ratios, summary
from llama_cpp import Llama, StoppingCriteriaList
from make_model import bench_model

from qwq_local.dialogue.control import Opening
from qwq_local.dialogue.reply import Reply, ReplySettings
from qwq_local.engine.api import ContextSettings, JsonSchema, SamplerSettings
from qwq_local.engine.constraint import ConstraintMatcher, compile_constraint
from qwq_local.engine.context import LlamaContext, Rows, common_prefix
from qwq_local.engine.library import library
from qwq_local.engine.model import LoadedModel, LoadSettings, drained, load_model
from qwq_local.engine.scheduler import GenerationJob, Scheduler
from qwq_local.errors import AbortFlag
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


def read(context: LlamaContext, tokens: Sequence[int]) -> int:
    """Make the first slot hold exactly these tokens; returns the row of the last one's logits."""
    sequence, row = context.sequences[0], 0
    sequence.truncate(min(common_prefix(sequence.tokens, tokens), len(tokens) - 1))
    while (done := len(sequence.tokens)) < len(tokens):
        (row,) = context.decode([Rows(0, tokens[done : done + context.settings.n_batch])])
    return row


def bare_rate(context: LlamaContext, prompt: Sequence[int], n_tokens: int) -> float:
    """The rate of a loop of llama_decode and llama_sampler_sample."""
    lib = library()
    read(context, prompt)
    token = (ctypes.c_int32 * 1)()
    with closing(context.new_chain(SAMPLER)) as chain:
        for number in range(n_tokens):
            token[0] = lib.llama_sampler_sample(chain.handle, context.handle, -1)
            lib.llama_decode(context.handle, lib.llama_batch_get_one(token, 1))
            if number == 0:
                began = time.perf_counter()
        elapsed = time.perf_counter() - began
    lib.llama_memory_seq_rm(lib.llama_get_memory(context.handle), 0, len(prompt), -1)
    return (n_tokens - 1) / elapsed


def reply_rate(
    context: TimedContext, prompt: Sequence[int], n_tokens: int, matcher: ConstraintMatcher | None = None
) -> float:
    """Our reply through the scheduler, every event read; the rate of its sampled tokens.

    Without a constraint the tokens are thinking, with one they are the answer.
    """
    settings = ReplySettings(
        window=context.settings.n_ctx,
        sampler=SAMPLER,
        thinking_budget=n_tokens if matcher is None else 0,
        answer_reserve=64,
        max_tokens=1 if matcher is None else n_tokens,
        is_constrained=matcher is not None,
    )
    run(context, settings, prompt, matcher)
    times = context.decoded_at[: n_tokens - 1]
    if len(times) < n_tokens - 1:
        raise SystemExit(f"the random model ended after {len(times)} tokens; try another seed")
    return (len(times) - 1) / (times[-1] - times[0])


def run(
    context: TimedContext,
    settings: ReplySettings,
    prompt: Sequence[int],
    matcher: ConstraintMatcher | None = None,
) -> None:
    """One reply, every event read."""
    reply = Reply(context.vocabulary, settings, Opening(tuple(prompt)))
    context.start_timing()
    with closing(Scheduler(context)) as scheduler:
        for _ in scheduler.submit(
            reply, GenerationJob(tuple(prompt), settings.window, settings.sampler, matcher)
        ):
            pass


def llama_rate(llama: Llama, prompt: Sequence[int], n_tokens: int) -> float:
    """`Llama.create_completion(stream=True)` with the same settings, timed at each token it samples."""
    times: list[float] = []

    def on_token(_tokens: object, _logits: object) -> bool:
        times.append(time.perf_counter())
        return False

    stream = llama.create_completion(
        list(prompt),
        max_tokens=n_tokens,
        temperature=0.6,
        top_k=40,
        top_p=0.95,
        min_p=0.0,
        repeat_penalty=1.0,
        stream=True,
        seed=1,
        stopping_criteria=StoppingCriteriaList([on_token]),
    )
    for _ in stream:
        pass
    return (len(times) - 1) / (times[-1] - times[0])


class TimedContext(LlamaContext):
    """A context that records when each decode ended, and the seconds between a decode and the one before."""

    def start_timing(self) -> None:
        """Forget the recorded times."""
        self.outside_s: list[float] = []
        self.decoded_at: list[float] = []
        self._ended = time.perf_counter()

    def decode(self, rows: Sequence[Rows], abort: AbortFlag | None = None) -> list[int]:
        """Decode, and record the time if it was one token."""
        began = time.perf_counter()
        last_rows = super().decode(rows, abort)
        if len(rows[0].tokens) == 1:
            # The time from one decode to the next, without a synchronization that sampling makes anyway.
            self.outside_s.append(began - self._ended)
            self.decoded_at.append(time.perf_counter())
        self._ended = time.perf_counter()
        return last_rows


def outside_growth(model: LoadedModel) -> tuple[float, float]:
    """Seconds per token outside llama_decode, around token 100 and around token 8,000 of one thought."""
    settings = replace(CONTEXT, n_ctx=8704)
    with closing(TimedContext(model, settings)) as context:
        reply = ReplySettings(settings.n_ctx, SAMPLER, thinking_budget=8200, answer_reserve=64, max_tokens=1)
        run(context, reply, model.vocabulary.encode_text(TEXT))
    return statistics.median(context.outside_s[20:220]), statistics.median(context.outside_s[7900:8100])


def compare_rates(n_tokens: int, pairs: int) -> None:
    """Print our reply's rate against a bare loop's, and under a schema, on the standard model."""
    path = bench_model()
    print(f"{machine()}; {path.name}, {THREADS} threads, {n_tokens} tokens", flush=True)
    model = load(path)
    prompt = model.vocabulary.encode_text(TEXT)
    context = TimedContext(model, CONTEXT)
    constraint = compile_constraint(JsonSchema(SCHEMA), model.vocabulary)

    def ours() -> float:
        return reply_rate(context, prompt, n_tokens)

    ours(), bare_rate(context, prompt, n_tokens)  # warm up
    bare = pair_ratios(ours, lambda: bare_rate(context, prompt, n_tokens), pairs)
    print(summary("turn / bare llama_decode loop", bare, "at least 0.97"), flush=True)
    schema = pair_ratios(lambda: reply_rate(context, prompt, n_tokens, constraint.matcher()), ours, pairs)
    print(summary("turn under a schema / free turn", schema, "at least 0.9"), flush=True)
    print(f"our rate: {statistics.median(ours() for _ in range(3)):.1f} tokens/s", flush=True)
    context.close()
    model.close()


def compare_peer(n_tokens: int, pairs: int) -> None:
    """Print our reply's rate against that of the `Llama` class, on the standard model."""
    path = bench_model()
    print(f"{machine()}; {path.name}, {THREADS} threads, {n_tokens} tokens", flush=True)
    model, llama = load(path), peer_of(path)
    prompt = model.vocabulary.encode_text(TEXT)
    with closing(TimedContext(model, CONTEXT)) as context:
        reply_rate(context, prompt, 64), llama_rate(llama, prompt, 64)  # warm up
        ratios = pair_ratios(
            lambda: reply_rate(context, prompt, n_tokens), lambda: llama_rate(llama, prompt, n_tokens), pairs
        )
    print(summary("turn / Llama.create_completion(stream=True)", ratios, "more than 1"), flush=True)
    llama.close()
    model.close()


def compare_overheads(pairs: int) -> None:
    """Print what a token costs outside llama_decode, with a model for which llama_decode is quick."""
    path = bench_model("wide")
    print(f"{machine()}; {path.name}, {THREADS} threads", flush=True)
    model, llama = load(path), peer_of(path)
    prompt = model.vocabulary.encode_text(TEXT)
    with closing(TimedContext(model, CONTEXT)) as context:
        reply_rate(context, prompt, 64), llama_rate(llama, prompt, 64)  # warm up
        peer = pair_ratios(
            lambda: reply_rate(context, prompt, 1024), lambda: llama_rate(llama, prompt, 1024), pairs
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
    """Run the chosen parts and print their figures."""
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
