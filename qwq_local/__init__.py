"""Run QwQ-32B on your own computer: models, planning, engine, dialogue, terminal, command line.

The public Python API is what `__all__` names, with the modules `events` and `errors`: see docs/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.2.0.dev0"
__all__ = ["IncompleteAnswer", "Message", "Model", "Role", "open"]

if TYPE_CHECKING:
    from qwq_local.api import IncompleteAnswer, Message, Model, Role, open
else:

    def __getattr__(name: str) -> object:
        """Import the API when it is used: the command line starts without it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from qwq_local import api

        return getattr(api, name)
