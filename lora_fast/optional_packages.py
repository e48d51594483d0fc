"""Packages that only some of what is here needs, and what to say where one of them is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

# What installs it, from a clone: an extra of pyproject.toml.
_EXTRAS = {"bitsandbytes": "qlora", "peft": "peft", "transformers": "train", "safetensors": "train"}


def needed(name: str, purpose: str) -> ModuleType:
    """The module `name`, imported now.

    Raises ImportError that names the package, what needs it and how to install it, if it is not
    there. One that is there and fails to import raises what it raises.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"{purpose} needs {package}, which is not installed: pip install {package} (or, from a "
            f"clone, pip install '.[{_EXTRAS[package]}]')",
            name=package,
        ) from error
