"""Optional packages, and the error if one of them is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

# The extra of pyproject.toml that installs it from a clone.
_EXTRAS = {"bitsandbytes": "qlora", "peft": "peft", "transformers": "train", "safetensors": "train"}


def absent_package(error: BaseException | None) -> str | None:
    """The package whose absence caused `error`, directly or through transformers, which raises its
    own errors from those of imports, without a name. None if no error in the chain names one."""
    found = None
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            found = error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return found


class MissingPackageError(ImportError):
    """A required package is not installed; the message says how to install it."""


def needed(name: str, purpose: str) -> ModuleType:
    """The module `name`, imported now.

    Raises MissingPackageError, an ImportError that names the package, what needs it and how to
    install it, if it is not installed. Errors of a package that fails to import pass through.
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
