"""Methods that train parts of the model itself: its biases, or its normalisation layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .four_bit.layout import forbid_packing

# torch.nn.LayerNorm and RMSNorm, LlamaRMSNorm, T5LayerNorm, Gemma3RMSNorm, …
_NORMS = ("LayerNorm", "RMSNorm")


def mark_bitfit(model: nn.Module, *, keep: Sequence[str] = ()) -> list[str]:
    """Make only the biases of `model` trainable: y = x Wᵀ + bias, W frozen.

    The biases are all parameters that their module calls ``bias``, those of normalisation layers
    included. `keep` lists parts of dotted names whose parameters keep their setting: a new head,
    which the paper trains, too ("classifier"), or adapters ("lora_A", "lora_B"). The backward pass
    then computes no gradient of a weight. Returns the names of all parameters that train.

    Raises TypeError if `model` is not a Module; ValueError, before anything is changed, for a model
    without biases (most recent language models) and for names in `keep` that match nothing.
    Source: BitFit (Ben Zaken, Ravfogel & Goldberg 2021).
    """
    return _mark(model, "biases", lambda module, name: name == "bias", keep)


def mark_layer_norm(model: nn.Module, *, keep: Sequence[str] = ()) -> list[str]:
    """Make only the gains and biases of every LayerNorm and RMSNorm of `model` trainable.

        y = gain ⊙ (x − mean) / std + bias

    Normalisation layers are modules whose class name ends with LayerNorm or RMSNorm. `keep`, the
    result and the errors are those of :func:`mark_bitfit`.
    Source: LayerNorm tuning (Zhao et al. 2023; Qi et al. 2022).
    """
    return _mark(model, "normalisation layers", lambda module, name: _is_norm(module), keep)


def _mark(
    model: Any,
    what: str,
    trains: Callable[[nn.Module, str], bool],
    keep: Sequence[str],
) -> list[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(keep, str):
        raise TypeError(f"keep must be a list of names, got {keep!r}")
    chosen = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point() and trains(module, name)
    }
    if not chosen:
        raise ValueError(f"model must have {what}, got a {type(model).__name__} without")
    names = [(name.split("."), p) for name, p in model.named_parameters(remove_duplicate=False)]
    unknown = [part for part in keep if not any(part in parts for parts, _ in names)]
    if unknown:
        raise ValueError(f"keep must name parts of the model, got {', '.join(map(repr, unknown))}")
    chosen |= {
        id(p) for parts, p in names if p.requires_grad and any(part in parts for part in keep)
    }
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    # No gradient flows through weights that an evaluation has packed.
    forbid_packing(model)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith(_NORMS)
