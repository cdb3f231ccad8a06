"""The local backend: a GGUF and a profile answer requests.

It checks the header, plans the memory, loads the weights once, encodes the prompt, makes or keeps the context
and runs the reply on its scheduler. Front ends know `backend.api` only.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path

from qwq_local.backend.api import ReplyRequest
from qwq_local.backend.planner import Planner
from qwq_local.backend.prefill_cache import PrefillCache
from qwq_local.backend.weights import ActiveContext, Weights
from qwq_local.dialogue.control import Opening
from qwq_local.dialogue.prompts.formats import Prompt, PromptFormat, prompt_format
from qwq_local.dialogue.prompts.segments import encode_plain
from qwq_local.dialogue.reply import Reply, ReplySettings
from qwq_local.dialogue.transcript import planned_prompt_tokens
from qwq_local.engine.api import AnswerConstraint, Vocabulary
from qwq_local.engine.constraint import (
    Constraint,
    ConstraintMatcher,
    check_constraint,
    compile_constraint,
)
from qwq_local.engine.scheduler import GenerationJob
from qwq_local.errors import Aborted, AbortFlag, PromptTooLong, UsageError
from qwq_local.events import Event, Finished, FinishReason, Notice, Planned, Prompted
from qwq_local.models.identity import header_sha256
from qwq_local.planning.memory import Machine
from qwq_local.planning.plan import Plan
from qwq_local.planning.summary import shortage_line
from qwq_local.profiles.keys import MAX_SEED, Profile

# Keys that need the weights or the context again; budgets and sampling need neither.
_WEIGHT_KEYS = frozenset(("use_mmap", "n_gpu_layers"))
_CONTEXT_KEYS = frozenset(
    {
        "n_ctx",
        "yarn",
        "native_window",
        "is_window_known",
        "yarn_origin",
        "yarn_factors",
        "kv_type",
        "flash_attention",
        "n_batch",
        "n_ubatch",
        "prefill_gap",
        "prefill_chunk",
        "threads",
    }
)


@dataclass(frozen=True, slots=True)
class _EncodedRequest:
    """A request as tokens: its prompt, what an earlier reply generated, and the prompt length to plan for."""

    request: ReplyRequest
    prompt: Prompt
    planned_tokens: int

    @property
    def tokens(self) -> Sequence[int]:
        """All that is prefilled."""
        opening = self.request.opening
        return self.prompt.tokens if opening is None else (*opening.prompt, *opening.generated)


class LocalBackend:
    """A model file and a profile, ready to reply; the first request loads the weights."""

    def __init__(
        self,
        path: Path,
        profile: Profile,
        threads: int,
        abort: AbortFlag,
        prefill_cache: PrefillCache | None = None,
        *,
        takes_largest: bool = False,
    ) -> None:
        """Without `prefill_cache` nothing is kept on disk. `takes_largest` uses the largest native context.

        `abort` stops a reply as `stop` does; its owner may set it from a signal handler.
        """
        _check_threads(profile)
        self._path = path
        self._profile = profile
        self._default_threads = threads
        self._abort = abort
        self._prefill_cache = prefill_cache
        self._takes_largest = takes_largest
        self._machine: Machine | None = None
        self._planner: Planner | None = None
        self._prompt_format: PromptFormat | None = None
        self._weights: Weights | None = None
        self._constraint: Constraint | None = None
        self._noticed: set[str] = set()
        self._stop = _StopSignal(abort)

    def plan_for(self, machine: Machine | None) -> None:
        """Plan for a described computer, if there is one; only `dry_run` makes sense then."""
        self._machine = machine

    def reply(self, request: ReplyRequest) -> Iterator[Event]:
        """The events of one reply; see qwq_local.events. Raises QwqError, and Aborted while loading."""
        return self._stop.guarded(self._reply(request))

    def stop(self) -> None:
        """Stop the running reply, from any thread; between two replies this does nothing."""
        self._stop.set()

    def keep(self) -> Iterator[Notice]:
        """Keep on disk what the last reply prefilled."""
        if self._prefill_cache is not None:
            yield from self._prefill_cache.keep()

    def dry_run(self, request: ReplyRequest) -> Planned:
        """The plan for a request; no weights are loaded. Raises what `reply` would."""
        encoded = self._encoded(request)
        plan = self.weights.expected_plan(encoded.planned_tokens)
        return self._planned(encoded, plan, self._seed(request))

    def largest_context(self) -> int:
        """The largest context that a plan may have, in tokens."""
        return self._profile.n_ctx or self.planner.window.largest

    def count_tokens(self, text: str) -> int:
        """The number of tokens of plain text."""
        return len(encode_plain(text, self.weights.vocabulary))

    def adopt(self, profile: Profile) -> None:
        """Use another profile from now on; what it does not touch stays loaded. Raises UsageError."""
        _check_threads(profile)
        before, self._profile = self._profile, profile
        changed = {each.name for each in fields(Profile) if _differs(before, profile, each.name)}
        if self._prefill_cache is not None:
            self._prefill_cache.adopt(profile)
        if self._planner is not None:
            self._planner.adopt(profile)
        if changed & _WEIGHT_KEYS:
            self._unload()
        if self._weights is not None:
            self._weights.adopt(profile, self._threads, is_context_new=bool(changed & _CONTEXT_KEYS))

    def identity(self) -> str:
        """The SHA-256 of the weights once it is known, before that of the header; "" if the file is gone."""
        try:
            if self._prefill_cache is None:
                return f"header:{header_sha256(self.planner.header)}"
            model = self._prefill_cache.identity(self.planner.header)
        except OSError:
            return ""
        return f"sha256:{model.sha256}" if model.sha256 else f"header:{model.header}"

    def close(self) -> None:
        """Free the context, then the weights."""
        if self._prefill_cache is not None:
            self._prefill_cache.close()
        self._unload()
        if self._planner is not None:
            self._planner.close()
            self._planner = None

    @property
    def planner(self) -> Planner:
        """The model file, the machine and their plans."""
        if self._planner is None:
            self._planner = Planner(
                self._path, self._profile, self._machine, takes_largest=self._takes_largest
            )
        return self._planner

    @property
    def weights(self) -> Weights:
        """What is loaded of the model file."""
        if self._weights is None:
            self._weights = Weights(self._path, self.planner, self._profile, self._threads, self._abort)
        return self._weights

    @property
    def _threads(self) -> int:
        return self._profile.threads or self._default_threads

    def _reply(self, request: ReplyRequest) -> Generator[Event, None, None]:
        if self._prefill_cache is not None:
            self._prefill_cache.forget()
        if request.constraint is not None:
            if request.opening is not None:
                raise UsageError("a reply under a constraint cannot be continued: ask again.")
            check_constraint(request.constraint)
        n_characters = sum(len(message.content) for message in request.messages)
        yield from self.weights.load(lambda: self._encoded(request).planned_tokens, n_characters)
        self._matcher(request.constraint)
        encoded = self._encoded(request)
        yield from self._new_notices(filter(None, [self.planner.notice, *encoded.prompt.notices]))
        active = yield from self.weights.ready(encoded.planned_tokens)
        plan, n_ctx = active.plan, active.context.settings.n_ctx
        yield from self._new_notices(filter(None, [shortage_line(plan)]))
        seed = self._seed(request)
        yield replace(self._planned(encoded, plan, seed), n_ctx=n_ctx)
        if len(encoded.tokens) >= n_ctx:
            raise PromptTooLong(
                f"what there is of this turn has {len(encoded.tokens):,} tokens, the context {n_ctx:,}. "
                "Leave n_ctx and yarn to the plan, or ask again."
            )
        if request.wants_tokens:
            yield Prompted(encoded.prompt.tokens)
        yield from self._decoded(active, self._reply_settings(plan, n_ctx, seed, request), encoded)

    def _encoded(self, request: ReplyRequest) -> _EncodedRequest:
        """The request as tokens of this model. An opening brings its own, unless it was lost before that."""
        vocabulary, opening = self.weights.vocabulary, request.opening
        if opening is None or not opening.prompt:
            prompt = self._prompt(request, vocabulary)
            return _EncodedRequest(replace(request, opening=None), prompt, len(prompt.tokens))
        planned = self._planned_tokens(opening, vocabulary)
        return _EncodedRequest(request, Prompt(opening.prompt), planned)

    def _planned_tokens(self, opening: Opening, vocabulary: Vocabulary) -> int:
        """The prompt length to plan for, so that the rest of the reply fits if it can."""
        profile = self.planner.profile
        planned = planned_prompt_tokens(opening, vocabulary, profile.thinking_budget, profile.answer_reserve)
        if planned > len(opening.prompt):
            try:
                self.planner.plan(planned)
            except PromptTooLong:
                return len(opening.prompt)
        return planned

    def _prompt(self, request: ReplyRequest, vocabulary: Vocabulary) -> Prompt:
        # Every prompt opens the thinking, also where a template leaves that to the model.
        return self._format(vocabulary).encode(request.messages, vocabulary, opens_thinking=True)

    def _format(self, vocabulary: Vocabulary) -> PromptFormat:
        if self._prompt_format is None:
            header = self.planner.header
            template, name = header.text("tokenizer.chat_template"), header.text("general.name")
            self._prompt_format = prompt_format(template, vocabulary.special_tokens, name or self._path.stem)
        return self._prompt_format

    def _decoded(
        self, active: ActiveContext, settings: ReplySettings, encoded: _EncodedRequest
    ) -> Iterator[Event]:
        """The events of the reply, after the KV store has restored what it has of the prompt.

        An error drops the context: the next reply makes its own.
        """
        request, sequence = encoded.request, active.context.sequences[0]
        opening = request.opening or Opening(tuple(encoded.prompt.tokens))
        reply = Reply(self.weights.vocabulary, settings, opening, request.control)
        if reply.is_over:
            yield from reply.finish()
            return
        tokens, header = (*opening.prompt, *reply.generated), self.planner.header
        if self._prefill_cache is not None:
            yield from self._prefill_cache.restore(sequence, header, tokens, self._abort)
        matcher = self._matcher(request.constraint)
        job = GenerationJob(
            tokens, settings.window, settings.sampler, matcher, self._profile.logprobs, abort=self._abort
        )
        events = active.scheduler.submit(reply, job)
        try:
            yield from (
                events
                if self._prefill_cache is None
                else self._prefill_cache.noted(events, sequence, header, opening.prompt)
            )
        except GeneratorExit:
            raise
        except BaseException:
            self._drop_context()
            raise
        finally:
            events.close()

    def _drop_context(self) -> None:
        if self._prefill_cache is not None:
            self._prefill_cache.forget()
        self.weights.drop_context()

    def _new_notices(self, notices: Iterable[str]) -> Iterator[Notice]:
        """Each notice once in the life of the backend."""
        for text in notices:
            if text not in self._noticed:
                self._noticed.add(text)
                yield Notice(text)

    def _planned(self, encoded: _EncodedRequest, plan: Plan, seed: int) -> Planned:
        request = encoded.request
        vocabulary = self.weights.vocabulary
        ledger = self._format(vocabulary).ledger(
            request.messages, request.files, vocabulary, len(encoded.tokens), plan.n_ctx
        )
        ledger = replace(ledger, thinking_dropped=ledger.thinking_dropped + request.dropped_thinking)
        planned = self.planner.planned(plan, seed, ledger)
        return replace(planned, prompt_tokens=len(encoded.prompt.tokens))

    def _reply_settings(self, plan: Plan, window: int, seed: int, request: ReplyRequest) -> ReplySettings:
        return ReplySettings(
            window=window,
            sampler=self._profile.sampler_settings(seed),
            thinking_budget=plan.thinking_budget,
            answer_reserve=plan.answer_reserve,
            max_tokens=self._profile.max_tokens,
            loop_guard=self._profile.loop_guard,
            is_constrained=request.constraint is not None,
            wants_tokens=request.wants_tokens,
            has_logprobs=self._profile.logprobs is not None,
        )

    def _seed(self, request: ReplyRequest) -> int:
        for seed in (request.seed, self._profile.seed):
            if seed is not None:
                return seed
        return random.SystemRandom().randrange(MAX_SEED + 1)

    def _matcher(self, source: AnswerConstraint | None) -> ConstraintMatcher | None:
        """A matcher for one reply. The last constraint stays compiled, for the next reply under it."""
        if source is None:
            return None
        if self._constraint is None or self._constraint.source != source:
            self._constraint = compile_constraint(source, self.weights.vocabulary)
        return self._constraint.matcher()

    def _unload(self) -> None:
        """Free what was loaded."""
        if self._prefill_cache is not None:
            self._prefill_cache.forget()
        if self._weights is not None:
            self._weights.close()
            self._weights = None


class _StopSignal:
    """Lets `set` stop the reply that runs and no other, through the engine's abort flag.

    The owner of the flag may set it at any time; it then counts for the reply that sees it.
    """

    def __init__(self, abort: AbortFlag) -> None:
        self._abort = abort
        # A signal handler may interrupt the thread that holds the lock.
        self._lock = threading.RLock()
        self._is_running = self._is_set = False

    def set(self) -> None:
        """Stop the running reply, if there is one."""
        with self._lock:
            if self._is_running:
                self._is_set = True
                self._abort.set()

    def guarded(self, events: Generator[Event, None, None]) -> Iterator[Event]:
        """The events of a reply, which can be stopped while they come."""
        with self._lock:
            self._is_running = True
        was_seen = False
        try:
            with closing(events):
                for event in events:
                    if isinstance(event, Finished):
                        was_seen = event.reason is FinishReason.INTERRUPTED
                    yield event
        except Aborted:
            was_seen = True
            raise
        finally:
            with self._lock:
                self._is_running = False
                if self._is_set or was_seen:
                    self._abort.clear()
                self._is_set = False


def _check_threads(profile: Profile) -> None:
    n_cpus = os.cpu_count() or 1
    if profile.threads > n_cpus:
        raise UsageError(f"threads is {profile.threads}, this machine has {n_cpus}: more would wait.")


def _differs(before: Profile, after: Profile, key: str) -> bool:
    return bool(getattr(before, key) != getattr(after, key))
