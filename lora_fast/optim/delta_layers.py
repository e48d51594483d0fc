"""The layers that Delta-LoRA updates, and one update of one weight.

    W ← W_source + Σ_i c · s_i · (B_i A_i − B⁰_i A⁰_i)           (i over the active adapters)

The difference is computed as (B − B⁰) A + B⁰ (A − A⁰), in float32: subtracting first is exact, so a
small step of large factors is not lost in the rounding of their products.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base_layer.merging import LowRank, add_low_rank, four_bit_tensors, overwrite_four_bit
from ..base_layer.obstacles import tensor_obstacle
from ..four_bit import is_four_bit
from ..modules.lora import LoRALinear
from ..nf4 import NF4Weight

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ADAPTER_PREFIXES = ("lora_", "vera_")


class Adapter(NamedTuple):
    """One active adapter of a layer in its current state."""

    A: Tensor
    B: Tensor
    scaling: float | Tensor


class DeltaLayer:
    """One adapted layer, its previous factors and, for a low-precision W, the initial W.

    ``anchor`` holds (A⁰, B⁰) of every adapter in float32. ``start`` is the weight that updates
    start from, None if they start from W itself.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.adapter_names = self._active_names()
        self.anchor: list[tuple[Tensor, Tensor]] = []
        self.start: Tensor | NF4Weight | None = None

    @property
    def base(self) -> Any:
        module = self.module
        return module.base_layer if isinstance(module, LoRALinear) else module.get_base_layer()

    @property
    def weight(self) -> Tensor | NF4Weight:
        base = self.base
        return NF4Weight.from_params4bit(base.weight) if is_four_bit(base) else base.weight.detach()

    @property
    def rounds(self) -> bool:
        """Whether W's precision is too low for single updates."""
        weight = self.weight
        return isinstance(weight, NF4Weight) or weight.dtype.itemsize < 4

    def adapters(self) -> list[Adapter]:
        module = self.module
        if isinstance(module, LoRALinear):
            return [Adapter(module.lora_A.detach(), module.lora_B.detach(), module.scaling)]
        return [
            Adapter(
                module.lora_A[name].weight.detach(),
                module.lora_B[name].weight.detach(),
                module.scaling[name],
            )
            for name in self.adapter_names
        ]

    def check(self) -> None:
        """RuntimeError if adapters were merged or switched since the optimizer was made."""
        if self.module.merged:
            raise RuntimeError(
                f"step() must find unmerged adapters, got a merged one at {self.name!r}"
            )
        if self._active_names() != self.adapter_names:
            raise RuntimeError(
                f"step() must find {self.adapter_names} active at {self.name!r}, "
                f"got {self._active_names()}"
            )

    def _active_names(self) -> list[str]:
        module = self.module
        if isinstance(module, LoRALinear):
            return []
        return [name for name in module.active_adapters if name in module.lora_A]

    def drop_anchor(self, keep_start: bool) -> None:
        """Record the factors before a step; with `keep_start` only once, together with W."""
        if keep_start:
            if self.start is None:
                self.start, self.anchor = _copy(self.weight), self._factors()
        else:
            self.anchor = self._factors()

    def update(self, c: float, now: Sequence[Sequence[Tensor]] | None = None) -> None:
        """W ← source + Σ c · s (B A − B⁰ A⁰) with B, A as they are, or as `now` has them."""
        adapters = self.adapters()
        factors = [(A, B) for A, B, _ in adapters] if now is None else now
        terms = [
            _difference(A, B, A0, B0, c * adapter.scaling)
            for (A, B), (A0, B0), adapter in zip(factors, self.anchor, adapters, strict=True)
        ]
        weight = self.weight
        source = weight if self.start is None else self.start
        if isinstance(source, Tensor) and isinstance(weight, Tensor):
            add_low_rank(source, terms, out=weight)
        elif isinstance(source, NF4Weight):
            dense = source.dequantize(torch.float32)
            add_low_rank(dense, terms)
            overwrite_four_bit(self.base.weight, dense)

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        return [(_wide(A, copy=True), _wide(B, copy=True)) for A, B, _ in self.adapters()]


def tensors_of(weight: Tensor | NF4Weight) -> tuple[Tensor, ...]:
    """The tensors whose values make up a weight."""
    return four_bit_tensors(weight) if isinstance(weight, NF4Weight) else (weight,)


