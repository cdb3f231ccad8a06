"""`qwq models`: lists the models on this machine; adds, removes, shows, verifies and chooses one."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from qwq_convert.architecture import ModelShape

from qwq_local.cli import completion
from qwq_local.cli.environment import Environment, process_environment
from qwq_local.cli.local import default_profile, measured_fit, model_places
from qwq_local.cli.screen import WorkScreen
from qwq_local.errors import ModelFileError, ModelNotFound, QwqError, UsageError
from qwq_local.hub.cache import hash_file
from qwq_local.models.catalog import file_type_of
from qwq_local.models.inventory import (
    LocalModel,
    ModelOrigin,
    Places,
    local_model,
    local_models,
    plan_removal,
    remove_model,
)
from qwq_local.models.registry import ModelRecord, RegistryState
from qwq_local.models.store import MINIATURE, default_model, find_model, is_miniature, resolve_name
from qwq_local.profiles import DEFAULT_MODEL
from qwq_local.profiles.layers import ResolvedProfile
from qwq_local.terminal.output import Output
from qwq_local.terminal.sanitizer import aligned_lines, one_line, sanitize
from qwq_local.text import decimal_size
from qwq_local.wire import write_line

if TYPE_CHECKING:
    from qwq_local.models.header import Header

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


app = typer.Typer(
    invoke_without_command=True,
    help="List the models on this machine, or add, show, verify, remove, choose one.",
)
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A model as `qwq models` lists it.", autocompletion=completion.models
    ),
]


class _Inventory:
    """The models on this machine, with what a command needs to list and change them."""

    def __init__(self) -> None:
        self.environment: Environment = process_environment()
        self.resolved: ResolvedProfile = default_profile(self.environment.variables)
        self.places: Places = model_places(self.environment.variables, self.resolved)
        self.state = self.places.registry.read()
        self.models = local_models(self.places, self.state)

    def find(self, name: str) -> LocalModel:
        """The model of that name. Raises ModelNotFound, and UsageError when several match."""
        if is_miniature(name):
            path = find_model(name, self.places.catalog, self.places.directories.cache)
            kind = _file_type(_header(path))
            return local_model(self.state, name, path, ModelOrigin.BUNDLED, kind)
        model = resolve_name(name, self.models, self.places.catalog, self.state.default)
        if model is None:
            path = Path(name)
            model = next((each for each in self.models if path.exists() and each.path.samefile(path)), None)
        if model is None:
            raise ModelNotFound(f"no model {name!r} on this machine; `qwq models` lists what is here.")
        return model

    def remember(self, record: ModelRecord) -> None:
        """Writes a record to the registry."""
        self.places.registry.change(lambda state: state.with_record(record))

    def print(self, line: str) -> None:
        """Writes a line to stdout; file names in it cannot control the terminal."""
        self.environment.print(sanitize(line))


@app.callback()
def list_command(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Write the list as JSON.")] = False,
) -> None:
    """List the models that qwq can use: its own, the Hugging Face cache's, ollama's and LM Studio's."""
    if context.invoked_subcommand is not None:
        return
    here = _Inventory()
    comes_with_qwq = is_miniature(here.state.default)
    chosen = None if comes_with_qwq else default_model(here.models, here.places.catalog, here.state.default)
    fit = measured_fit(here.resolved.profile) if here.models else None
    shapes = [_shape_or_reason(model.path) for model in here.models]
    contexts = [
        None if fit is None or isinstance(shape, str) else fit.context(model.n_bytes, shape)
        for model, shape in zip(here.models, shapes, strict=True)
    ]
    if as_json:
        rows = [
            _json_row(model, shape, context, is_default=model is chosen)
            for model, shape, context in zip(here.models, shapes, contexts, strict=True)
        ]
        here.environment.print(json.dumps(rows, indent=1))
        return
    here.environment.print(*_list_lines(here.models, contexts, chosen))
    if comes_with_qwq:
        here.print(f"The default is {here.state.default}, which comes with qwq.")
    for model, shape in zip(here.models, shapes, strict=True):
        if isinstance(shape, str):
            note = one_line(f"{model.name} cannot be run: {shape}", 1000)
            write_line(here.environment.stderr, f"note: {note}\n")


