"""Computers that a TOML file describes, so that a user can make a plan before buying one.

The files are `profiles/machines/NAME.toml`, or `machines/NAME.toml` in the user's own profiles. Sizes are in
GiB. An unknown key is an error: a plan from half a description would look like a good plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
_REQUIRED = ("cores", "memory", "available")
_GPU_REQUIRED = ("name", "memory", "available")


def read_machine(wanted: str, folders: ProfileFolders) -> Machine:
    """The machine of that name, or of the file at that path when it ends in .toml.

    Raises ProfileError with the file, the key and the values it allows.
    """
    if wanted.lower().endswith(".toml"):
        path = Path(wanted)
    else:
        if not NAME_FORM.fullmatch(wanted):
            raise ProfileError(f"{excerpt(wanted)} is no machine's name. {_names_hint(wanted, folders)}")
        path = _find(wanted, folders)
    return _machine(path.stem, str(path), read_table(path, "machine"))


def machine_names(folders: ProfileFolders) -> list[str]:
    """The names of all described machines, sorted."""
    files = [*(folders.own / "machines").glob("*.toml"), *(folders.bundled / "machines").glob("*.toml")]
    return sorted({file.stem for file in files if NAME_FORM.fullmatch(file.stem)})


def _find(name: str, folders: ProfileFolders) -> Path:
    for folder in (folders.own, folders.bundled):
        path = folder / "machines" / f"{name}.toml"
        if path.is_file():
            return path
    raise ProfileError(f"there is no machine {excerpt(name)}. {_names_hint(name, folders)}")


def _names_hint(name: str, folders: ProfileFolders) -> str:
    names = machine_names(folders)
    near = nearest(name, names)
    hint = f"Did you mean {near}?" if near else f"There are {', '.join(names)}."
    return f"{hint} A file of your own is named by its path, ending in .toml."


def _machine(name: str, source: str, table: dict[str, object]) -> Machine:
    gpus = table.pop("gpu", [])
    if not isinstance(gpus, list) or len(gpus) > MAX_GPUS:
        raise ProfileError(f"{source}: gpu is {excerpt(gpus)}, allowed: up to {MAX_GPUS} tables [[gpu]].")
    values = _accepted(table, _RULES, _REQUIRED, source)
    devices = []
    for index, gpu in enumerate(gpus):
        where = f"{source}: gpu {index + 1}"
        if not isinstance(gpu, dict):
            raise ProfileError(f"{where} is {excerpt(gpu)}, allowed: a table [[gpu]].")
        devices.append(_gpu(index, _accepted(gpu, _GPU_RULES, _GPU_REQUIRED, where), where))
    memory, available = _bytes(values, "memory"), _bytes(values, "available")
    if available > memory:
        raise ProfileError(f"{source}: available is more than memory. It is what is left beside the system.")
    return Machine(
        name=name,
        gpus=tuple(devices),
        memory_bytes=memory,
        available_bytes=available,
        cores=int(str(values["cores"])),
        is_unified=bool(values.get("unified", False)),
        is_described=True,
    )


def _gpu(index: int, values: Mapping[str, object], where: str) -> Device:
    total, free = _bytes(values, "memory"), _bytes(values, "available")
    if free > total:
        raise ProfileError(f"{where}: available is more than memory. It is what the driver leaves free.")
    return Device(f"GPU{index}", str(values["name"]), DeviceKind.GPU, free, total)


def _bytes(values: Mapping[str, object], key: str) -> int:
    return int(float(str(values[key])) * GIB)


def _accepted(
    table: Mapping[str, object], rules: Mapping[str, Rule], required: tuple[str, ...], source: str
) -> dict[str, object]:
    values = {}
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
    if missing := [key for key in required if key not in values]:
        raise ProfileError(f"{source}: {', '.join(missing)} must be there.")
    return values
