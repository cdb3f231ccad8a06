"""The architectures that the program runs and converts, one in each module, found by being here."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from qwq_convert.architecture import Architecture


@cache
def architectures() -> tuple[Architecture, ...]:
    """Every architecture that has a module here, in the order of the modules' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(import_module(f"{__name__}.{name}").ARCHITECTURE for name in names)


def find_architecture(name: object) -> Architecture | None:
    """The architecture that a GGUF calls `name`, or None."""
    return next((each for each in architectures() if each.name == name), None)


def supported() -> str:
    """The names that GGUFs have for the architectures, as a message lists them."""
    return ", ".join(each.name for each in architectures())
