"""PEFT's wrappers around the parameters of experts (``target_parameters``).

The outermost of nested wrappers computes the whole block of experts, whatever is between the
projections, with the low rank kept apart (:mod:`lora_fast.backends.torch_experts`). PEFT's forward
registers W + s·B A of all experts as a parametrization instead.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..backends import torch_experts
from ..backends.selection import experts_for
from ..base_layer.obstacles import (
    environment_obstacle,
    is_eager,
    module_obstacle,
    tensor_obstacle,
)
from ..experts.nf4_experts import NF4Experts
from ..features import EXPERTS_OF_PEFT, is_exporting
from ..operation import expert_layers
from .expert_merging import is_packed, merge_packed, unmerge_packed
from .expert_state import ExpertsState, read_experts
from .fused_forward import FusedForward

# PEFT has it from 0.17 on.
ParamWrapper: Any = getattr(peft_layer, "ParamWrapper", None) or type(
    "ParamWrapper", (nn.Module,), {"__module__": __name__}
)


class FusedParamWrapper(FusedForward, ParamWrapper):
    """``peft.tuners.lora.layer.ParamWrapper`` on the fused path."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() and not is_exporting():
            # Experts are chosen by values: a graph ends here.
            return _outside_of_graphs(self, x, *args, **kwargs)
        return self.called(x, *args, **kwargs)

    def called(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state: Any = None
        kind, found = type(self), None
        is_stock = kind._lora_fast_stock.forward is kind._lora_fast_stock_forward
        if not (is_stock and is_eager()):
            found = environment_obstacle() or self.replaced_forward()
        if found is None:
            state, found = self.active()
        if found is None and (kwargs or len(args) != 2):
            found = "extra arguments"
        if found is None:
            found = _input_obstacle(state, x, *args)
        if found is not None:
            self._lora_fast_calls.add_fallback(found)
            return ParamWrapper.forward(self, x, *args, **kwargs)
        y = _output(state, x, *args)
        for wrapper in _nested(self)[0]:
            wrapper._lora_fast_calls.add_fused()
        return y

    def active(self, **kwargs: Any) -> tuple[ExpertsState | None, str | None]:
        if not EXPERTS_OF_PEFT.is_on():
            return None, EXPERTS_OF_PEFT.obstacle()
        wrappers, module = _nested(self)
        for inner in wrappers[1:]:
            found = module_obstacle(inner, "inner wrapper", FusedParamWrapper)
            if found is not None:
                return None, found
        return read_experts(wrappers, module)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not is_packed(self):
            super().merge(safe_merge, adapter_names)
            return
        layer: Any = self
        names = [n for n in check_adapters_to_merge(layer, adapter_names) if n in layer.lora_A]
        if names:
            merge_packed(layer, names)
            layer.merged_adapters.extend(names)

    def unmerge(self) -> None:
        layer: Any = self
        if not layer.merged or not is_packed(layer):
            super().unmerge()
            return
        unmerge_packed(layer)
        layer.merged_adapters.clear()


# PEFT knows its wrappers by this name, when it adds an adapter.
FusedParamWrapper.__name__ = "ParamWrapper"

FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {ParamWrapper: FusedParamWrapper}


def _nested(wrapper: Any) -> tuple[list[Any], Any]:
    """Nested wrappers, the outermost first, and the module of experts in them."""
    wrappers, module = [wrapper], wrapper._modules["base_layer"]
    while isinstance(module, ParamWrapper):
        wrappers.append(module)
        module = module._modules["base_layer"]
    return wrappers, module


_outside_of_graphs: Any = torch.compiler.disable(FusedParamWrapper.called)


def _input_obstacle(state: ExpertsState, x: Any, top_k_index: Any, w: Any) -> str | None:
    for tensor, role in ((x, "x"), (top_k_index, "top_k_index"), (w, "top_k_weights")):
        if not isinstance(tensor, Tensor):
            return f"{role} is {type(tensor).__name__}"
        found = tensor_obstacle(tensor, role)
        if found is not None:
            return found
        if tensor.dim() != 2:
            return f"shape of {role}"
        if tensor.device != state.first.weight.device:
            return "tensors on different devices"
    if top_k_index.shape != w.shape or x.shape[1] != state.first.weight.shape[2]:
        return "shape of x"
    if x.shape[0] != w.shape[0] or top_k_index.is_floating_point():
        return "shape of top_k_index"
    if not torch.is_autocast_enabled(x.device.type) and x.dtype != state.dtype:
        return "x and experts differ in dtype"
    packed = isinstance(state.first.weight, NF4Experts)
    if x.is_cuda and not packed and not _are_launched_together(state, x):
        # One expert after the other has too many launches; PEFT's products are grouped.
        return "experts of these shapes or this dtype, on a GPU without kernels"
    return None


def _are_launched_together(state: ExpertsState, x: Tensor) -> bool:
    computed = x.new_empty(0, dtype=_compute_dtype(state, x))
    return experts_for(computed, state.first, state.second) is not torch_experts


def _output(state: ExpertsState, x: Tensor, top_k_index: Tensor, w: Tensor) -> Tensor:
    """out [T, H] in the dtype of x."""
    dtype = _compute_dtype(state, x)
    return expert_layers.block(
        x.to(dtype), top_k_index, w, state.first, state.second, state.gate, complete=True
    ).to(x.dtype)


def _compute_dtype(state: ExpertsState, x: Tensor) -> torch.dtype:
    """The dtype in which stock computes: under autocast, which does not know grouped products,
    these take x in the dtype of W."""
    implementation = state.module.config._experts_implementation
    if torch.is_autocast_enabled(x.device.type) and implementation != "grouped_mm":
        return torch.get_autocast_dtype(x.device.type)
    return state.dtype
