"""The local backend: messages and settings in, events out.

It joins the rooms: the model's header is checked, the memory planned, the weights loaded once, the prompt
rendered and measured, the context made or kept, the turn run. Front ends know only question.Backend.
"""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from qwq_local.backend.contexts import Standing
from qwq_local.backend.prefill_once import PrefillOnce
from qwq_local.backend.provision import Provision
from qwq_local.backend.question import Question
from qwq_local.backend.stopping import Stopping
from qwq_local.backend.weights import Weights
from qwq_local.dialogue.control import Opening
from qwq_local.dialogue.prompts.formats import Prompt, PromptFormat, prompt_format
from qwq_local.dialogue.prompts.segments import encode_plain
from qwq_local.dialogue.reply import Reply, ReplySettings
from qwq_local.dialogue.transcript import planned_prompt_tokens
from qwq_local.engine.api import AbortFlag, AnswerConstraint, Vocabulary
from qwq_local.engine.constraint import (
    Constraint,
    ConstraintMatcher,
    check_constraint,
    compile_constraint,
)
from qwq_local.engine.scheduler import Job
from qwq_local.errors import PromptTooLong, UsageError
from qwq_local.events import Event, Notice, Planned, Prompted
from qwq_local.models.identity import header_sha256
from qwq_local.planning.memory import Machine
from qwq_local.planning.plan import Plan
from qwq_local.planning.summary import shortage_line
from qwq_local.profiles.keys import Profile

