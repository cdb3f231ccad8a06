"""Plans for one model file, profile and machine.

It joins the exact sizes in the header, llama.cpp's dry run and the devices to the arithmetic of planning/. It
remembers for the run which plans llama.cpp got no memory for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qwq_local.engine.dry_run import DryRun
from qwq_local.events import DeviceBytes, Ledger, Planned
from qwq_local.machine.hardware import this_machine
from qwq_local.models.architecture import check_architecture, model_name
from qwq_local.models.facts import model_sizes, own_rope_scaling, tensor_kinds
from qwq_local.models.header import Header, read_header
from qwq_local.planning.alternatives import plan_or_explain
from qwq_local.planning.compute import described_compute
from qwq_local.planning.memory import ComputeBytes, Machine, Placement, Target
from qwq_local.planning.plan import Choices, Plan, Request, with_context
from qwq_local.planning.shape import ModelSizes
from qwq_local.planning.summary import plan_line, reduction_texts
from qwq_local.planning.window import Needs, RopeScaling, Window
from qwq_local.profiles.keys import Profile
from qwq_local.text import MIB

# llama.cpp does not say how much memory was missing: the next plan gets this part of the cache less.
_REDUCED_PART = 8


class Planner:
    """Plans for one model file under one profile; free it with `close`."""

    def __init__(
        self, path: Path, profile: Profile, machine: Machine | None = None, *, takes_largest: bool = False
    ) -> None:
        """Raises ModelFileError. A described machine replaces this one. `notice` is for the user.

        With `takes_largest`, for a conversation, plans use the largest native context that fits.
        """
        self.header: Header = read_header(path)
        shape = check_architecture(self.header)
        self.name = model_name(self.header)
        self.sizes = model_sizes(self.header, shape)
        self._stated_window = shape.context_length
        self.adopt(profile)
        self._machine = machine
        self._takes_largest = takes_largest
        self._dry_run: DryRun | None = None

    @property
    def machine(self) -> Machine:
        """The computer that is planned for; its free memory was measured once."""
        if self._machine is None:
            self._machine = this_machine()
        return self._machine

    def plan(self, prompt_tokens: int, n_gpu_layers: int | None = None) -> Plan:
        """The plan for a prompt; `n_gpu_layers` is how many layers are loaded already.

        Raises DoesNotFit with what would fit, PromptTooLong, UsageError.
        """
        return plan_or_explain(self.request(prompt_tokens, n_gpu_layers))

    def request(self, prompt_tokens: int, n_gpu_layers: int | None = None) -> Request:
        """Everything that the plan for a prompt depends on."""
        made = request_for(self.profile, self.window, self.sizes, self.machine, self._compute)
        if n_gpu_layers is not None:
            made = replace(made, choices=replace(made.choices, n_gpu_layers=n_gpu_layers))
        needs = replace(made.needs, prompt_tokens=prompt_tokens, takes_largest=self._takes_largest)
        return replace(made, needs=needs)

    def adopt(self, profile: Profile) -> None:
        """Plan with another profile from now on; what is known of the machine stays."""
        own = own_rope_scaling(self.header)
        self.profile = profile
        if not (profile.is_window_known or own.is_on):
            self.profile = within_window(profile, self._stated_window)
        self.window = model_window(self.profile, own)
        self.notice = ""
        if self.profile.native_window < profile.native_window:
            self.notice = (
                f"{self.name} has a window of {self._stated_window:,} tokens, its profile one of "
                f"{profile.native_window:,}: at most {self.profile.thinking_budget:,} are for thinking, "
                f"{self.profile.answer_reserve:,} kept for the answer."
            )

    def enlarged(self, plan: Plan, n_ctx: int) -> Plan | None:
        """The same plan with a larger context; None if that does not fit."""
        request = self.request(plan.needs.prompt_tokens)
        return with_context(request, plan, n_ctx)

    def note_failure(self, plan: Plan) -> None:
        """Remember for this run that a plan failed, so that the next plan asks for less memory.

        Where GPUs hold layers their memory was short; the system's stays as it is.
        """
        reserve = self.profile.memory_reserve * MIB
        limits = [
            use.total - max((use.kv_cache + use.compute) // _REDUCED_PART, 1) + reserve for use in plan.uses
        ]
        if plan.n_gpu_layers:
            limits[-1] = self.machine.available_bytes
        self._machine = self.machine.capped(tuple(limits))

    def planned(self, plan: Plan, seed: int, ledger: Ledger) -> Planned:
        """The plan as an event."""
        return planned_event(self.name, plan, seed, ledger)

    def close(self) -> None:
        """Free the dry run."""
        if self._dry_run is not None:
            self._dry_run.close()
            self._dry_run = None

    def _compute(self, placement: Placement) -> tuple[int, ...]:
        """Compute buffers: llama.cpp's own figures here, the formula's for a described machine."""
        if not self.machine.is_described:
            if self._dry_run is None:
                self._dry_run = DryRun(self.sizes.shape, tensor_kinds(self.header))
            if (asked := self._dry_run.compute_bytes(placement)) is not None:
                return asked
        return described_compute(self.sizes, self.machine)(placement)


def request_for(
    profile: Profile, window: Window, sizes: ModelSizes, machine: Machine, compute: ComputeBytes
) -> Request:
    """What a profile asks of a machine, for an empty prompt."""
    needs = Needs(0, profile.thinking_budget, profile.answer_reserve, profile.n_ctx)
    choices = Choices(
        kv_type=profile.kv_type,
        n_gpu_layers=profile.n_gpu_layers,
        flash_attention=profile.flash_attention,
        n_batch=profile.n_batch,
        n_ubatch=profile.n_ubatch,
    )
    return Request(needs, window, Target(sizes, machine, compute, profile.memory_reserve * MIB), choices)


def planned_event(name: str, plan: Plan, seed: int, ledger: Ledger) -> Planned:
    """The plan as an event, for a model called `name`."""
    context = plan.placement.context
    return Planned(
        model=name,
        n_ctx=plan.n_ctx,
        prompt_tokens=plan.needs.prompt_tokens,
        thinking_budget=plan.thinking_budget,
        answer_reserve=plan.answer_reserve,
        yarn_factor=plan.rope.factor,
        kv_type=plan.kv_type,
        n_gpu_layers=plan.n_gpu_layers,
        seed=seed,
        yarn_origin=plan.rope.origin,
        flash_attention=context.flash_attention,
        n_batch=context.n_batch,
        n_ubatch=context.n_ubatch,
        line=plan_line(plan),
        reductions=reduction_texts(plan),
        devices=tuple(
            DeviceBytes(use.name, use.weights, use.kv_cache, use.compute, use.usable) for use in plan.uses
        ),
        ledger=ledger,
    )


def within_window(profile: Profile, stated: int) -> Profile:
    """The profile for a file that states a smaller window; its budgets leave a quarter for the prompt.

    A larger window is not taken: files of QwQ-32B state more than the model was trained with.
    """
    if stated >= profile.native_window:
        return profile
    return replace(
        profile,
        native_window=stated,
        yarn_origin=stated,
        thinking_budget=min(profile.thinking_budget, 5 * stated // 8),
        answer_reserve=min(profile.answer_reserve, stated // 8),
    )


def model_window(profile: Profile, own: RopeScaling) -> Window:
    """The window of a model: the profile's, or for a file with scaling keys its own factor and origin."""
    window = Window(profile.native_window, profile.yarn_factors, profile.yarn, profile.yarn_origin)
    if not own.is_on:
        return window
    origin = own.origin or profile.yarn_origin
    return replace(window, native=origin, factors=(own.factor,), origin=origin, kind=own.kind)
