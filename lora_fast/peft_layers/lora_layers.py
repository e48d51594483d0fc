"""PEFT's LoRA layers: LoRA, rsLoRA, LoRA-FA, DoRA, batches with an adapter for each sample.

LoRA   y = x Wᵀ + Σᵢ sᵢ · (drop(x) Aᵢᵀ) Bᵢᵀ + bias + Σᵢ sᵢ · biasᵢ     (i: active adapters)
DoRA   y = x Wᵀ + (g − 1) ⊙ (x̃ Wᵀ) + g ⊙ s · (x̃ Aᵀ) Bᵀ + bias          g = m / ‖W + s B A‖

with x̃ = drop(x): PEFT drops the input of all that m scales. Without dropout y = g ⊙ V + bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from peft.tuners import lora
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..base_linear import (
    adapted,
    adapted_together,
    base_obstacle,
    call_obstacle,
    module_obstacle,
    runs_own_forward,
    tensor_obstacle,
    weight_of,
    weight_shape,
)
from ..functional import Member
from ..row_norms import RowNorms, row_norms_in_graph
from .four_bit_classes import LoRALinear4bit
from .fused_forward import FusedForward, casts_input, rate_of, switched_off
from .lora_merging import merge_terms, plain_terms, unmerge_terms
from .shared_input import GROUP, Kept, signature_of

# Named arguments of a variant; PEFT takes them out of the call and vanilla LoRA ignores them.
_VARIANT_ARGUMENTS = frozenset(getattr(peft_layer, "VARIANT_KWARG_KEYS", ()))


class Adapter(NamedTuple):
    """One active adapter, as it is at this moment."""

    name: str
    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout: nn.Module
    dropout_p: float
    magnitude: Tensor | None = None


class State(NamedTuple):
    """The base layer, the adapters that take part in a call, and for a mixed batch the adapter of
    each sample."""

    base: Any
    adapters: list[Adapter]
    sample_adapters: list[str] | None = None


class FusedLoRALayer(FusedForward):
    """The fused forward of ``lora.Linear`` and ``lora.bnb.Linear4bit``."""

    def active(self, **kwargs: Any) -> tuple[State, str | None]:
        layer: Any = self
        base, names = layer.base_layer, kwargs.get("adapter_names")
        if names is None:
            adapters, found = _read(layer, base, layer.active_adapters)
            if found is None and len(adapters) > 1:
                found = _together_obstacle(adapters, mixed=False)
            return State(base, adapters), found
        adapters, found = _read(layer, base, dict.fromkeys(names))
        return State(base, adapters, list(names)), found or _together_obstacle(adapters, mixed=True)

    def arguments_obstacle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if args or not _VARIANT_ARGUMENTS.issuperset(kwargs.keys() - {"adapter_names"}):
            return "extra arguments"
        return None

    def input_obstacle(self, state: State, x: Any) -> str | None:
        base = state.base
        factors: list[Tensor | None] = []
        for adapter in state.adapters:
            factors += (adapter.A, adapter.B, adapter.bias, adapter.magnitude)
        found = call_obstacle(base, x, *factors)
        if found is not None:
            return found
        N, K = weight_shape(base)
        for adapter in state.adapters:
            if adapter.A.shape[1] != K or adapter.B.shape != (N, adapter.A.shape[0]):
                return "shapes of lora_A and lora_B"
            if adapter.magnitude is not None and adapter.magnitude.shape != (N,):
                return "shape of lora_magnitude_vector"
        if state.sample_adapters is not None and (
            x.dim() < 2 or len(state.sample_adapters) != x.shape[0]
        ):
            return "length of adapter_names"
        four_bit = isinstance(self, LoRALinear4bit)
        if four_bit and torch.is_autocast_enabled() and x.device.type != "cuda":
            return "CUDA autocast off CUDA"
        if torch.is_autocast_enabled(x.device.type):
            return None
        return _cast_obstacle(self, state.adapters, x)

    def fused(self, state: State, x: Tensor) -> Tensor:
        first = state.adapters[0]
        if first.magnitude is not None:
            y = _dora(self, first, x)
        else:
            shared = _with_siblings(self, state, x)
            y = _lora(state, x) if shared is None else shared
        return y.to(_result_dtype(self, y))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.__dict__.pop(_NORMS, None)
        layer: Any = self
        names = check_adapters_to_merge(layer, adapter_names)
        terms = None if safe_merge else plain_terms(layer, names)
        if terms is None:
            super().merge(safe_merge, adapter_names)  # type: ignore[misc]
        elif terms:
            merge_terms(layer, terms)
            layer.merged_adapters.extend(name for name in names if name in layer.lora_A)

    def unmerge(self) -> None:
        self.__dict__.pop(_NORMS, None)
        layer: Any = self
        terms = plain_terms(layer, layer.merged_adapters) if layer.merged else None
        if terms is None:
            super().unmerge()  # type: ignore[misc]
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
_ALONE: tuple[Any, int] = (None, 0)
# As many rows go through one tile of the kernels, which share no shrink then.
_FEW_ROWS = 64
# Attribute of a layer: {adapter: RowNorms}.
_NORMS = "_lora_fast_norms"


def _read(layer: Any, base: Any, names: Iterable[str]) -> tuple[list[Adapter], str | None]:
    """The adapters `names`, all of them unless the state of the layer holds an obstacle."""
    adapters: list[Adapter] = []
    # Past the modules' own lookups, which are Python and add up.
    modules = layer._modules
    found = switched_off(layer)
    if found is not None:
        return adapters, found
    lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts, variants = modules["lora_dropout"]._modules, layer.lora_variant
    for name in names:
        if name not in lora_A:
            continue
        A, B, dropout, magnitude = lora_A[name], lora_B[name], dropouts[name], None
        if name in variants:
            magnitude, found = _magnitude(layer, name, B)
        found = (
            found
            or module_obstacle(A, "lora_A", nn.Linear)
            or module_obstacle(B, "lora_B", nn.Linear)
            or module_obstacle(dropout, "lora_dropout", nn.Dropout, nn.Identity)
        )
        if found is not None:
            return adapters, found
        weight_A, weight_B, bias = A.weight, B.weight, B.bias
        found = tensor_obstacle(weight_A, "lora_A") or tensor_obstacle(weight_B, "lora_B")
        if bias is not None:
            found = found or tensor_obstacle(bias, "lora_B")
        if found is None and A.bias is not None:
            found = "lora_A has a bias"
        if found is not None:
            return adapters, found
        p = rate_of(dropout)
        scaling = layer.scaling[name]
        if isinstance(scaling, Tensor) and scaling.requires_grad:
            return adapters, "scaling requires a gradient"
        adapters.append(Adapter(name, weight_A, weight_B, bias, scaling, dropout, p, magnitude))
    if not adapters:
        return adapters, "no active adapter"
    return adapters, base_obstacle(base)


def _magnitude(layer: Any, name: str, B: Any) -> tuple[Tensor | None, str | None]:
    """DoRA's m, and why a variant of LoRA cannot be computed here."""
    variant = layer.lora_variant[name]
    if type(variant) is not DoraLinearVariant:
        return None, f"variant {type(variant).__name__}"
    if B.bias is not None or getattr(layer, "fan_in_fan_out", False):
        return None, "DoRA with a bias of lora_B or fan_in_fan_out"
    magnitude = layer.lora_magnitude_vector[name]
    found = module_obstacle(magnitude, "lora_magnitude_vector", DoraLinearLayer)
    return magnitude.weight, found or tensor_obstacle(magnitude.weight, "lora_magnitude_vector")


