"""The local backend: messages and settings in, events out.

It joins the rooms: the model's header is checked, the weights loaded once, the prompt rendered and measured,
the context planned and made, the turn run. Front ends know only `reply` and `close`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwq_local.dialogue.conversation import Message
from qwq_local.dialogue.prompt import encode_prompt
from qwq_local.dialogue.template import ChatTemplate
from qwq_local.dialogue.turn import Turn, TurnSettings
from qwq_local.engine.api import AbortFlag, ContextSettings, Grammar
from qwq_local.engine.context import LlamaContext
from qwq_local.engine.grammar import LlamaGrammar, compile_grammar
from qwq_local.engine.model import LoadedModel, LoadSettings, load_model
from qwq_local.errors import UsageError
from qwq_local.events import Event, Loading, Notice, Planned
from qwq_local.models.architecture import check_architecture, model_name
from qwq_local.models.header import read_header, special_token_ids
from qwq_local.planning.context import Plan, Window, Wish, plan_context
from qwq_local.profile_keys import Profile

_MAX_SEED = 2**32 - 2  # llama.cpp reads the next one as "draw one"


@dataclass(frozen=True, slots=True)
class Question:
    """What one turn is asked: the conversation, the schema of the answer, and a seed for it alone."""

    messages: Sequence[Message]
    schema: Mapping[str, object] | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class _Loaded:
    name: str
    model: LoadedModel
    template: ChatTemplate


class LocalBackend:
    """A model file and a profile, ready to reply; the weights are loaded with the first question."""

    def __init__(self, path: Path, profile: Profile, threads: int, abort: AbortFlag) -> None:
        self._path = path
        self._profile = profile
        n_cpus = os.cpu_count() or 1
        if profile.threads > n_cpus:
            raise UsageError(f"threads is {profile.threads}, this machine has {n_cpus}: more would wait.")
        self._threads = profile.threads or threads
        self._abort = abort
        self._loaded: _Loaded | None = None
        self._context: LlamaContext | None = None
        self._compiled: tuple[Mapping[str, object], LlamaGrammar] | None = None
        self._noticed: set[str] = set()

    def reply(self, question: Question) -> Iterator[Event]:
        """The events of one turn; see qwq_local.events. Raises QwqError, and Aborted while loading."""
        if self._loaded is None:
            self._loaded = yield from self._load()
        loaded = self._loaded
        grammar = self._grammar(loaded.model, question.schema)
        prompt = encode_prompt(loaded.template, question.messages, loaded.model.vocabulary)
        yield from self._new_notices(prompt.notices)
        plan = self._plan(len(prompt.tokens))
        context = self._context_for(loaded.model, plan)
        seed = self._seed(question)
        yield self._planned(plan, loaded.name, len(prompt.tokens), seed)
        yield from Turn(context, self._turn_settings(plan, seed, grammar)).events(prompt.tokens)

    def close(self) -> None:
        """Free the grammar and the context, then the weights."""
        self._free_grammar()
        if self._context is not None:
            self._context.close()
            self._context = None
        if self._loaded is not None:
            self._loaded.model.close()
            self._loaded = None

    def _load(self) -> Generator[Event, None, _Loaded]:
        header = read_header(self._path)
        check_architecture(header)
        name = model_name(header)
        settings = LoadSettings(self._profile.n_gpu_layers, self._profile.use_mmap, special_token_ids(header))
        loading = load_model(self._path, settings, self._abort)
        while True:
            try:
                yield Loading(name, next(loading))
            except StopIteration as finished:
                template = ChatTemplate(header.text("tokenizer.chat_template") or None)
                return _Loaded(name, finished.value, template)

    def _new_notices(self, notices: Iterable[str]) -> Iterator[Notice]:
        """Each notice once, however many questions the backend gets."""
        for text in notices:
            if text not in self._noticed:
                self._noticed.add(text)
                yield Notice(text)

    def _plan(self, prompt_tokens: int) -> Plan:
        profile = self._profile
        wish = Wish(prompt_tokens, profile.thinking_budget, profile.answer_reserve, profile.n_ctx)
        return plan_context(wish, Window(profile.native_window, profile.yarn, profile.yarn_factors))

    def _context_for(self, model: LoadedModel, plan: Plan) -> LlamaContext:
        """The context there is, when it is large enough; else a new one, twice as large to grow into."""
        n_ctx = plan.n_ctx
        if self._context is not None:
            if self._context.settings.n_ctx >= n_ctx:
                return self._context
            window = int(self._profile.native_window * self._profile.yarn)
            n_ctx = max(n_ctx, min(2 * self._context.settings.n_ctx, window))
            self._context.close()
        self._context = None
        self._context = LlamaContext(model, self._context_settings(n_ctx), self._abort)
        return self._context

    def _context_settings(self, n_ctx: int) -> ContextSettings:
        profile = self._profile
        return ContextSettings(
            n_ctx=n_ctx,
            n_batch=min(profile.n_batch, n_ctx),
            n_ubatch=min(profile.n_ubatch, profile.n_batch, n_ctx),
            kv_type_k=profile.kv_type,
            kv_type_v=profile.kv_type,
            flash_attention=profile.flash_attention,
            yarn_factor=profile.yarn,
            yarn_origin=profile.yarn_origin,
            threads=self._threads,
        )

    def _planned(self, plan: Plan, model: str, prompt_tokens: int, seed: int) -> Planned:
        profile = self._profile
        return Planned(
            model=model,
            n_ctx=self._context.settings.n_ctx if self._context else plan.n_ctx,
            prompt_tokens=prompt_tokens,
            thinking_budget=plan.thinking_budget,
            answer_reserve=plan.answer_reserve,
            yarn_factor=profile.yarn,
            kv_type=profile.kv_type,
            n_gpu_layers=profile.n_gpu_layers,
            seed=seed,
        )

    def _turn_settings(self, plan: Plan, seed: int, grammar: Grammar | None) -> TurnSettings:
        return TurnSettings(
            sampler=self._profile.sampler_settings(seed),
            thinking_budget=plan.thinking_budget,
            answer_reserve=plan.answer_reserve,
            max_tokens=self._profile.max_tokens,
            loop_guard=self._profile.loop_guard,
            grammar=grammar,
        )

    def _seed(self, question: Question) -> int:
        for seed in (question.seed, self._profile.seed):
            if seed is not None:
                return seed
        return random.SystemRandom().randrange(_MAX_SEED)

    def _grammar(self, model: LoadedModel, schema: Mapping[str, object] | None) -> LlamaGrammar | None:
        """The schema's grammar, compiled anew only when the schema is another one."""
        if schema is None:
            return None
        if self._compiled is None or self._compiled[0] != schema:
            self._free_grammar()
            self._compiled = (schema, compile_grammar(model, schema))
        return self._compiled[1]

    def _free_grammar(self) -> None:
        if self._compiled is not None:
            self._compiled[1].close()
            self._compiled = None
