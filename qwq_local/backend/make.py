"""Makes the backend that a model's name means, and reports what would run before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from qwq_convert.file_types import find_file_type

from qwq_local.backend.api import Backend, ReplyRequest
from qwq_local.backend.local import LocalBackend
from qwq_local.backend.planner import model_window, planned_event, request_for
from qwq_local.backend.prefill_cache import PrefillCache
from qwq_local.engine.constraint import (
    check_constraint as check_constraint,  # front ends check before they load
)
from qwq_local.engine.devices import can_offload
from qwq_local.engine.library import TESTED_VERSION
from qwq_local.errors import AbortFlag, ConvertError, DoesNotFit, ModelNotFound, QwqError, UsageError
from qwq_local.events import Ledger, Planned
from qwq_local.machine.hardware import idle_gpu_notice, physical_cores, present_gpu, this_machine
from qwq_local.models.catalog import Catalog
from qwq_local.models.facts import known_sizes
from qwq_local.models.registry import Registry
from qwq_local.models.store import find_model, is_miniature
from qwq_local.paths import Directories
from qwq_local.planning.alternatives import TableRow, context_table, plan_or_explain
from qwq_local.planning.compute import described_compute
from qwq_local.planning.memory import Machine
from qwq_local.planning.plan import Request
from qwq_local.planning.shape import ModelSizes
from qwq_local.planning.window import RopeScaling
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.keys import Profile
from qwq_local.profiles.layers import ResolvedProfile

LIBRARY = f"llama-cpp-python {TESTED_VERSION}"
"""What computes a local reply, as the history records it."""


def chosen_model(model: str, places: Directories) -> str:
    """The name of the model that is used: the miniature's where it was made the default, else `model`.

    Another default is found under the usual name and has its profile.
    """
    if model == DEFAULT_MODEL and is_miniature(default := Registry(places.data).read().default):
        return default
    return model


def model_file(model: str, resolved: ResolvedProfile, places: Directories) -> Path:
    """The GGUF that a name or path means. Raises ModelNotFound, UsageError for an ambiguous name."""
    catalog = Catalog(resolved.model, resolved.profile.repo, resolved.profile.files)
    return find_model(model, catalog, places.cache, places.data)


@dataclass(frozen=True, slots=True)
class BackendRequest:
    """Which backend a front end wants.

    `machine` is a described computer to plan for; only plans are of use then. `is_private` reads what is kept
    of earlier prompts and keeps nothing. `takes_largest` is for a conversation: the largest native context.
    """

    model: str
    resolved: ResolvedProfile
    places: Directories
    machine: Machine | None = None
    is_private: bool = False
    takes_largest: bool = False


BackendMaker = Callable[[BackendRequest], Backend]
"""Makes a backend with nothing loaded yet. Raises ModelNotFound, UsageError for an ambiguous name."""


def make_backend(request: BackendRequest) -> Backend:
    """The backend of a model on this machine. Raises ModelNotFound, UsageError for an ambiguous name."""
    profile = request.resolved.profile
    path = model_file(request.model, request.resolved, request.places)
    cache = PrefillCache(request.places.cache, profile, is_private=request.is_private)
    backend = LocalBackend(
        path, profile, physical_cores(), AbortFlag(), cache, takes_largest=request.takes_largest
    )
    if request.machine is not None:
        backend.plan_for(request.machine)
    return backend


def hardware_notice(backend: Backend) -> str | None:
    """One line when a GPU is here that the installed library cannot use."""
    if not isinstance(backend, LocalBackend):
        return None
    return idle_gpu_notice(present_gpu(), can_offload=can_offload())


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What would run: a table of contexts, and the plan for a question or the `problem` why none fits."""

    model: str
    machine: Machine
    rows: tuple[TableRow, ...]
    n_offloadable: int
    planned: Planned | None
    problem: QwqError | None = None


def plan_report(request: BackendRequest, question: ReplyRequest) -> PlanReport:
    """What would run of a model, for one question.

    Of a file of QwQ-32B that is not on this machine the published sizes are used. Raises ModelNotFound,
    UsageError, and what planning raises except DoesNotFit.
    """
    profile, places = request.resolved.profile, request.places
    catalog = Catalog(request.resolved.model, profile.repo, profile.files)
    try:
        path = find_model(request.model, catalog, places.cache, places.data)
    except ModelNotFound as error:
        sizes = _known_sizes(request.model, catalog)
        if sizes is None:
            raise
        if question.files:
            raise ModelNotFound(f"to count the tokens of a file the model must be here. {error}") from None
        return _estimated_report(sizes, profile, request.machine or this_machine())
    backend = LocalBackend(path, profile, physical_cores(), AbortFlag())
    backend.plan_for(request.machine)
    with closing(backend):
        rows = context_table(backend.planner.request(0))
        planned, problem = None, None
        try:
            planned = backend.dry_run(question)
        except DoesNotFit as error:
            problem = error
        facts = backend.planner
        return PlanReport(facts.name, facts.machine, rows, facts.sizes.n_offloadable, planned, problem)


def _known_sizes(model: str, catalog: Catalog) -> ModelSizes | None:
    """The sizes of a file of QwQ-32B that is not on this machine; None for another model.

    Raises UsageError with the list of types for an unknown type.
    """
    stem, _, file_type = model.partition(":")
    if stem.lower() != catalog.name or catalog.name != DEFAULT_MODEL:
        return None
    try:
        wanted = find_file_type(file_type or next(iter(catalog.files), "Q4_K_M"))
    except ConvertError as error:
        raise UsageError(str(error)) from None
    return known_sizes(wanted.name)


def _estimated_report(sizes: ModelSizes, profile: Profile, machine: Machine) -> PlanReport:
    """For a file that is not on this machine: exact weights, compute buffers by the formula."""
    name = f"QwQ 32B {sizes.file_type} (not on this machine)"
    window = model_window(profile, RopeScaling())
    compute = described_compute(sizes, machine)
    request: Request = request_for(profile, window, sizes, machine, compute)
    rows = context_table(request)
    try:
        chosen = plan_or_explain(request)
    except DoesNotFit as error:
        return PlanReport(name, machine, rows, sizes.n_offloadable, None, error)
    planned = planned_event(name, chosen, seed=0, ledger=Ledger(free=chosen.n_ctx))
    return PlanReport(name, machine, rows, sizes.n_offloadable, planned)
