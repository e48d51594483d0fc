"""The state of PEFT's wrappers around a module of experts at a call, and the operands made of it.

PEFT nests a ``ParamWrapper`` for each parameter; its lora_A [E · r, K] has the experts slowest, its
lora_B [N, r · E] the experts fastest.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.torch_gates import Gate, GluGate, OwnGate
from ..backends.torch_layer import joined
from ..base_layer.obstacles import module_obstacle, tensor_obstacle
from ..experts.module_layout import Layout, layout_of, weight_of
from ..experts.nf4_experts import NF4Experts
from ..experts.operands import Projection
from .expert_gates import form_of

_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExpertsState(NamedTuple):
    """A module of experts, and its projections with the adapters that take part in a call."""

    module: Any
    first: Projection
    second: Projection
    gate: Gate
    dtype: torch.dtype


def read_experts(wrappers: list[Any], module: Any) -> tuple[ExpertsState | None, str | None]:
    """The state of nested wrappers, the outermost first, or why PEFT's forward must run."""
    layout, found = layout_of(module)
    if layout is None:
        return None, found
    found = module_obstacle(module, "experts module", type(module)) or _gate_obstacle(
        module, layout
    )
    factors: dict[str, tuple[Tensor, Tensor, float]] = {}
    for wrapper in wrappers:
        if found is None and wrapper.disable_adapters:
            found = "adapters disabled"
        if found is None:
            found = _wrapper_obstacle(wrapper, layout)
        if found is not None:
            return None, found
        if not wrapper.merged:
            adapters, found = _adapters(wrapper)
            if found is not None:
                return None, found
            if adapters:
                factors[wrapper.parameter_name] = _stacked(adapters)
    if not factors:
        return None, "merged" if any(w.merged for w in wrappers) else "no active adapter"
    first, second = (_projection(module, name, layout, factors) for name in layout[:2])
    found = _weight_obstacle(first) or _weight_obstacle(second)
    if found is None and _dtype(first.weight) != _dtype(second.weight):
        found = "experts differ in dtype"
    if found is not None:
        return None, found
    return ExpertsState(module, first, second, _gate(module), _dtype(first.weight)), None


def _wrapper_obstacle(wrapper: Any, layout: Layout) -> str | None:
    if wrapper.parameter_name not in layout[:2]:
        return f"adapter of {wrapper.parameter_name}"
    if wrapper.num_experts < 2:
        return "a single expert"
    if wrapper._did_swap_in_out_features is layout.transposed:
        return "roles of lora_A and lora_B"
    return None


def _adapters(wrapper: Any) -> tuple[list[tuple[Tensor, Tensor, Any]], str | None]:
    """A [E, r, K], B [E, N, r] and s of every active adapter of a wrapper."""
    adapters: list[tuple[Tensor, Tensor, Any]] = []
    E = wrapper.num_experts
    for name in wrapper.active_adapters:
        if name not in wrapper.lora_A:
            continue
        A, B, scaling = wrapper.lora_A[name], wrapper.lora_B[name], wrapper.scaling[name]
        found = module_obstacle(A, "lora_A", nn.Linear) or module_obstacle(B, "lora_B", nn.Linear)
        found = found or tensor_obstacle(A.weight, "lora_A") or tensor_obstacle(B.weight, "lora_B")
        if found is None and (A.bias is not None or B.bias is not None):
            found = "bias of lora_A or lora_B"
        if found is None and isinstance(scaling, Tensor) and scaling.requires_grad:
            found = "scaling requires a gradient"
        if found is None and not isinstance(scaling, Tensor) and not math.isfinite(scaling):
            found = "scaling is not finite"
        if found is not None:
            return [], found
        a, b = A.weight, B.weight
        if a.dtype not in _COMPUTE_DTYPES or b.dtype not in _COMPUTE_DTYPES:
            return [], f"dtype {str(a.dtype).removeprefix('torch.')}"
        if a.shape[0] % E or b.shape[1] != a.shape[0]:
            return [], "shapes of lora_A and lora_B"
        of_experts = a.reshape(E, -1, a.shape[1]), b.reshape(b.shape[0], -1, E).permute(2, 0, 1)
        adapters.append((*of_experts, scaling))
    return adapters, None


def _stacked(adapters: list[tuple[Tensor, Tensor, Any]]) -> tuple[Tensor, Tensor, float]:
    """A [E, Σr, K], B [E, N, Σr] and one scaling with s B A = Σ sᵢ Bᵢ Aᵢ."""
    if len(adapters) == 1 and not isinstance(adapters[0][2], Tensor):
        return adapters[0]
    A = joined([a for a, _, _ in adapters], dim=1)
    return A, joined([b.float() * s for _, b, s in adapters], dim=2), 1.0


def _projection(
    module: Any, name: str, layout: Layout, factors: dict[str, tuple[Tensor, Tensor, float]]
) -> Projection:
    A, B, scaling = factors.get(name, (None, None, 1.0))
    bias = module._parameters[f"{name}_bias"] if layout.bias else None
    weight = weight_of(module, name, transposed=layout.transposed)
    return Projection(weight, bias, A, B, scaling)


def _weight_obstacle(projection: Projection) -> str | None:
    weight, bias, A, B, _ = projection
    if isinstance(weight, Tensor):
        # A view by now, and of the parameter's kind.
        found = tensor_obstacle(weight, "experts")
        if found is None and weight.requires_grad:
            found = "experts' weights train"
        if found is not None:
            return found
    elif weight.packed.is_meta:
        return "experts are on the meta device"
    if bias is not None and (found := tensor_obstacle(bias, "bias")) is not None:
        return found
    if _dtype(weight) not in _COMPUTE_DTYPES:
        return f"dtype {str(_dtype(weight)).removeprefix('torch.')}"
    if len(weight.shape) != 3 or 0 in weight.shape:
        return "shape of the experts' weights"
    E, N, K = weight.shape
    if A is not None and B is not None:
        if A.shape != (E, A.shape[1], K) or B.shape != (E, N, A.shape[1]):
            return "shapes of lora_A and lora_B"
        if A.device != weight.device or B.device != weight.device:
            return "tensors on different devices"
    return None


def _dtype(weight: Tensor | NF4Experts) -> torch.dtype:
    return weight.dtype


def _gate_obstacle(module: Any, layout: Layout) -> str | None:
    """Why the gate cannot run once more in backward: hooks, or parameters that train."""
    own = set(layout.parameters())
    for name, parameter in module.named_parameters():
        root = name.removeprefix("parametrizations.").partition(".")[0]
        if parameter.requires_grad and root not in own:
            return f"{name} trains"
    act = module._modules.get("act_fn")
    return None if act is None else module_obstacle(act, "act_fn", type(act))


def _gate(module: Any) -> Gate:
    if not module.has_gate:
        return OwnGate(module.act_fn)
    form = form_of(module)
    return OwnGate(module._apply_gate) if form is None else GluGate(form)