def _together_obstacle(adapters: list[Adapter], *, mixed: bool) -> str | None:
    """Why these adapters cannot share one low-rank product."""
    if len(adapters) == 1 and not mixed:
        return None
    if any(adapter.magnitude is not None for adapter in adapters):
        return "DoRA with several adapters"
    if mixed and any(adapter.bias is not None for adapter in adapters):
        # Each sample has the bias of its own adapter, which is no term of the equation.
        return "bias of lora_B in a mixed batch"
    # A sample has one adapter in a mixed batch: one mask serves all adapters of the same p.
    p = {adapter.dropout_p for adapter in adapters}
    return "dropout with several adapters" if len(p) > 1 or (any(p) and not mixed) else None


def _cast_obstacle(layer: Any, adapters: list[Adapter], x: Tensor) -> str | None:
    """Without autocast, PEFT casts x to lora_A's dtype, and nothing else to anything."""
    for adapter in adapters:
        dtype = adapter.A.dtype
        if adapter.B.dtype != dtype or (adapter.bias is not None and adapter.bias.dtype != dtype):
            return "lora_A and lora_B differ in dtype"
        if x.dtype != dtype and not casts_input(layer):
            return "x and lora_A differ in dtype"
    return None


def _lora(state: State, x: Tensor) -> Tensor:
    adapters = state.adapters
    A, B, scaling = _stacked(adapters)
    bias, spans = state.base.bias, None
    if state.sample_adapters is None:
        bias = _total_bias(bias, adapters)
    else:
        spans = _rank_spans(adapters, state.sample_adapters, x.device)
    return adapted(
        state.base,
        x,
        bias=bias,
        A=A,
        B=B,
        scaling=scaling,
        dropout_p=adapters[0].dropout_p,
        rank_spans=spans,
    )


