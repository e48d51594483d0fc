"""How a module of experts stores them, read from its attributes: never from a model's name.

transformers decorates the modules that compute out_t = Σ_j w_tj · down_e(gate(gate_up_e(x_t))) with
``use_experts_implementation``, which sets flags on them: ``is_transposed`` ([E, K, N] instead of
[E, N, K]), ``has_bias``, ``has_gate`` (``gate_up_proj`` or ``up_proj``) and others. Their gate is
``_apply_gate``, which alone knows the order of its rows (halves, or interleaved).
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

from torch import nn

from .nf4_experts import NF4Experts
from .storage import packed_experts, packed_parameters, undecorated

_FLAGS = ("is_transposed", "has_bias", "has_gate")
# Implementations of the same equation that transformers itself has; None is eager.
_REPLACED = (None, "eager", "grouped_mm", "batched_mm")


class Layout(NamedTuple):
    """The names of the parameters of a module of experts, and how they are stored."""

    first: str
    second: str
    gated: bool
    transposed: bool
    bias: bool

    def parameters(self) -> tuple[str, ...]:
        biases = (f"{self.first}_bias", f"{self.second}_bias") if self.bias else ()
        return (self.first, self.second, *biases)


def layout_of(module: Any) -> tuple[Layout | None, str | None]:
    """The layout, or why a module does not compute that equation on parameters of its own."""
    shared = _shared_forward()
    if shared is None or getattr(undecorated(type(module).forward), "__code__", None) is not shared:
        # PyTorch gives a parametrized module a class of its own.
        kind = type(module).__name__.removeprefix("Parametrized")
        if all(p.dim() < 3 for p in module.parameters()) and not packed_parameters(module):
            return None, f"{kind} holds no experts"
        return None, f"{kind} is not decorated as transformers decorates experts"
    # A generator takes longer.
    if not all([isinstance(getattr(module, name, None), bool) for name in _FLAGS]):  # noqa: C419
        return None, "transformers without flags of the experts' layout"
    # Flags of later versions: before them there was nothing of the kind.
    if getattr(module, "has_post_expert_norm", False):
        return None, "norm of each expert's output"
    if getattr(module, "_is_expert_parallel", False):
        return None, "expert parallelism"
    implementation = getattr(module.config, "_experts_implementation", None)
    if implementation not in _REPLACED:
        return None, f"experts_implementation {implementation}"
    first = "gate_up_proj" if module.has_gate else "up_proj"
    layout = Layout(first, "down_proj", module.has_gate, module.is_transposed, module.has_bias)
    for name in layout.parameters():
        if module._parameters.get(name) is None and packed_experts(module, name) is None:
            # Asked for, it would be computed, with adapters in it.
            is_there = name in getattr(module, "parametrizations", ())
            return None, f"{name} is {'parametrized' if is_there else 'absent'}"
    return layout, None


def weight_of(module: Any, name: str, *, transposed: bool) -> Any:
    """W [E, N, K] of a parameter: a view of it, or :class:`NF4Experts`."""
    packed = packed_experts(module, name)
    if packed is not None:
        return NF4Experts(*packed, transposed)
    weight = module._parameters[name]
    return weight.transpose(1, 2) if transposed else weight


def _shared_forward() -> Any:
    """The code that is the forward of every decorated class; None if there is no such class."""
    decorate = getattr(_transformers_experts(), "use_experts_implementation", None)
    return None if decorate is None else _decorated_code(decorate)


def _transformers_experts() -> Any:
    # A decorated class has imported it.
    return sys.modules.get("transformers.integrations.moe")


@functools.cache
def _decorated_code(decorate: Any) -> Any:
    class Undecorated(nn.Module):
        def forward(self) -> None: ...

    return decorate(Undecorated).forward.__code__