def _list_lines(
    models: list[LocalModel], contexts: list[int | None], chosen: LocalModel | None
) -> Iterator[str]:
    """The models as aligned lines; `*` marks the default."""
    if not models:
        yield "No model is here yet. `qwq pull` brings QwQ-32B; --model miniature is always there."
        return
    rows = [("  NAME", "TYPE", "SIZE", "CONTEXT", "LAST USED", "VERIFIED", "FROM")]
    for model, context in zip(models, contexts, strict=True):
        used = model.record.last_used
        rows.append(
            (
                f"{'*' if model is chosen else ' '} {model.name}",
                model.file_type or "-",
                decimal_size(model.n_bytes),
                "-" if context is None else f"{context:,}" if context else "too large",
                datetime.fromtimestamp(used).strftime("%Y-%m-%d") if used else "never",
                "yes" if model.is_verified else "-",
                model.origin.value,
            )
        )
    yield from aligned_lines(rows)


@app.command("add")
def add_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A GGUF; it stays where it is.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="What to call it, if not as the file.")] = "",
) -> None:
    """Add a GGUF under a name of its own."""
    here = _Inventory()
    path = path.expanduser()
    if not path.is_file():
        raise UsageError(f"there is no file {path}.")
    header = _header(path)
    alias = name or re.sub(r"-00001-of-\d{5}$", "", path.name.removesuffix(".gguf"))
    if not _NAME.fullmatch(alias) or alias.lower() in (MINIATURE, DEFAULT_MODEL):
        raise UsageError(
            f"{alias[:60]!r} is no name for a model: letters, digits, . _ - only. Give one with --name."
        )
    taken = next((model for model in here.models if model.name.lower() == alias.lower()), None)
    if taken is not None and not taken.path.samefile(path):
        raise UsageError(f"{alias} is the name of {taken.path} already. Give another with --name.")
    before = here.state.of(path)
    kind = file_type_of(path.name) or _file_type(header)
    here.remember(replace(before, alias=alias, origin="add", file_type=kind, added_at=time.time()))
    renamed = f", no longer {before.alias}" if before.alias not in ("", alias) else ""
    here.print(f"{alias} is {path}{renamed}; it stays where it is. Try: qwq ask --model {alias} ...")


@app.command("rm")
def rm_command(
    name: Name, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False
) -> None:
    """Remove a model that qwq brought, or forget one that was added; says what it frees, and asks."""
    here = _Inventory()
    removal = plan_removal(here.find(name), here.places)
    model = removal.model
    freed = decimal_size(removal.freed_bytes, 2)
    done = f"{model.name} is deleted: {freed} freed."
    if removal.only_forgets:
        done = f"{model.name} is forgotten; {model.path} stays."
    elif not yes:
        question = one_line(f"Delete {model.name}, {model.path}? That frees {freed}.", 1000)
        if not here.environment.agrees(question, "deletes"):
            here.print("Nothing was deleted.")
            return
    remove_model(removal, here.places)
    here.print(done)


@app.command("show")
def show_command(name: Name) -> None:
    """Print what a model is: architecture, window, template, tensors by type, KV cache per token, sha256."""
    here = _Inventory()
    model = here.find(name)
    from qwq_local.models.architecture import check_architecture
    from qwq_local.models.facts import kv_bytes_per_token

    header = _header(model.path)
    shape = check_architecture(header)
    fit = measured_fit(here.resolved.profile)
    kv = kv_bytes_per_token(shape, fit.kv_type)
    kinds = Counter(tensor.kind.name for tensor in header.tensors.values()).most_common()
    tensors = ", ".join(f"{count} {kind}" for kind, count in kinds)
    name, template = header.text("general.name"), header.text("tokenizer.chat_template")
    heads = f"{shape.n_heads} heads, {shape.n_kv_heads} KV heads of {shape.head_dim}"
    context = fit.context(model.n_bytes, shape)
    parts = f" in {len(model.parts)} parts" if len(model.parts) > 1 else ""
    rows = {
        "name": model.name,
        "path": str(model.path),
        "from": model.origin.value + (f", {model.repo}" if model.repo else ""),
        "size": f"{model.n_bytes:,} bytes{parts}",
        "type": model.file_type or "-",
        "architecture": header.architecture + (f" ({name})" if name else ""),
        "layers": f"{shape.n_layers}, hidden {shape.hidden:,}, {heads}, vocabulary {shape.n_vocab:,}",
        "window": f"{shape.context_length:,} tokens in the header",
        "template": f"{len(template):,} characters" if template else "none",
        "tensors": f"{len(header.tensors)}: {tensors}",
        "KV per token": f"{kv:,} bytes as {fit.kv_type}, {kv_bytes_per_token(shape, 'f16'):,} as f16",
        "context here": f"{context:,} tokens",
        "sha256": (model.stated_sha256 or "unknown") + (", verified" if model.is_verified else ""),
    }
    here.environment.print(*aligned_lines(list(rows.items())))


