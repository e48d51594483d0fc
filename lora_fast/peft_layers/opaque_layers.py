"""PEFT's LoRA layers on bases that compute their output by themselves (base_layer/opaque.py).

    y = base(x) + Σᵢ sᵢ · (drop(x) Aᵢᵀ) Bᵢᵀ + Σᵢ sᵢ · biasᵢ          (i: active adapters)

The classes are those that PEFT has for quantised bases; ``lora.Linear`` and ``lora.bnb.Linear4bit``
(lora_layers.py) come here as well where their base is none that the operation reads.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from ..base_layer.int8 import decoded
from ..base_layer.opaque import adapted_output, input_obstacle
from ..factors import NO_WEIGHT, Constants, Factors
from ..operation.validation import check_dropout, check_scaling
from .fused_forward import FusedForward
from .lora_state import (
    Adapter,
    State,
    cast_obstacle,
    masks_rows,
    opaque_obstacle,
    read_adapters,
    samples_obstacle,
    spans_of,
    stacked,
    stacked_gains,
    together_obstacle,
    total_bias,
)

_NAMES = frozenset({"adapter_names"})
# Keyword arguments of a variant, which some of the layers remove from the call.
_ALL = _NAMES.union(getattr(peft_layer, "VARIANT_KWARG_KEYS", ()))


class OpaqueLoRALayer(FusedForward):
    """The fused forward of a layer whose base is always opaque."""

    # Keyword arguments that PEFT's forward does not pass to the base.
    _lora_fast_arguments: ClassVar[frozenset[str]] = frozenset()
    # Whether an 8-bit weight is decoded (accelerate's decode_int8).
    _lora_fast_decodes_int8: bool = False
    # Whether the result is promoted to the dtype of CUDA's autocast.
    _lora_fast_promotes: ClassVar[bool] = False

    def active(self, **kwargs: Any) -> tuple[State, str | None]:
        layer: Any = self
        names: Any = kwargs.get("adapter_names")
        mixed = names is not None
        wanted = dict.fromkeys(names) if mixed else layer.active_adapters
        adapters, found = read_adapters(layer, wanted)
        base = layer._modules.get("quant_linear_module", layer.base_layer)
        reason = f"base layer is {type(base).__name__}"
        offsets = kwargs.get("alora_offsets")
        if self._lora_fast_decodes_int8:
            base = decoded(base) or base
        state = State(base, adapters, list(names) if mixed else None, reason, offsets)
        found = found or opaque_obstacle(state)
        if found is None and (mixed or (len(adapters) > 1 and masks_rows(state))):
            found = together_obstacle(adapters, mixed=mixed)
        return state, found

    def arguments_obstacle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        known = not args and self._lora_fast_arguments.issuperset(kwargs)
        return None if known else "extra arguments"

    def input_obstacle(self, state: State, x: Any) -> str | None:
        found = opaque_input_obstacle(self, state, x)
        if found is None and torch.is_autocast_enabled() and x.device.type != "cuda":
            return "CUDA autocast off CUDA"
        return found

    def fused(self, state: State, x: Tensor) -> Tensor:
        return opaque_output(state, x, promotes=self._lora_fast_promotes)


def opaque_input_obstacle(layer: Any, state: State, x: Any) -> str | None:
    """Why x does not fit the adapters of a layer on an opaque base."""
    found = input_obstacle(x, [(a.A, a.B, a.bias, a.d) for a in state.adapters])
    if found is not None:
        return found
    found = samples_obstacle(state, x)
    if found is not None:
        return found
    if torch.is_autocast_enabled(x.device.type):
        return None
    return cast_obstacle(layer, state.adapters, x)


def opaque_output(state: State, x: Tensor, *, promotes: bool) -> Tensor:
    """The layer's output: adapters without dropout share one low-rank product, one with dropout has
    its own, as it has its own mask."""
    adapters, spans = state.adapters, spans_of(state, x)
    if spans is not None:
        f = _factors(adapters)
        layers = [f._replace(constants=f.constants._replace(rank_spans=spans))]
    else:
        plain = [adapter for adapter in adapters if adapter.dropout_p == 0.0]
        groups = [[adapter] for adapter in adapters if adapter.dropout_p > 0.0]
        layers = [_factors(group) for group in (*([plain] if plain else []), *groups)]
    for f in layers:
        check_dropout(f.constants.dropout_p, None, x)
    return adapted_output(state.base, x, layers, promotes=promotes)


def _factors(adapters: list[Adapter]) -> Factors:
    A, B, scaling = stacked(adapters)
    bias, b = total_bias(None, adapters), None
    if isinstance(scaling, Tensor):
        s = scaling.detach().reshape(()).to(device=B.device, dtype=torch.float32)
        b, scaling = s.expand(B.shape[0]), 1.0
    check_scaling(scaling)
    constants = Constants(float(scaling), adapters[0].dropout_p)
    return Factors(NO_WEIGHT, bias, A, B, b, stacked_gains(adapters), None, constants)


class Kind(NamedTuple):
    """A class of PEFT, by its module and name, and what differs between their forwards."""

    module: str
    name: str
    arguments: frozenset[str] = frozenset()
    promotes: bool = False


KINDS = (
    Kind("bnb", "Linear8bitLt", _ALL, True),
    Kind("hqq", "HqqLoraLinear", _NAMES, True),
    Kind("torchao", "TorchaoLoraLinear", _ALL),
    Kind("inc", "IncLoraLinear", _ALL),
    Kind("gptq", "GPTQLoraLinear"),
    Kind("awq", "AwqLoraLinear", promotes=True),
    Kind("eetq", "EetqLoraLinear", promotes=True),
    Kind("aqlm", "AqlmLoraLinear"),
    Kind("te", "TeLinear"),
)


def fused_classes(kind: Kind) -> dict[type[nn.Module], type[nn.Module]]:
    """PEFT's class and a fused one, pickled by its name in this module; nothing if the installed
    PEFT, with the packages there are, has none."""
    try:
        stock = getattr(import_module(f"peft.tuners.lora.{kind.module}"), kind.name)
    except (ImportError, AttributeError):
        return {}
    members = {
        "__module__": __name__,
        "__doc__": f"``peft.tuners.lora.{kind.module}.{kind.name}`` on the fused path.",
        "_lora_fast_arguments": kind.arguments,
        "_lora_fast_promotes": kind.promotes,
    }
    name = f"Fused{kind.name}"
    globals()[name] = ours = type(name, (OpaqueLoRALayer, stock), members)
    return {stock: ours}


FUSED_CLASSES = {stock: ours for kind in KINDS for stock, ours in fused_classes(kind).items()}
