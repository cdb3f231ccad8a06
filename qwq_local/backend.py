"""The local backend: messages and settings in, events out.

It joins the rooms: the model's header is checked, the memory planned, the weights loaded once, the prompt
rendered and measured, the context made or kept, the turn run. Front ends know only `reply` and `close`,
`keep` for when the answer is out, and `dry_run` for the plan alone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_local.contexts import Contexts, Standing
from qwq_local.dialogue.ledger import ledger_of
from qwq_local.dialogue.prompt import Prompt, encode_prompt
from qwq_local.dialogue.template import ChatTemplate
from qwq_local.dialogue.turn import Turn, TurnSettings
from qwq_local.engine.api import AbortFlag, Grammar, Vocabulary
from qwq_local.engine.grammar import LlamaGrammar, compile_grammar
from qwq_local.engine.model import LoadedModel, LoadSettings, drained, load_model
from qwq_local.errors import DoesNotFit, UsageError
from qwq_local.events import Event, Loading, Notice, Planned
from qwq_local.models.header import special_token_ids
from qwq_local.planning.devices import Machine
from qwq_local.planning.plan import Plan
from qwq_local.planning.words import shortage_line
from qwq_local.prefill_once import PrefillOnce
from qwq_local.profile_keys import Profile
from qwq_local.provision import Provision
from qwq_local.question import Question

_MAX_SEED = 2**32 - 2  # llama.cpp reads the next one as "draw one"


@dataclass(frozen=True, slots=True)
class _Loaded:
    model: LoadedModel
    contexts: Contexts
    n_gpu_layers: int


class LocalBackend:
    """A model file and a profile, ready to reply; the weights are loaded with the first question."""

    def __init__(
        self,
        path: Path,
        profile: Profile,
        threads: int,
        abort: AbortFlag,
        machine: Machine | None = None,
        once: PrefillOnce | None = None,
    ) -> None:
        """A described machine is only good for `dry_run`; without `once` nothing is read or kept on disk."""
        self._path = path
        self._profile = profile
        n_cpus = os.cpu_count() or 1
        if profile.threads > n_cpus:
            raise UsageError(f"threads is {profile.threads}, this machine has {n_cpus}: more would wait.")
        self._threads = profile.threads or threads
        self._abort = abort
        self._machine = machine
        self._once = once
        self._provision: Provision | None = None
        self._template: ChatTemplate | None = None
        self._loaded: _Loaded | None = None
        self._compiled: tuple[Mapping[str, object], LlamaGrammar] | None = None
        self._noticed: set[str] = set()

    def reply(self, question: Question) -> Iterator[Event]:
        """The events of one turn; see qwq_local.events. Raises QwqError, and Aborted while loading."""
        if self._once is not None:
            self._once.forget()
        if self._loaded is None:
            self._loaded = yield from self._load(self._first_plan(question))
        grammar = self._grammar(self._loaded.model, question.schema)
        prompt = self._prompt(question, self._loaded.model.vocabulary)
        yield from self._new_notices(prompt.notices)
        standing = yield from self._standing(len(prompt.tokens))
        plan = standing.plan
        yield from self._new_notices(filter(None, [shortage_line(plan)]))
        seed = self._seed(question)
        yield self._planned(question, plan, standing.context.settings.n_ctx, seed)
        yield from self._turn(standing, self._turn_settings(plan, seed, grammar), prompt.tokens)

    def keep(self) -> Iterator[Notice]:
        """Keep on disk what the last turn prefilled, once its answer is out."""
        if self._once is not None:
            yield from self._once.keep()

    def dry_run(self, question: Question) -> Planned:
        """The plan for this very question; no weights are loaded. Raises what `reply` would."""
        with_vocabulary = self._vocabulary_only()
        try:
            prompt = self._prompt(question, with_vocabulary.vocabulary)
            plan = self.provision.plan(len(prompt.tokens))
            ledger = ledger_of(
                question.messages, question.files, with_vocabulary.vocabulary, len(prompt.tokens), plan.n_ctx
            )
            return self.provision.planned(plan, self._seed(question), ledger)
        finally:
            with_vocabulary.close()

    def close(self) -> None:
        """Free the grammar and the context, then the weights."""
        if self._once is not None:
            self._once.close()
        self._free_model()
        if self._provision is not None:
            self._provision.close()
            self._provision = None

    @property
    def provision(self) -> Provision:
        """The model file, the machine and the plans made for them."""
        if self._provision is None:
            self._provision = Provision(self._path, self._profile, self._machine)
        return self._provision

    def _prompt(self, question: Question, vocabulary: Vocabulary) -> Prompt:
        if self._template is None:
            self._template = ChatTemplate(self.provision.header.text("tokenizer.chat_template") or None)
        return encode_prompt(self._template, question.messages, vocabulary)

    def _first_plan(self, question: Question) -> Plan:
        """The plan that the weights are loaded by; how many layers a GPU gets hangs on the prompt."""
        facts = self.provision
        if not facts.machine.gpus:
            return facts.plan(0)
        with_vocabulary = self._vocabulary_only()
        try:
            return facts.plan(len(self._prompt(question, with_vocabulary.vocabulary).tokens))
        finally:
            with_vocabulary.close()

    def _vocabulary_only(self) -> LoadedModel:
        special_ids = special_token_ids(self.provision.header)
        settings = LoadSettings(special_ids=special_ids, vocab_only=True)
        return drained(load_model(self._path, settings, self._abort))

    def _load(self, plan: Plan) -> Generator[Event, None, _Loaded]:
        facts = self.provision
        settings = LoadSettings(
            n_gpu_layers=plan.n_gpu_layers,
            use_mmap=self._profile.use_mmap,
            special_ids=special_token_ids(facts.header),
            split=plan.layout.split,
        )
        loading = load_model(self._path, settings, self._abort)
        while True:
            try:
                yield Loading(facts.name, next(loading))
            except StopIteration as finished:
                contexts = Contexts(finished.value, facts, self._threads, self._abort)
                return _Loaded(finished.value, contexts, plan.n_gpu_layers)

    def _standing(self, prompt_tokens: int) -> Generator[Event, None, Standing]:
        """A context for the prompt; when it takes fewer layers on the GPU the weights are loaded again."""
        assert self._loaded is not None
        try:
            return (yield from self._loaded.contexts.ready(prompt_tokens, self._loaded.n_gpu_layers))
        except DoesNotFit:
            if not self._loaded.n_gpu_layers or self._profile.n_gpu_layers is not None:
                raise
            plan = self.provision.plan(prompt_tokens)
        yield Notice(
            f"the weights are loaded again with {plan.n_gpu_layers} layers on the GPU, "
            f"not {self._loaded.n_gpu_layers}: the context needs the room."
        )
        self._free_model()
        self._loaded = yield from self._load(plan)
        return (yield from self._loaded.contexts.ready(prompt_tokens, self._loaded.n_gpu_layers))

    def _turn(self, standing: Standing, settings: TurnSettings, prompt: Sequence[int]) -> Iterator[Event]:
        """The events of the turn, begun with what is kept of the prompt; Aborted while that is read."""
        context, header = standing.context, self.provision.header
        if self._once is None:
            yield from Turn(context, settings).events(prompt)
            return
        yield from self._once.restore(context, header, prompt, self._abort)
        yield from self._once.noted(Turn(context, settings).events(prompt), context, header, prompt)

    def _new_notices(self, notices: Iterable[str]) -> Iterator[Notice]:
        """Each notice once, however many questions the backend gets."""
        for text in notices:
            if text not in self._noticed:
                self._noticed.add(text)
                yield Notice(text)

    def _planned(self, question: Question, plan: Plan, n_ctx: int, seed: int) -> Planned:
        assert self._loaded is not None
        vocabulary = self._loaded.model.vocabulary
        ledger = ledger_of(question.messages, question.files, vocabulary, plan.wish.prompt_tokens, n_ctx)
        return replace(self.provision.planned(plan, seed, ledger), n_ctx=n_ctx)

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

    def _free_model(self) -> None:
        self._free_grammar()
        if self._loaded is not None:
            self._loaded.contexts.close()
            self._loaded.model.close()
            self._loaded = None

    def _free_grammar(self) -> None:
        if self._compiled is not None:
            self._compiled[1].close()
            self._compiled = None
