"""The experts of a mixture: weights that are parameters of their module, not layers.

``--quantize nf4`` applies to them as it does to linear layers, ``--target-modules`` does not;
:func:`about_experts` says what happens to the experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Experts:
    """``weights``: their frozen parameters, in ``modules`` modules; ``trained``: the number of
    parameters that PEFT's wrappers around them train."""

    weights: tuple[Tensor, ...]
    modules: int
    trained: int

    @property
    def in_four_bits(self) -> set[int]:
        """The ids of the weights that quantising the model quantises: not of biases."""
        return {id(weight) for weight in self.weights if weight.dim() == 3}


def experts_of(modules: Iterable[nn.Module], adapted: Any) -> Experts | None:
    """The expert `modules` of the base as they are in the model that trains; None without any."""
    modules = list(modules)
    if not modules:
        return None
    weights = tuple(p for module in modules for p in module.parameters(recurse=False))
    wrappers = [m for m in adapted.modules() if type(m).__name__ == "ParamWrapper"]
    factors = {id(p): p for m in wrappers for n, p in m.named_parameters() if "lora_" in n}
    trained = sum(p.numel() for p in factors.values() if p.requires_grad)
    return Experts(weights, len(modules), trained)


def about_experts(experts: Experts, dtype: str, *, quantised: bool) -> str:
    """One line: the number of parameters, and the settings that do not apply to them."""
    size = sum(w.numel() for w in experts.weights) / 1e9
    line = f"experts: {size:.3g}B parameters in {experts.modules} modules, no linear layers; "
    line += f"in {'nf4' if quantised else dtype}, "
    if experts.trained:
        return line + f"and LoRA trains {experts.trained / 1e6:.4g}M parameters on them"
    return line + "and are not adapted"