def _with_siblings(layer: Any, state: State, x: Tensor) -> Tensor | None:
    """The output from the group of layers that read the same x; None if the layer is on its own."""
    group, index = layer.__dict__.get(GROUP, _ALONE)
    if group is None or torch.compiler.is_dynamo_compiling():
        return None
    # Each of few rows takes a launch in any case; without gradients nothing else would be shared.
    if not torch.is_grad_enabled() and x.numel() <= _FEW_ROWS * x.shape[-1]:
        return None
    if group.given_up or layer._forward_pre_hooks or not group.join(index, layer):
        return None
    if not _is_plain(state):
        return None
    y = group.fetch(index, x, _signature(state))
    others = None if y is not None else group.others(index)
    if others is None:
        return y
    states, p = {index: state}, state.adapters[0].dropout_p
    for i, other in others:
        sibling = _sibling(other, x, p)
        if sibling is None:
            return None
        states[i] = sibling
    order = sorted(states)
    members = [_member(states[i]) for i in order]
    ys = adapted_together([states[i].base for i in order], x, members, p)
    if ys is None:
        return None
    outputs = dict(zip(order, ys, strict=True))
    y = outputs.pop(index)
    group.keep(x, {i: Kept(out, _signature(states[i])) for i, out in outputs.items()})
    return y


def _sibling(layer: Any, x: Tensor, dropout_p: float) -> State | None:
    """A sibling as its own call with x would find it; None if that may come to anything else."""
    # What runs after a forward runs in the sibling's own call, too.
    if layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return None
    if type(layer) not in (FusedLinear, FusedLinear4bit) or not runs_own_forward(layer):
        return None
    state, found = layer.active()
    if found is not None or layer.input_obstacle(state, x) is not None:
        return None
    return state if _is_plain(state) and state.adapters[0].dropout_p == dropout_p else None


def _is_plain(state: State) -> bool:
    """Whether it is what a group computes: LoRA, one adapter or several, on a frozen weight, with
    scalings that are numbers."""
    if state.sample_adapters is not None or state.base.weight.requires_grad:
        return False
    for adapter in state.adapters:
        if adapter.magnitude is not None or isinstance(adapter.scaling, Tensor):
            return False
    return True


