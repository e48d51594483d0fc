"""Features of the installed versions: every decision that depends on a version is made here.

:data:`FEATURES` need more than the lower bounds of pyproject.toml. With less a feature is off,
``lora-fast doctor`` and :func:`lora_fast.report` say why, and everything else works. The kernels
have a range of their own, which they check when one is imported: ``kernels/triton_version.py``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import four_bit


@dataclass(frozen=True)
class Feature:
    """A feature that needs a version of a package, and how to do without it."""

    name: str
    package: str
    needs: tuple[int, ...]
    reason: str
    # Whether the report on a model has to mention it.
    concerns: Callable[[nn.Module], bool]

    def is_on(self) -> bool:
        """True if the package is absent, too: then nothing would use the feature."""
        found = installed(self.package)
        return found is None or found >= self.needs

    def obstacle(self) -> str | None:
        """Why it is off, in a line; None if it is on."""
        if self.is_on():
            return None
        version = _version(self.package)
        needs = ".".join(map(str, self.needs))
        return f"{self.name}: needs {self.package} {needs}, got {version}: {self.reason}"


def installed(package: str) -> tuple[int, ...] | None:
    """The version of an installed distribution as numbers, None for one that is absent."""
    try:
        return _numbers(_version(package))
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _version(package: str) -> str:
    """Read once: that takes 0.4 ms, and calls of layers ask. One that is absent is not cached."""
    return importlib.metadata.version(package)


@functools.cache
def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _is_stored_as_integers(model: nn.Module) -> bool:
    weights: list[Any] = [m.weight for m in model.modules() if four_bit.is_four_bit(m)]
    return any(not weight.is_floating_point() for weight in weights)


def _adapts_parameters(model: nn.Module) -> bool:
    return any(hasattr(module, "parameter_name") for module in model.modules())


SHARDED_INTEGERS = Feature(
    "FSDP2 over 4-bit weights that are stored as integers",
    "torch",
    (2, 12),
    "its fully_shard takes floating-point parameters alone; quantise with quant_storage="
    "torch.bfloat16 (bnb_4bit_quant_storage in transformers)",
    _is_stored_as_integers,
)
EQUAL_ABSMAX = Feature(
    "double quantisation of a weight on a CPU whose blocks have one and the same absmax",
    "bitsandbytes",
    (0, 49),
    "bitsandbytes ends the process there",
    lambda model: False,  # Only quantising fails: a quantised weight is fine.
)
EXPERTS_OF_PEFT = Feature(
    "LoRA on the experts of a mixture in one operation",
    "peft",
    (0, 19, 1),
    "before, lora_A and lora_B of target_parameters swap roles; PEFT's own path runs",
    _adapts_parameters,
)
FEATURES = (SHARDED_INTEGERS, EQUAL_ABSMAX, EXPERTS_OF_PEFT)


def switched_off(model: nn.Module | None = None) -> tuple[str, ...]:
    """Why features are off: of those that concern `model`, or of all."""
    found = (f.obstacle() for f in FEATURES if model is None or f.concerns(model))
    return tuple(filter(None, found))


# Between a load from tensor memory (tcgen05.ld) and tcgen05.wait::ld its registers are undefined.
# Triton 3.9.0 converts and stores the low-rank product in between: seen in its PTX for sm_100.
MISCOMPILED = "Triton 3.9 miscompiles the kernels for compute capability 10"


def is_miscompiled(major: int) -> bool:
    """Whether the installed Triton gets the kernels wrong for a major compute capability."""
    return major == 10 and (installed("triton") or ()) >= (3, 9)


def is_exporting() -> bool:
    """``torch.compiler.is_exporting()``, which is true in all that Dynamo traces before 2.12."""
    return torch.compiler._is_exporting_flag