_MAX_SEED = 2**32 - 2  # llama.cpp reads the next one as "draw one"
# What the weights are loaded by, and what a context is made by; budgets and sampling touch neither.
_WEIGHT_KEYS = frozenset(("use_mmap", "n_gpu_layers"))
_CONTEXT_KEYS = frozenset(
    (
        *("n_ctx", "yarn", "native_window", "is_window_known", "yarn_origin", "yarn_factors"),
        *("kv_type", "flash_attention", "n_batch", "n_ubatch", "threads"),
    )
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question as tokens: its prompt, what an earlier turn generated, and the prompt length to plan for."""

    question: Question
    prompt: Prompt
    planned_tokens: int

    @property
    def tokens(self) -> Sequence[int]:
        """All that is prefilled."""
        opening = self.question.opening
        return self.prompt.tokens if opening is None else (*opening.prompt, *opening.generated)


class LocalBackend:
    """A model file and a profile, ready to reply; the weights are loaded with the first question."""

    def __init__(
        self,
        path: Path,
        profile: Profile,
        threads: int,
        abort: AbortFlag,
        once: PrefillOnce | None = None,
        *,
        is_roomy: bool = False,
    ) -> None:
        """Without `once` nothing is read or kept on disk. `is_roomy` takes the largest native context."""
        _check_threads(profile)
        self._path = path
        self._profile = profile
        self._usual_threads = threads
        self._abort = abort
        self._once = once
        self._is_roomy = is_roomy
        self._machine: Machine | None = None
        self._provision: Provision | None = None
        self._prompt_format: PromptFormat | None = None
        self._weights: Weights | None = None
        self._constraint: Constraint | None = None
        self._noticed: set[str] = set()
        self._stopping = Stopping(abort)

    def plan_for(self, machine: Machine | None) -> None:
        """Plan for a described computer, if there is one; only `dry_run` is of use then."""
        self._machine = machine

    def reply(self, question: Question) -> Iterator[Event]:
        """The events of one turn; see qwq_local.events. Raises QwqError, and Aborted while loading."""
        return self._stopping.listening(self._reply(question))

    def stop(self) -> None:
        """Ask the running turn to end, from any thread; a stop between two turns is for neither."""
        self._stopping.stop()

    def keep(self) -> Iterator[Notice]:
        """Keep on disk what the last turn prefilled, once its answer is out."""
        if self._once is not None:
            yield from self._once.keep()

    def dry_run(self, question: Question) -> Planned:
        """The plan for this very question; no weights are loaded. Raises what `reply` would."""
        asked = self._asked(question)
        plan = self.weights.foreseen(asked.planned_tokens)
        return self._planned(asked, plan, self._seed(question))

    def largest_context(self) -> int:
        """The largest context that a plan may have, in tokens."""
        return self._profile.n_ctx or self.provision.window.largest

    def count_tokens(self, text: str) -> int:
        """The tokens of plain text."""
        return len(encode_plain(text, self.weights.vocabulary))

    def adopt(self, profile: Profile) -> None:
        """Go on under another profile; what it does not touch stays loaded. Raises UsageError."""
        _check_threads(profile)
        before, self._profile = self._profile, profile
        changed = {each.name for each in fields(Profile) if _differs(before, profile, each.name)}
        if self._once is not None:
            self._once.adopt(profile)
        if self._provision is not None:
            self._provision.adopt(profile)
        if changed & _WEIGHT_KEYS:
            self._unload()
        if self._weights is not None:
            self._weights.adopt(profile, self._threads, is_context_new=bool(changed & _CONTEXT_KEYS))

    def identity(self) -> str:
        """Which weights answer: their SHA-256 once it is known, until then that of the header; "" if gone."""
        try:
            if self._once is None:
                return f"header:{header_sha256(self.provision.header)}"
            model = self._once.identity(self.provision.header)
        except OSError:
            return ""
        return f"sha256:{model.sha256}" if model.sha256 else f"header:{model.header}"

    def close(self) -> None:
        """Free the context, then the weights."""
        if self._once is not None:
            self._once.close()
        self._unload()
        if self._provision is not None:
            self._provision.close()
            self._provision = None

    @property
    def provision(self) -> Provision:
        """The model file, the machine and the plans made for them."""
        if self._provision is None:
            self._provision = Provision(self._path, self._profile, self._machine, is_roomy=self._is_roomy)
        return self._provision

    @property
    def weights(self) -> Weights:
        """What is loaded of the model file."""
        if self._weights is None:
            self._weights = Weights(self._path, self.provision, self._profile, self._threads, self._abort)
        return self._weights

    @property
    def _threads(self) -> int:
        return self._profile.threads or self._usual_threads

    def _reply(self, question: Question) -> Generator[Event, None, None]:
        if self._once is not None:
            self._once.forget()
        if question.constraint is not None:
            if question.opening is not None:
                raise UsageError("a reply under a constraint cannot be gone on with: ask again.")
            check_constraint(question.constraint)
        n_characters = sum(len(message.content) for message in question.messages)
        yield from self.weights.load(lambda: self._asked(question).planned_tokens, n_characters)
        self._matcher(question.constraint)
        asked = self._asked(question)
        yield from self._new_notices(filter(None, [self.provision.notice, *asked.prompt.notices]))
        standing = yield from self.weights.ready(asked.planned_tokens)
        plan, n_ctx = standing.plan, standing.context.settings.n_ctx
        yield from self._new_notices(filter(None, [shortage_line(plan)]))
        seed = self._seed(question)
        yield replace(self._planned(asked, plan, seed), n_ctx=n_ctx)
        if len(asked.tokens) >= n_ctx:
            raise PromptTooLong(
                f"what there is of this turn has {len(asked.tokens):,} tokens, the context {n_ctx:,}. "
                "Leave n_ctx and yarn to the plan, or ask again."
            )
        if question.wants_tokens:
            yield Prompted(asked.prompt.tokens)
        yield from self._decoded(standing, self._reply_settings(plan, n_ctx, seed, question), asked)

    def _asked(self, question: Question) -> _Asked:
        """The question as tokens of this model; an opening brings its own, unless it was lost before that."""
        vocabulary, opening = self.weights.vocabulary, question.opening
        if opening is None or not opening.prompt:
            prompt = self._prompt(question, vocabulary)
            return _Asked(replace(question, opening=None), prompt, len(prompt.tokens))
        planned = self._planned_tokens(opening, vocabulary)
        return _Asked(question, Prompt(opening.prompt), planned)

    def _planned_tokens(self, opening: Opening, vocabulary: Vocabulary) -> int:
        """The prompt length to plan for, so that what may follow fits; the bare prompt's if nothing can."""
        profile = self.provision.profile
        planned = planned_prompt_tokens(opening, vocabulary, profile.thinking_budget, profile.answer_reserve)
        if planned > len(opening.prompt):
            try:
                self.provision.plan(planned)
            except PromptTooLong:
                return len(opening.prompt)
        return planned

    def _prompt(self, question: Question, vocabulary: Vocabulary) -> Prompt:
        # The thinking is always opened, also where a template leaves that to the model.
        return self._format(vocabulary).encode(question.messages, vocabulary, opens_thinking=True)

    def _format(self, vocabulary: Vocabulary) -> PromptFormat:
        if self._prompt_format is None:
            header = self.provision.header
            template, name = header.text("tokenizer.chat_template"), header.text("general.name")
            self._prompt_format = prompt_format(template, vocabulary.special_tokens, name or self._path.stem)
        return self._prompt_format

    def _decoded(self, standing: Standing, settings: ReplySettings, asked: _Asked) -> Iterator[Event]:
        """The events of the reply; what the KV store has of the prompt is read first.

        An error leaves no context behind: the next reply makes its own.
        """
        question, sequence = asked.question, standing.context.sequences[0]
        opening = question.opening or Opening(tuple(asked.prompt.tokens))
        reply = Reply(self.weights.vocabulary, settings, opening, question.control)
        if reply.is_over:
            yield from reply.finish()
            return
        tokens, header = (*opening.prompt, *reply.generated), self.provision.header
        if self._once is not None:
            yield from self._once.restore(sequence, header, tokens, self._abort)
        matcher = self._matcher(question.constraint)
        job = Job(tokens, settings.window, settings.sampler, matcher, abort=self._abort)
        events = standing.scheduler.submit(reply, job)
        try:
            yield from (
                events if self._once is None else self._once.noted(events, sequence, header, opening.prompt)
            )
        except GeneratorExit:
            raise
        except BaseException:
            self._drop_context()
            raise
        finally:
            events.close()

    def _drop_context(self) -> None:
        if self._once is not None:
            self._once.forget()
        self.weights.drop_context()

    def _new_notices(self, notices: Iterable[str]) -> Iterator[Notice]:
        """Each notice once, however many questions the backend gets."""
        for text in notices:
            if text not in self._noticed:
                self._noticed.add(text)
                yield Notice(text)

    def _planned(self, asked: _Asked, plan: Plan, seed: int) -> Planned:
        question = asked.question
        vocabulary = self.weights.vocabulary
        ledger = self._format(vocabulary).ledger(
            question.messages, question.files, vocabulary, len(asked.tokens), plan.n_ctx
        )
        ledger = replace(ledger, thinking_spared=ledger.thinking_spared + question.spared)
        planned = self.provision.planned(plan, seed, ledger)
        return replace(planned, prompt_tokens=len(asked.prompt.tokens))

    def _reply_settings(self, plan: Plan, window: int, seed: int, question: Question) -> ReplySettings:
        return ReplySettings(
            window=window,
            sampler=self._profile.sampler_settings(seed),
            thinking_budget=plan.thinking_budget,
            answer_reserve=plan.answer_reserve,
            max_tokens=self._profile.max_tokens,
            loop_guard=self._profile.loop_guard,
            is_constrained=question.constraint is not None,
            wants_tokens=question.wants_tokens,
        )

    def _seed(self, question: Question) -> int:
        for seed in (question.seed, self._profile.seed):
            if seed is not None:
                return seed
        return random.SystemRandom().randrange(_MAX_SEED)

    def _matcher(self, source: AnswerConstraint | None) -> ConstraintMatcher | None:
        """A matcher for one reply. The last constraint stays compiled: `--each` asks under it many times."""
        if source is None:
            return None
        if self._constraint is None or self._constraint.source != source:
            self._constraint = compile_constraint(source, self.weights.model.vocabulary)
        return self._constraint.matcher()

    def _unload(self) -> None:
        """Free what was loaded: first the prefill that is kept of it."""
        if self._once is not None:
            self._once.forget()
        if self._weights is not None:
            self._weights.close()
            self._weights = None


def _check_threads(profile: Profile) -> None:
    n_cpus = os.cpu_count() or 1
    if profile.threads > n_cpus:
        raise UsageError(f"threads is {profile.threads}, this machine has {n_cpus}: more would wait.")


def _differs(before: Profile, after: Profile, key: str) -> bool:
    return bool(getattr(before, key) != getattr(after, key))
