"""PEFT's LoRA layers: LoRA, rsLoRA, LoRA-FA, DoRA, batches with an adapter for each sample.

LoRA   y = x Wᵀ + Σᵢ sᵢ · (drop(x) Aᵢᵀ) Bᵢᵀ + bias + Σᵢ sᵢ · biasᵢ     (i: active adapters)
DoRA   y = x Wᵀ + (g − 1) ⊙ (x̃ Wᵀ) + g ⊙ s · (x̃ Aᵀ) Bᵀ + bias          g = m / ‖W + s B A‖

with x̃ = drop(x): PEFT drops the input of everything that m scales. Without dropout
y = g ⊙ V + bias.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..base_layer.linear import adapted, four_bit_dtype, weight_of, weight_shape
from ..base_layer.obstacles import base_obstacle, call_obstacle
from ..base_layer.row_norms import row_norms
from ..factors import Constants, Factors
from ..four_bit import is_four_bit
from ..gated_mlps.operands import Operand
from .four_bit_classes import LoRALinear4bit
from .fused_forward import FusedForward
from .lora_merging import merge_terms, plain_terms, unmerge_terms
from .lora_state import (
    Adapter,
    State,
    cast_obstacle,
    is_plain,
    lora_factors,
    masks_rows,
    member_of,
    opaque_obstacle,
    read_adapters,
    samples_obstacle,
    together_obstacle,
)
from .opaque_layers import opaque_input_obstacle, opaque_output
from .plain_groups import plain_output_in_group
from .plain_lora import geometry_if_fitting, plain_output, read_plain
from .shared_input import kept_output, output_with_siblings

# Keyword arguments of a variant; PEFT removes them from the call and plain LoRA ignores them.
_VARIANT_ARGUMENTS = frozenset(getattr(peft_layer, "VARIANT_KWARG_KEYS", ()))


class FusedLoRALayer(FusedForward):
    """The fused forward of ``lora.Linear`` and ``lora.bnb.Linear4bit``."""

    _cast_input_dtype: ClassVar[Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kind = type(self)
        is_stock = (
            kind._lora_fast_stock.forward is kind._lora_fast_stock_forward
            and kind._cast_input_dtype is kind._lora_fast_stock_cast
        )
        if is_stock and not args and not kwargs:
            grouped = self._lora_fast_group is not None
            y = plain_output_in_group(self, x) if grouped else plain_output(self, x)
            if y is not None:
                self._lora_fast_calls.fused += 1
                return y
        return super().forward(x, *args, **kwargs)

    def active(self, **kwargs: Any) -> tuple[State, str | None]:
        layer: Any = self
        base, names = layer.base_layer, kwargs.get("adapter_names")  # type: Any, Any
        mixed = names is not None
        wanted = dict.fromkeys(names) if mixed else layer.active_adapters
        adapters, found = read_adapters(layer, wanted)
        opaque = base_obstacle(base, takes_conv1d=True) if found is None else None
        offsets = kwargs.get("alora_offsets")
        state = State(base, adapters, list(names) if mixed else None, opaque, offsets)
        if opaque is not None:
            found = opaque_obstacle(state)
        several = len(adapters) > 1 and (opaque is None or masks_rows(state))
        if found is None and (mixed or several):
            found = together_obstacle(adapters, mixed=mixed)
        return state, found

    def arguments_obstacle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if args or not _VARIANT_ARGUMENTS.issuperset(kwargs.keys() - {"adapter_names"}):
            return "extra arguments"
        return None

    def input_obstacle(self, state: State, x: Any) -> str | None:
        base = state.base
        if state.opaque is not None:
            found = opaque_input_obstacle(self, state, x)
            return found or self._autocast_obstacle(x)
        factors: list[Tensor | None] = []
        for adapter in state.adapters:
            factors += (adapter.A, adapter.B, adapter.bias, adapter.magnitude, adapter.d)
        found = call_obstacle(base, x, *factors)
        if found is not None:
            return found
        N, K = weight_shape(base)
        for adapter in state.adapters:
            if adapter.A.shape[1] != K or adapter.B.shape != (N, adapter.A.shape[0]):
                return "shapes of lora_A and lora_B"
            if adapter.magnitude is not None and adapter.magnitude.shape != (N,):
                return "shape of lora_magnitude_vector"
        found = samples_obstacle(state, x) or self._autocast_obstacle(x)
        if found is not None or torch.is_autocast_enabled(x.device.type):
            return found
        return cast_obstacle(self, state.adapters, x)

    def _autocast_obstacle(self, x: Tensor) -> str | None:
        four_bit = isinstance(self, LoRALinear4bit)
        if four_bit and torch.is_autocast_enabled() and x.device.type != "cuda":
            return "CUDA autocast off CUDA"
        return None

    def fused(self, state: State, x: Tensor) -> Tensor:
        if state.opaque is not None:
            return opaque_output(state, x, promotes=isinstance(self, LoRALinear4bit))
        first = state.adapters[0]
        if first.magnitude is not None:
            y = _dora(self, first, x)
        else:
            shared = output_with_siblings(self, state, x)
            y = adapted(state.base, x, **lora_factors(state, x)) if shared is None else shared
        return y.to(_result_dtype(self, y))

    def operand(self, x: Tensor, casts: torch.dtype | None) -> Operand | str:
        """The layer as a part of the operation of a gated MLP, for an input like x; `casts` is the
        dtype of autocast. The reason why its own forward must run, if it must."""
        kind = type(self)
        if (
            kind._lora_fast_stock.forward is not kind._lora_fast_stock_forward
            or kind._cast_input_dtype is not kind._lora_fast_stock_cast
        ):
            return self.replaced_forward() or ""
        plain = read_plain(self) if type(x) is Tensor else None
        if (
            plain is not None
            and not getattr(plain.factors.weight, "requires_grad", False)
            and geometry_if_fitting(self, x, (plain.factors,), plain.dtype, casts) is not None
        ):
            computes = casts or plain.dtype or x.dtype
            returns = computes if plain.dtype is None else _widened(x, casts)
            return Operand(plain.factors, computes, returns)
        state, found = self.active()
        if found is None and not is_plain(state):
            found = state.opaque or "more than plain LoRA"
        found = found or self.input_obstacle(state, x)
        if found is not None:
            return found
        member, p = member_of(state), state.adapters[0].dropout_p
        constants = Constants(member.scaling, p)
        factors = Factors(*member[:4], constants=constants)
        if not is_four_bit(state.base):
            return Operand(factors, casts or x.dtype, casts or x.dtype)
        return Operand(factors, casts or four_bit_dtype(state.base, x), _widened(x, casts))

    kept = kept_output

    def result(self, y: Tensor) -> Tensor:
        """y in the dtype that the layer returns."""
        return y.to(_result_dtype(self, y))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        layer: Any = self
        names = check_adapters_to_merge(layer, adapter_names)
        terms = None if safe_merge else plain_terms(layer, names)
        if terms is None:
            super().merge(safe_merge, adapter_names)
        elif terms:
            merge_terms(layer, terms)
            layer.merged_adapters.extend(name for name in names if name in layer.lora_A)

    def unmerge(self) -> None:
        layer: Any = self
        terms = plain_terms(layer, layer.merged_adapters) if layer.merged else None
        if terms is None:
            super().unmerge()
            return
        unmerge_terms(layer, terms)
        layer.merged_adapters.clear()


class FusedLinear(FusedLoRALayer, lora.Linear):
    """``peft.tuners.lora.Linear`` on the fused path."""


class FusedLinear4bit(FusedLoRALayer, LoRALinear4bit):
    """``peft.tuners.lora.bnb.Linear4bit`` on the fused path."""


FUSED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    lora.Linear: FusedLinear,
    LoRALinear4bit: FusedLinear4bit,
}


def _dora(layer: Any, adapter: Adapter, x: Tensor) -> Tensor:
    """PEFT also drops x before the base product, but only for the part that m scales."""
    assert adapter.magnitude is not None
    base = layer.base_layer
    g = adapter.magnitude / row_norms(weight_of(base), adapter.A, adapter.B, adapter.scaling)
    factors: dict[str, Any] = {"A": adapter.A, "B": adapter.B, "scaling": adapter.scaling, "g": g}
    if adapter.dropout_p == 0.0:
        return adapted(base, x, bias=base.bias, **factors)
    # The same numbers as PEFT's dropout draws, without a second copy of x in float32.
    keep = adapter.dropout(torch.ones_like(x, dtype=adapter.A.dtype)).to(x.dtype)
    dropped = x * keep
    return adapted(base, dropped, bias=base.bias, **factors) + adapted(base, x - dropped, bias=None)


def _widened(x: Tensor, casts: torch.dtype | None) -> torch.dtype:
    """The dtype in which a 4-bit layer returns its output."""
    return x.dtype if casts is None or not x.is_cuda else torch.promote_types(x.dtype, casts)


def _result_dtype(layer: Any, y: Tensor) -> torch.dtype:
    """lora.Linear returns the base layer's dtype; lora.Linear4bit promotes under CUDA autocast."""
    if torch.is_autocast_enabled() and isinstance(layer, LoRALinear4bit):
        return torch.promote_types(y.dtype, torch.get_autocast_dtype("cuda"))
    return y.dtype
