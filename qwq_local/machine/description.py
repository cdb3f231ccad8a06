"""Computers that a TOML file describes, so that a user can make a plan before buying one.

The files are `profiles/machines/NAME.toml`, or `machines/NAME.toml` in the user's own profiles. Sizes are in
GiB. An unknown key is an error: a plan from half a description would look like a good plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwq_local.errors import ProfileError
from qwq_local.planning.memory import Device, DeviceKind, Machine
from qwq_local.profiles.keys import excerpt, nearest
from qwq_local.profiles.layers import NAME_FORM, ProfileFolders, read_table
from qwq_local.settings import Rule, free_text, number, switch
from qwq_local.text import GIB

MAX_GPUS = 16
_MEMORY = number(0, 4096, above_low=True)
_RULES: Mapping[str, Rule] = {
    "description": free_text(),
    "cores": number(1, 4096, whole=True),
    "memory": _MEMORY,  # of the system, as sold
    "available": _MEMORY,  # what programs can use of it
    "unified": switch(),  # the GPU uses the same memory
}
_GPU_RULES: Mapping[str, Rule] = {"name": free_text(), "memory": _MEMORY, "available": _MEMORY}
_OPTIONAL = ("description", "unified")


def read_machine(wanted: str, folders: ProfileFolders) -> Machine:
    """The machine of that name, or of the file at that path when it ends in .toml.

    Raises ProfileError with the file, the key and the values it allows.
    """
    if wanted.lower().endswith(".toml"):
        path = Path(wanted)
    else:
        files = [folder / "machines" / f"{wanted}.toml" for folder in (folders.own, folders.bundled)]
        is_name = NAME_FORM.fullmatch(wanted) is not None
        found = next((file for file in files if is_name and file.is_file()), None)
        if found is None:
            names = machine_names(folders)
            near = nearest(wanted, names)
            hint = f"Did you mean {near}?" if near else f"There are {', '.join(names)}."
            shown = excerpt(wanted)
            problem = f"there is no machine {shown}." if is_name else f"{shown} is no machine's name."
            raise ProfileError(f"{problem} {hint} A file of your own is named by its path, ending in .toml.")
        path = found
    return _machine(path.stem, str(path), read_table(path, "machine"))


def machine_names(folders: ProfileFolders) -> list[str]:
    """The names of all described machines, sorted."""
    files = [*(folders.own / "machines").glob("*.toml"), *(folders.bundled / "machines").glob("*.toml")]
    return sorted({file.stem for file in files if NAME_FORM.fullmatch(file.stem)})


def _machine(name: str, source: str, table: dict[str, object]) -> Machine:
    gpus = table.pop("gpu", [])
    if not isinstance(gpus, list) or len(gpus) > MAX_GPUS:
        raise ProfileError(f"{source}: gpu is {excerpt(gpus)}, allowed: up to {MAX_GPUS} tables [[gpu]].")
    values = _accepted(table, _RULES, source, "It is what is left beside the system.")
    devices = []
    for index, gpu in enumerate(gpus):
        where = f"{source}: gpu {index + 1}"
        if not isinstance(gpu, dict):
            raise ProfileError(f"{where} is {excerpt(gpu)}, allowed: a table [[gpu]].")
        card = _accepted(gpu, _GPU_RULES, where, "It is what the driver leaves free.")
        free, total = _bytes(card["available"]), _bytes(card["memory"])
        devices.append(Device(f"GPU{index}", card["name"], DeviceKind.GPU, free, total))
    return Machine(
        name=name,
        gpus=tuple(devices),
        memory_bytes=_bytes(values["memory"]),
        available_bytes=_bytes(values["available"]),
        cores=values["cores"],
        is_unified=values.get("unified", False),
        is_described=True,
    )


def _bytes(gib: float) -> int:
    return int(gib * GIB)


def _accepted(
    table: Mapping[str, object], rules: Mapping[str, Rule], source: str, available: str
) -> dict[str, Any]:
    """The checked values. `available` says in an error what that key means."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in rules:
            near = nearest(key, rules)
            hint = f"Did you mean {near}?" if near else f"There are {', '.join(rules)}."
            raise ProfileError(f"{source}: there is no key {excerpt(key)}. {hint}")
        try:
            values[key] = rules[key].accept(value)
        except ValueError:
            raise ProfileError(
                f"{source}: {key} is {excerpt(value)}, allowed: {rules[key].allowed}."
            ) from None
    if missing := [key for key in rules if key not in (*values, *_OPTIONAL)]:
        raise ProfileError(f"{source}: {', '.join(missing)} must be there.")
    if values["available"] > values["memory"]:
        raise ProfileError(f"{source}: available is more than memory. {available}")
    return values
