"""The state of a PEFT LoRA layer at a call, and the factors made from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ..backends.torch_layer import joined
from ..base_layer.linear import weight_of
from ..base_layer.obstacles import module_obstacle, tensor_obstacle
from ..functional import Member
from ..replaced import own
from .fused_forward import CAST, casts_input, rate_of, switched_off
from .plain_lora import fingerprint_of, read_plain

# Variants that PEFT has from 0.18, 0.20 and 0.21 on. MiCA is LoRA with a frozen B, KaSA has a d.
ALORA = getattr(variants, "ALoraLinearVariant", None)
MICA = getattr(variants, "MiCALinearVariant", None)
KASA = getattr(variants, "KasaLinearVariant", None)
_WEIGHT_NORM = own(DoraLinearLayer.get_weight_norm, "peft")


class Adapter(NamedTuple):
    """One active adapter in its current state."""

    name: str
    A: Tensor
    B: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    dropout: nn.Module
    dropout_p: float
    magnitude: Tensor | None = None
    masks_rows: bool = False  # aLoRA: only the last rows of a sample use it
    d: Tensor | None = None  # KaSA: the gain of each column of S


class State(NamedTuple):
    """The base layer, the adapters that take part in a call, for a mixed batch the adapter of each
    sample, and why the base computes its output by itself (base_layer/opaque.py), None if the
    operation reads its weight."""

    base: Any
    adapters: list[Adapter]
    sample_adapters: list[str] | None = None
    opaque: str | None = None
    # Of aLoRA, how many of the last rows of each sample use the adapter; None: no row does.
    offsets: Sequence[int | None] | None = None


def read_adapters(layer: Any, names: Iterable[str]) -> tuple[list[Adapter], str | None]:
    """The adapters `names`, all of them unless the state of the layer holds an obstacle."""
    adapters: list[Adapter] = []
    # Bypasses the modules' attribute lookups, which are slow Python code.
    modules = layer._modules
    found = switched_off(layer)
    if found is None and CAST in layer.__dict__:
        found = "cast of the input replaced"  # which a sibling must know, too
    if found is not None:
        return adapters, found
    lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts, of_layer = modules["lora_dropout"]._modules, layer.lora_variant
    for name in names:
        if name not in lora_A:
            continue
        A, B, dropout, magnitude, d = lora_A[name], lora_B[name], dropouts[name], None, None
        kind = type(of_layer[name]) if name in of_layer else None
        if kind is not None and kind is KASA:
            d, found = _diagonal(layer, name)
        elif kind is not None and kind is not MICA:
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
        masks = kind is not None and kind is ALORA
        adapters.append(
            Adapter(name, weight_A, weight_B, bias, scaling, dropout, p, magnitude, masks, d)
        )
    if not adapters:
        return adapters, "no active adapter"
    if len(adapters) > 1:
        # The columns of S that all rows use come first: those of a row lie side by side.
        adapters.sort(key=lambda adapter: adapter.masks_rows)
    return adapters, None


def opaque_obstacle(state: State) -> str | None:
    """Why nothing can be added to the output of an opaque base; the reason why it is opaque."""
    if torch.compiler.is_compiling():
        return state.opaque
    if any(adapter.magnitude is not None for adapter in state.adapters):
        return state.opaque  # m scales the base's weight
    return None


def _diagonal(layer: Any, name: str) -> tuple[Tensor | None, str | None]:
    """KaSA's d [R], and why the layer is not ready: its first forward in PEFT changes W."""
    if name in getattr(layer, "_lora_kasa_truncation_deferred", ()):
        return None, "KaSA has yet to truncate the base weight"
    d = layer.lora_diag[name]
    return d, tensor_obstacle(d, "lora_diag")


def _magnitude(layer: Any, name: str, B: Any) -> tuple[Tensor | None, str | None]:
    """DoRA's m, None for aLoRA, and why a variant of LoRA cannot be computed here."""
    variant = layer.lora_variant[name]
    if type(variant) is ALORA:
        return None, None if B.bias is None else "aLoRA with a bias of lora_B"
    if DoraLinearLayer.get_weight_norm is not _WEIGHT_NORM:
        return None, "norm of DoRA replaced"
    if type(variant) is not DoraLinearVariant:
        return None, f"variant {type(variant).__name__}"
    if B.bias is not None or getattr(layer, "fan_in_fan_out", False):
        return None, "DoRA with a bias of lora_B or fan_in_fan_out"
    magnitude = layer.lora_magnitude_vector[name]
    found = module_obstacle(magnitude, "lora_magnitude_vector", DoraLinearLayer)
    return magnitude.weight, found or tensor_obstacle(magnitude.weight, "lora_magnitude_vector")


