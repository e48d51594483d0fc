"""The adapted layers of a model that is not loaded: one of each kind, with random weights.

A model repeats a few kinds of layers dozens of times; compiling and timing their kernels takes one
of each. They are found on a skeleton, which has no memory.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .. import four_bit
from ..acceleration.report import adapted_layers, report
from ..acceleration.switch import accelerate
from ..acceleration.warm_up import base_of, kind_of
from ..experts.module_layout import layout_of
from ..gated_mlps.fused_mlp import FusedMLP
from ..methods.table import METHODS
from ..optional_packages import needed
from ..peft_layers import FusedForward
from ..skeleton import load_config, skeleton
from .memory import about_left_out, adapted, settled
from .settings import Settings
from .states import nf4_layers

# As transformers initialises linear layers.
_SPREAD = 0.02


class Replica(nn.Module):
    """Layers by the path of their parent, on the meta device until :meth:`materialise`.

    ``alike``: how many parents of the model have the same adapted layers, by path. ``plain``: how
    many layers are not timed, by reason. ``notes``: remarks on the config.
    """

    def __init__(self, model: nn.Module, notes: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.notes = notes
        accelerate(model)  # groups are found in the forward of the real parents
        self.plain = Counter(
            _why_not(model.get_submodule(layer.name), layer.obstacle)
            for layer in report(model).layers
            if not _can_be_fused(model.get_submodule(layer.name))
            and not _is_of_experts(model.get_submodule(layer.name))
        )
        self.alike: dict[str, int] = {}
        known: dict[Any, str] = {}
        mlps = {id(c): m for m in model.modules() if isinstance(m, FusedMLP) for c in m.children()}
        for path, children in _by_parent(model).items():
            mlp = next((mlps[id(c)] for c in children.values() if id(c) in mlps), None)
            kind = (type(mlp), *((name, kind_of(layer)) for name, layer in children.items()))
            first = known.setdefault(kind, path)
            self.alike[first] = self.alike.get(first, 0) + 1
            if first == path:
                parent = nn.Module() if mlp is None else mlp
                for name, layer in children.items() if mlp is None else ():
                    parent.add_module(name, layer)
                self.add_module(path, parent)

    def materialise(self, device: torch.device) -> None:
        """Give every layer memory on `device`: random weights, quantised if they are 4-bit."""
        made: dict[int, Tensor] = {}
        for module in self.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        # VeRA's layers share two matrices.
                        made.setdefault(id(tensor), _random(tensor, device))
                        tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def replica(
    model: str,
    *,
    method: str,
    quantize: str | None,
    r: int | None,
    dropout: float | None,
    target_modules: str | None,
    dtype: str,
) -> Replica:
    """The layers that `method` adapts in the model of a folder, a config.json or a hub id.

    The options are those of ``lora-fast plan``; of None, its defaults. Raises ValueError for a
    method without fused layers, for DoRA on NF4, and what planning raises.
    """
    fused = [name for name, row in METHODS.items() if row.fused]
    if method not in fused:
        raise ValueError(f"method must be one with fused layers: {', '.join(fused)}; got {method}")
    config = load_config(model)
    settings = Settings(
        method=method,
        quantize=quantize,
        r=r,
        dropout=dropout,
        target_modules=target_modules,
        dtype=dtype,
    )
    settings, notes = settled(config, settings)
    if method == "dora" and settings.quantize == "nf4":
        raise ValueError(
            "quantize must be none for method dora, whose norms PEFT takes from loaded weights; "
            "call lora_fast.warm_up on the loaded model"
        )
    base = skeleton(config, settings.task, getattr(torch, dtype))
    if settings.quantize == "nf4":
        _in_four_bits(base, getattr(torch, dtype))
    wrapped = adapted(model, base, settings)
    return Replica(wrapped, (*notes, *about_left_out(wrapped, settings)))


def _by_parent(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Adapted layers by the path of their parent, with slashes for dots, and their own name."""
    found: dict[str, dict[str, Any]] = {}
    for path, layer in adapted_layers(model):
        if _can_be_fused(layer):
            parent, _, name = path.removeprefix("base_model.model.").rpartition(".")
            found.setdefault(parent.replace(".", "/") or "model", {})[name] = layer
    return found


def _can_be_fused(layer: Any) -> bool:
    """Whether the layer is ours, around a layer that will be linear once it is loaded."""
    base = base_of(layer) if isinstance(layer, FusedForward) else None
    return type(base) is nn.Linear or four_bit.is_four_bit(base)


def _is_of_experts(layer: Any) -> bool:
    """Whether the layer adapts experts that run fused, in PyTorch's operations: nothing to time."""
    is_wrapper = isinstance(layer, FusedForward) and hasattr(layer, "parameter_name")
    return is_wrapper and layout_of(base_of(layer))[0] is not None


def _why_not(layer: Any, obstacle: str | None) -> str:
    if isinstance(layer, FusedForward) or obstacle is None:  # the obstacle is the meta device
        return f"base layer is {type(base_of(layer)).__name__}"
    return obstacle


def _in_four_bits(base: Any, dtype: torch.dtype) -> None:
    """Replace layers by Linear4bit, still without weights, as loading in NF4 does."""
    Linear4bit = needed("bitsandbytes.nn", 'quantize="nf4"').Linear4bit
    quantised = nf4_layers(base)
    for parent in list(base.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and id(layer.weight) in quantised:
                small = Linear4bit(
                    layer.in_features, layer.out_features, layer.bias is not None,
                    compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                small.weight.data = layer.weight.data
                setattr(parent, name, small)
    base.is_loaded_in_4bit = True


def _random(tensor: Tensor, device: torch.device) -> Tensor:
    values = torch.randn(tensor.shape, device=device).mul_(_SPREAD).to(tensor.dtype)
    if type(tensor) is four_bit.weight_class:
        Params4bit: Any = type(tensor)
        return Params4bit(values, requires_grad=False, quant_type="nf4").to(device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values
