"""The errors that a user can act on, and the exit status of each.

A message says what happened, with numbers, then what to do. Only the command line catches these.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitStatus(IntEnum):
    """The exit statuses of `qwq`, the same for every command."""

    ANSWERED = 0
    FAILED = 1
    USAGE = 2
    NO_MODEL = 3
    NO_MEMORY = 4
    PROMPT_TOO_LONG = 5
    CUT = 6
    NO_ANSWER = 7
    INTERRUPTED = 130
    READER_GONE = 141


class QwqError(Exception):
    """An error that the user can act on; its text is one line for the screen."""

    exit_status: ClassVar[ExitStatus] = ExitStatus.FAILED


class UsageError(QwqError):
    """Wrong usage, or input that cannot be read."""

    exit_status = ExitStatus.USAGE


class ProfileError(UsageError):
    """A profile, an environment variable or a flag with an unknown key or a value of the wrong type."""


class ConstraintError(UsageError):
    """A JSON schema, regular expression or grammar that is not one, or that cannot be enforced."""


class ModelNotFound(QwqError):
    """No model of that name on this machine."""

    exit_status = ExitStatus.NO_MODEL


class DoesNotFit(QwqError):
    """There is not enough memory for weights, KV cache and compute buffers."""

    exit_status = ExitStatus.NO_MEMORY


class PromptTooLong(QwqError):
    """The prompt has more tokens than the context holds."""

    exit_status = ExitStatus.PROMPT_TOO_LONG


class ModelFileError(QwqError):
    """A model file that is damaged, is not a GGUF, or has an unsupported architecture."""


class TemplateError(QwqError):
    """A chat template in no known form, or a vocabulary without the control tokens of its form."""


class PullError(QwqError):
    """A download that stopped; the message says what was kept and what to do."""


class EngineError(QwqError):
    """llama.cpp failed, or is not the version that this program was tested with."""


class HistoryError(QwqError):
    """A history that cannot be opened or written, or a conversation that is not in it."""


class ConvertError(QwqError):
    """A checkpoint that cannot be converted; the message names the file and what to do."""


class AbortFlag:
    """Set from a signal handler or another thread; whatever runs stops at its next check."""

    __slots__ = ("_set",)

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Ask for a stop."""
        self._set = True

    def clear(self) -> None:
        """Forget an earlier request."""
        self._set = False

    def __bool__(self) -> bool:
        return self._set


class Aborted(Exception):
    """The abort flag was set while something ran; what it used can be used again."""