def together_obstacle(adapters: list[Adapter], *, mixed: bool) -> str | None:
    """Why these adapters cannot share one low-rank product."""
    if len(adapters) == 1 and not mixed:
        return None
    if any(adapter.magnitude is not None for adapter in adapters):
        return "DoRA with several adapters"
    if mixed and any(adapter.bias is not None for adapter in adapters):
        # Each sample adds the bias of its own adapter; the equation has no such term.
        return "bias of lora_B in a mixed batch"
    # In a mixed batch a sample has one adapter, so one mask serves all adapters of the same p.
    p = {adapter.dropout_p for adapter in adapters}
    return "dropout with several adapters" if len(p) > 1 or (any(p) and not mixed) else None


def cast_obstacle(layer: Any, adapters: list[Adapter], x: Tensor) -> str | None:
    """Without autocast, PEFT casts x to lora_A's dtype, and nothing else."""
    for adapter in adapters:
        dtype = adapter.A.dtype
        if adapter.B.dtype != dtype or (adapter.bias is not None and adapter.bias.dtype != dtype):
            return "lora_A and lora_B differ in dtype"
        if adapter.d is not None and adapter.d.dtype != dtype:
            return "lora_A and lora_diag differ in dtype"
        if x.dtype != dtype and not casts_input(layer):
            return "x and lora_A differ in dtype"
    return None


def is_plain(state: State) -> bool:
    """Whether a group can compute it: LoRA, one adapter or several, on a frozen weight that the
    operation reads, with numeric scalings."""
    if state.sample_adapters is not None or state.opaque is not None:
        return False
    if state.base.weight.requires_grad:
        return False
    for adapter in state.adapters:
        if adapter.magnitude is not None or isinstance(adapter.scaling, Tensor):
            return False
        if adapter.masks_rows or adapter.d is not None:
            return False
    return True


def member_of(state: State) -> Member:
    A, B, scaling = stacked(state.adapters)
    bias = total_bias(state.base.bias, state.adapters)
    return Member(weight_of(state.base), bias, A, B, scaling)  # type: ignore[arg-type]


def lora_factors(state: State, x: Tensor) -> dict[str, Any]:
    """The arguments of :func:`lora_fast.base_layer.linear.adapted` for a call with x."""
    adapters = state.adapters
    A, B, scaling = stacked(adapters)
    bias = state.base.bias
    if state.sample_adapters is None:
        bias = total_bias(bias, adapters)
    return {
        "bias": bias,
        "A": A,
        "B": B,
        "d": stacked_gains(adapters),
        "scaling": scaling,
        "dropout_p": adapters[0].dropout_p,
        "rank_spans": spans_of(state, x),
    }


def fingerprint(layer: Any) -> tuple[Any, ...] | None:
    """A value that changes with everything that :func:`read_adapters` and the output of a plain
    LoRA layer depend on, except x; None for inference tensors, which have no version counter."""
    plain = read_plain(layer)
    if plain is not None:
        return fingerprint_of(plain)
    modules, scaling = layer._modules, layer.scaling
    lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    parts, dropouts = [modules["base_layer"]], modules["lora_dropout"]._modules
    found: list[Any] = [layer.disable_adapters, len(layer.merged_adapters), len(layer.lora_variant)]
    for name in layer.active_adapters:
        s = scaling.get(name)
        found += (name, s if isinstance(s, (int, float)) else id(s))
        if name in lora_A:
            parts += (lora_A[name], lora_B[name], dropouts[name])
    try:
        for part in parts:
            own = part.__dict__
            hooked = own["_forward_hooks"] or own["_forward_pre_hooks"]
            hooked = hooked or own["_backward_hooks"] or own["_backward_pre_hooks"]
            found += (id(part), own["training"], own.get("p"), own.get("forward") is None)
            found += (not hooked, own.get("compute_dtype"), id(own.get("quant_state")))
            for t in own["_parameters"].values():
                if t is not None:
                    found += (id(t), t.data_ptr(), t.requires_grad, t._version)
    except RuntimeError:  # raised by _version
        return None
    return tuple(found)