def _copy(weight: Tensor | NF4Weight) -> Tensor | NF4Weight:
    if isinstance(weight, NF4Weight):
        return NF4Weight(weight.packed.clone(), copy.deepcopy(weight.quant_state))
    return weight.clone()


def _wide(factor: Tensor, copy: bool = False) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32), copy=copy)


def _difference(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, scaling: float | Tensor) -> LowRank:
    """scaling · (B A − B⁰ A⁰)."""
    A, B = _wide(A), _wide(B)
    return LowRank(torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1), scaling)


def find_layers(model: nn.Module, trained: Iterable[nn.Parameter]) -> list[DeltaLayer]:
    """Every LoRA layer of `model` whose A or B is in `trained`, checked.

    Raises ValueError or NotImplementedError that names the layer where Delta-LoRA is undefined:
    dropout, variants of LoRA, other kinds of layers, merged adapters, a shared or trained W.
    """
    ids = {id(p) for p in trained}
    owners = _owners(model)
    layers, known = [], set()
    for name, module in model.named_modules():
        if not _is_lora_linear(module):
            continue
        layer = DeltaLayer(name, module)
        parameters = _adapter_parameters(layer)
        if ids.isdisjoint(parameters):
            continue
        _check_layer(layer, owners)
        layers.append(layer)
        known |= parameters
    for name, parameter in model.named_parameters():
        is_adapter = any(part.startswith(_ADAPTER_PREFIXES) for part in name.split("."))
        if is_adapter and id(parameter) in ids - known:
            raise NotImplementedError(
                f"model must train lora_A and lora_B of linear layers alone, got {name!r}: "
                "Delta-LoRA is not defined for it"
            )
    if not layers:
        raise ValueError("model must have LoRA layers that the optimizer trains, got none")
    return layers


def _is_lora_linear(module: nn.Module) -> bool:
    if type(module) is LoRALinear:
        return True
    lora = sys.modules.get("peft.tuners.lora")
    if lora is None:
        return False
    four_bit = getattr(sys.modules.get("peft.tuners.lora.bnb"), "Linear4bit", ())
    return isinstance(module, lora.Linear) or (bool(four_bit) and isinstance(module, four_bit))


def _adapter_parameters(layer: DeltaLayer) -> set[int]:
    module: Any = layer.module
    if isinstance(module, LoRALinear):
        return {id(module.lora_A), id(module.lora_B)}
    sides = (module.lora_A, module.lora_B)
    return {
        id(p) for name in layer.adapter_names for side in sides for p in side[name].parameters()
    }


def _check_layer(layer: DeltaLayer, owners: dict[int, set[tuple[int, str]]]) -> None:
    name, module, base = layer.name, layer.module, layer.base
    if module.merged:
        raise ValueError(f"model must have unmerged adapters, got a merged one at {name!r}")
    if _dropout(module) > 0:
        raise ValueError(
            f"model must have no dropout before the adapters, got {_dropout(module)} at {name!r}: "
            "the gradients of W and of B A would differ (Delta-LoRA, §4.2)"
        )
    variants = getattr(module, "lora_variant", {})
    for adapter in getattr(module, "active_adapters", ()):
        if adapter in variants:
            kind = type(variants[adapter]).__name__
            raise NotImplementedError(f"model must use plain LoRA, got {kind} at {name!r}")
    if not is_four_bit(base):
        found = tensor_obstacle(base.weight, "weight")
        if not isinstance(base, nn.Linear) or found or base.weight.dtype not in _DTYPES:
            found = found or f"{type(base).__name__} of {base.weight.dtype}"
            raise NotImplementedError(
                f"model must have dense or NF4 linear layers under its adapters, got {found} at "
                f"{name!r}"
            )
    if base.weight.requires_grad:
        raise ValueError(f"the weight under {name!r} must be frozen, got one that trains")
    tensors_of(layer.weight)
    if len(owners[base.weight.data_ptr()]) > 1:
        raise ValueError(f"the weight under {name!r} must be its own, got one that is shared")


def _dropout(module: Any) -> float:
    if isinstance(module, LoRALinear):
        return module.lora_dropout
    return max(
        (getattr(module.lora_dropout[name], "p", 0.0) for name in module.active_adapters
         if name in module.lora_dropout),
        default=0.0,
    )  # fmt: skip


def _owners(model: nn.Module) -> dict[int, set[tuple[int, str]]]:
    """{address of a parameter: the modules that hold it, each with its name for it}."""
    owners = defaultdict(set)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[parameter.data_ptr()].add((id(module), name))
    return owners