def _member(state: State) -> Member:
    A, B, scaling = _stacked(state.adapters)
    bias = _total_bias(state.base.bias, state.adapters)
    return Member(weight_of(state.base), bias, A, B, scaling)  # type: ignore[arg-type]


def _signature(state: State) -> Any:
    """Changes with everything that the output of a plain LoRA layer depends on, beside x."""
    base = state.base
    tensors: list[Tensor | None] = []
    facts: list[Any] = []
    for adapter in state.adapters:
        dropout = adapter.dropout
        facts += (adapter.name, adapter.scaling, dropout.training, getattr(dropout, "p", 0.0))
        tensors += (adapter.A, adapter.B, adapter.bias)
    return (*facts, *signature_of(base.weight, base.bias, *tensors))


def _dora(layer: Any, adapter: Adapter, x: Tensor) -> Tensor:
    """PEFT drops x before the base product, too, but only for what m scales."""
    assert adapter.magnitude is not None
    base = layer.base_layer
    if torch.compiler.is_compiling():
        norms: Any = row_norms_in_graph
    else:
        norms = layer.__dict__.setdefault(_NORMS, {}).setdefault(adapter.name, RowNorms())
    g = adapter.magnitude / norms(weight_of(base), adapter.A, adapter.B, adapter.scaling)
    factors: dict[str, Any] = {"A": adapter.A, "B": adapter.B, "scaling": adapter.scaling, "g": g}
    if adapter.dropout_p == 0.0:
        return adapted(base, x, bias=base.bias, **factors)
    # The very numbers that PEFT's dropout would draw, without a second copy of x in float32.
    keep = adapter.dropout(torch.ones_like(x, dtype=adapter.A.dtype)).to(x.dtype)
    dropped = x * keep
    return adapted(base, dropped, bias=base.bias, **factors) + adapted(base, x - dropped, bias=None)


def _stacked(adapters: list[Adapter]) -> tuple[Tensor, Tensor, float | Tensor]:
    """A [ΣR, K], B [N, ΣR] and one scaling with s B A = Σ sᵢ Bᵢ Aᵢ."""
    first = adapters[0]
    if len(adapters) == 1:
        return first.A, first.B, first.scaling
    A = torch.cat([adapter.A for adapter in adapters])
    scalings = [adapter.scaling for adapter in adapters]
    if all(isinstance(s, (int, float)) and s == first.scaling for s in scalings):
        return A, torch.cat([adapter.B for adapter in adapters], dim=1), first.scaling
    scaled = [adapter.B.float() * adapter.scaling for adapter in adapters]
    return A, torch.cat(scaled, dim=1), 1.0


def _rank_spans(
    adapters: list[Adapter], sample_adapters: list[str], device: torch.device
) -> Tensor:
    """[samples, 2]: the first and the last but one column of the stacked rank for each sample."""
    spans, start = {}, 0
    for adapter in adapters:
        spans[adapter.name] = (start, start + adapter.A.shape[0])
        start += adapter.A.shape[0]
    rows = [spans.get(name, (0, 0)) for name in sample_adapters]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _total_bias(base_bias: Tensor | None, adapters: list[Adapter]) -> Tensor | None:
    """The base's bias plus sᵢ times the bias of each lora_B (``lora_bias=True``), in float32."""
    total = base_bias
    for adapter in adapters:
        if adapter.bias is not None:
            term = adapter.bias.float() * adapter.scaling
            total = term if total is None else total.float() + term
    return total


def _result_dtype(layer: Any, y: Tensor) -> torch.dtype:
    """lora.Linear returns the base layer's dtype; lora.Linear4bit promotes under CUDA autocast."""
    if torch.is_autocast_enabled() and isinstance(layer, LoRALinear4bit):
        return torch.promote_types(y.dtype, torch.get_autocast_dtype("cuda"))
    return y.dtype
