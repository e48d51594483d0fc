"""Checks on the meta device how PEFT interprets a config, before a file is written.

The interpretation depends on the model: since transformers 5 PEFT takes ``gate_proj`` of a Mixtral
or a DeepSeek-V3 for the experts' parameters, even if other layers have that name. Layers that it
would not adapt by name are named as parameters, ``<layer>.weight``, which it adapts with the same
equation and the same keys; anything it still interprets differently is refused.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.adapter_module import AdapterModule
from ..modules.lora import LoRALinear
from .adapter_files import PREFIX, expected_shapes
from .peft_format import PeftAdapter


def config_as_peft_reads_it(adapter: PeftAdapter, tensors: Mapping[str, Tensor]) -> Any:
    """PEFT's config under which its layers hold exactly `tensors`, with the scalings of `adapter`.

    Raises NotImplementedError if there is no such config.
    """
    config = adapter.config()
    missing, unexpected = _differences(adapter, config, tensors)
    by_name = [
        name for name in adapter.layers if any(k.startswith(f"{PREFIX}{name}.") for k in missing)
    ]
    if by_name and _has_parameters(adapter, config):
        config = _naming_parameters(adapter, by_name)
        missing, unexpected = _differences(adapter, config, tensors)
    if missing or unexpected:
        difference = sorted(missing) or sorted(unexpected)
        raise NotImplementedError(
            "PEFT must put its layers where the adapter has its own, and reads the names of this "
            f"model in another way: {'no' if missing else 'also'} {difference[0]}"
            + (f" and {len(difference) - 1} more" if len(difference) > 1 else "")
            + "; leave these layers out of target_modules"
        )
    return config


def _has_parameters(adapter: PeftAdapter, config: Any) -> bool:
    """Whether PEFT's adapters of parameters can express these layers."""
    dropout = getattr(config, "lora_dropout", 0.0)
    return adapter.method is LoRALinear and hasattr(config, "target_parameters") and dropout == 0.0


def _naming_parameters(adapter: PeftAdapter, names: list[str]) -> Any:
    config = adapter.config()
    rest = [name for name in adapter.layers if name not in names]
    # Full names, with which no other layer's name ends.
    config.target_parameters = [f"{name}.weight" for name in names]
    config.target_modules = set(rest) if rest else None
    return config


def _differences(
    adapter: PeftAdapter, config: Any, tensors: Mapping[str, Tensor]
) -> tuple[set[str], set[str]]:
    """Keys whose shape or scaling would differ in PEFT, and keys that PEFT would add."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(_bare(adapter.model), copy.deepcopy(config))
        except ValueError as error:
            raise NotImplementedError(f"PEFT must accept the adapter's config: {error}") from error
        shapes = expected_shapes(model, model.peft_config["default"])
    missing = {k for k, t in tensors.items() if shapes.get(k) != tuple(t.shape)}
    for name, layer in adapter.layers.items():
        scaling = getattr(layer, "scaling", None)
        found = getattr(model.base_model.model.get_submodule(name), "scaling", {}).get("default")
        if scaling is not None and found is not None and found != scaling:
            missing |= {k for k in tensors if k.startswith(f"{PREFIX}{name}.")}
    return missing, shapes.keys() - tensors.keys()


def _bare(module: nn.Module) -> nn.Module:
    """A copy of `module` without memory: plain linear layers in place of adapted ones."""
    if isinstance(module, AdapterModule):
        return nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta"
        )
    # No deepcopy: other attributes of a module may be large, shared or bound to a process.
    twin = object.__new__(type(module))
    held = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()}
    held["_parameters"] = {n: _without_memory(p) for n, p in module._parameters.items()}
    held["_buffers"] = {n: _without_memory(b) for n, b in module._buffers.items()}
    held["_modules"] = {n: None if m is None else _bare(m) for n, m in module._modules.items()}
    if "config" in held:
        held["config"] = copy.deepcopy(held["config"])
    twin.__dict__.update(held)
    return twin


def _without_memory(tensor: Any) -> Any:
    if tensor is None:
        return None
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