@app.command("default")
def default_command(name: Name) -> None:
    """Choose the model that `qwq ask` uses when none is named; qwq-32b: the one pulled last, as at first."""
    here = _Inventory()
    if name.lower() == here.places.catalog.name:
        here.places.registry.change(lambda state: replace(state, default=""))
        model = default_model(here.models, here.places.catalog, "")
        last = f"that is {model.name}" if model else "none is here yet, `qwq pull` brings it"
        here.print(f"The default is the model that was pulled last again: {last}.")
        return
    model = here.find(name)
    _header(model.path)
    here.places.registry.change(lambda state: replace(state, default=model.name))
    here.print(f"{model.name} is the default now.")


@app.command("verify")
def verify_command(name: Name) -> None:
    """Hash a model's files and compare with what the hub, or the name of the blob, states."""
    from qwq_convert.gguf_file import read_header as read_part

    here = _Inventory()
    model = here.find(name)
    for part in model.parts:
        record = here.state.of(part)
        expected = replace(model, path=part, record=record).stated_sha256
        found = _hashed(part, here.environment)
        if expected and found != expected:
            here.remember(replace(record, verified_at=0.0))
            raise QwqError(
                f"{part} is damaged: its sha256 is {found}, should be {expected}. Fetch it again: `qwq pull` "
                "does so where it came from the hub."
            )
        try:
            read_part(part)
        except QwqError as error:
            raise ModelFileError(str(error)) from None
        here.places.registry.change(partial(RegistryState.with_verified, path=part, sha256=found))
        what = "as stated" if expected else "noted; nobody stated one before"
        here.print(f"{part.name}: sha256 {found}, {what}.")


# What reads a header imports numpy, which help can do without.
def _header(path: Path) -> Header:
    """The header of a GGUF. Raises ModelFileError when qwq cannot run it."""
    from qwq_local.models.architecture import check_architecture
    from qwq_local.models.header import read_header

    header = read_header(path)
    check_architecture(header)
    return header


def _file_type(header: Header) -> str:
    from qwq_local.models.architecture import file_type

    return file_type(header)


def _hashed(path: Path, environment: Environment) -> str:
    output = Output.of(environment.stderr, environment.variables)
    label, running = f"checking {path.name[:40]}", hashlib.sha256()
    with closing(WorkScreen(output)) as screen:
        try:
            screen.start(path.stat().st_size)
            for done in hash_file(path, running):
                screen.update(label, done)
        except OSError as error:
            raise QwqError(f"{path} cannot be read ({error.strerror}).") from None
    return running.hexdigest()


def _shape_or_reason(path: Path) -> ModelShape | str:
    """The shape of a GGUF, or the reason why qwq cannot run it: one bad file does not hide the others."""
    from qwq_local.models.architecture import check_architecture
    from qwq_local.models.header import read_header

    try:
        return check_architecture(read_header(path))
    except ModelFileError as error:
        return str(error)


def _json_row(
    model: LocalModel, shape: ModelShape | str, context: int | None, *, is_default: bool
) -> dict[str, object]:
    used = model.record.last_used
    return {
        "name": model.name,
        "type": model.file_type or None,
        "path": str(model.path),
        "parts": len(model.parts),
        "bytes": model.n_bytes,
        "context": context,
        "problem": shape if isinstance(shape, str) else None,
        "from": model.origin.value,
        "repo": model.repo or None,
        "sha256": model.stated_sha256 or None,
        "verified": model.is_verified,
        "last_used": datetime.fromtimestamp(used, UTC).isoformat() if used else None,
        "default": is_default,
    }
