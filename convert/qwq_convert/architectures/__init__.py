"""The architectures that can be converted: each module here is one, and is found by being here."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module

from qwq_convert.architecture import Architecture
from qwq_convert.strict_json import Fields, shown


@cache
def architectures() -> tuple[Architecture, ...]:
    """Every architecture that has a module here, by the module's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(import_module(f"{__name__}.{name}").ARCHITECTURE for name in names)


def find_architecture(config: Fields) -> Architecture:
    """The architecture that config.json names; ConvertError when it is not one of these."""
    found = config.items("architectures")
    by_class_name = {architecture.class_name: architecture for architecture in architectures()}
    match found:
        case [str() as class_name] if class_name in by_class_name:
            return by_class_name[class_name]
        case [other]:
            text = shown(other)
        case _:
            text = shown(found)
    return config.fail(
        f"architecture {text} is not supported, only {', '.join(by_class_name)} (QwQ-32B's) is."
    )
