"""Packages that only some of what is here needs, and what to say where one of them is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

# What installs it, from a clone: an extra of pyproject.toml.
_EXTRAS = {"bitsandbytes": "qlora", "peft": "peft", "transformers": "train", "safetensors": "train"}


def absent_package(error: BaseException | None) -> str | None:
    """The package whose absence raised `error`, or led to it: transformers raises errors of its own
    from those of imports, without a name. None if none of them names one."""
    found = None
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            found = error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return found


class MissingPackageError(ImportError):
    """A package that is needed is not installed; the message says how to install it."""


def needed(name: str, purpose: str) -> ModuleType:
    """The module `name`, imported now.

    Raises MissingPackageError, an ImportError that names the package, what needs it and how to
    install it, if it is not there. One that is there and fails to import raises what it raises.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingPackageError(
            f"{purpose} needs {package}, which is not installed: pip install {package} (or, from a "
            f"clone, pip install '.[{_EXTRAS[package]}]')",
            name=package,
        ) from error