def circumstances_of(x: Tensor) -> tuple[Any, ...]:
    """A value that changes with x and with how its values would be computed with."""
    kind = "cpu" if x.is_cpu else x.device.type
    autocast = torch.is_autocast_enabled(kind)
    return (
        x.data_ptr(),
        None if x.is_inference() else x._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_autocast_dtype(kind) if autocast else None,
        torch.cuda.current_stream(x.device).cuda_stream if kind == "cuda" else 0,
    )


def stacked(adapters: list[Adapter]) -> tuple[Tensor, Tensor, float | Tensor]:
    """A [ΣR, K], B [N, ΣR] and one scaling with s B A = Σ sᵢ Bᵢ Aᵢ."""
    first = adapters[0]
    if len(adapters) == 1:
        return first.A, first.B, first.scaling
    A = joined([adapter.A for adapter in adapters])
    scalings = [adapter.scaling for adapter in adapters]
    if all(isinstance(s, (int, float)) and s == first.scaling for s in scalings):
        return A, joined([adapter.B for adapter in adapters], dim=1), first.scaling
    scaled = [adapter.B.float() * adapter.scaling for adapter in adapters]
    return A, joined(scaled, dim=1), 1.0


def stacked_gains(adapters: list[Adapter]) -> Tensor | None:
    """d [ΣR] of stacked adapters; None if none has any."""
    if all(adapter.d is None for adapter in adapters):
        return None
    parts = [a.A.new_ones(a.A.shape[0]) if a.d is None else a.d for a in adapters]
    return parts[0] if len(parts) == 1 else joined(parts)


def spans_of(state: State, x: Tensor) -> Tensor | None:
    """The columns of S that each sample uses, or each row; None: all use all."""
    names, masks = state.sample_adapters, masks_rows(state)
    if names is None and not masks:
        return None
    always, on = _spans(state, x.shape[0])
    if not masks:
        return torch.tensor(on, dtype=torch.int32, device=x.device)
    rows, last = x.shape[1] if x.dim() == 3 else 1, torch.zeros(x.shape[0], 1, dtype=torch.int64)
    if state.offsets is not None:
        last[:, 0] = torch.tensor([0 if n is None else int(n) for n in state.offsets])
    used = (torch.arange(rows) >= rows - last).unsqueeze(2)
    adapted, other = (torch.tensor(found, dtype=torch.int32).unsqueeze(1) for found in (on, always))
    return torch.where(used, adapted, other).view(-1, 2).to(x.device, non_blocking=True)


def _spans(state: State, samples: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Start and stop of each sample's columns of the stacked rank: of all its rows, and of those
    that aLoRA adapts."""
    of_adapter, start, unmasked = {}, 0, 0
    for adapter in state.adapters:
        stop = start + adapter.A.shape[0]
        of_adapter[adapter.name] = ((0, 0) if adapter.masks_rows else (start, stop), (start, stop))
        unmasked = unmasked if adapter.masks_rows else stop
        start = stop
    if state.sample_adapters is None:
        return [(0, unmasked)] * samples, [(0, start)] * samples
    nothing = ((0, 0), (0, 0))
    found = [of_adapter.get(name, nothing) for name in state.sample_adapters]
    return [always for always, _ in found], [on for _, on in found]


def masks_rows(state: State) -> bool:
    """Whether an adapter is aLoRA's."""
    return any(adapter.masks_rows for adapter in state.adapters)


def samples_obstacle(state: State, x: Tensor) -> str | None:
    """Why the samples of x are not those that a call names."""
    names = state.sample_adapters
    if names is not None and (x.dim() < 2 or len(names) != x.shape[0]):
        return "length of adapter_names"
    if masks_rows(state):
        if x.dim() not in (2, 3):
            return "shape of x"
        if state.offsets is not None and len(state.offsets) != x.shape[0]:
            return "length of alora_offsets"
    return None


def total_bias(base_bias: Tensor | None, adapters: list[Adapter]) -> Tensor | None:
    """The base's bias plus sᵢ times the bias of each lora_B (``lora_bias=True``), in float32."""
    total = base_bias
    for adapter in adapters:
        if adapter.bias is not None:
            term = adapter.bias.float() * adapter.scaling
            total = term if total is None else total.float() + term
    return total
