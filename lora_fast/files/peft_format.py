"""A model's adapter in the terms of PEFT's files: keys, tensors and config.

base_model.model.<path>.lora_A.weight [R, K], .lora_B.weight [N, R]
DoRA   .lora_magnitude_vector [N]
VeRA   .vera_lambda_b [N], .vera_lambda_d [R]; once for all layers base_model.vera_A [R, K] and
       base_model.vera_B [N, R]
base_model.model.<path>.<name> of modules that train as a whole

A layer of a method that PEFT does not have is stored as LoRA if it has no gain: A, and s · b ⊙ B d
in place of B.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..modules.adapter_module import AdapterModule
from ..modules.dora import DoRALinear
from ..modules.lora import LoRALinear
from ..modules.vera import VeRALinear
from .adapter_files import PREFIX

_PARAMETERS: dict[type, dict[str, str]] = {
    LoRALinear: {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
    DoRALinear: {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude_vector": "lora_magnitude_vector",
    },
    VeRALinear: {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
}


class PeftAdapter:
    """The adapter of `model`: its layers by their dotted names, their class, and the names of the
    modules outside of them that train. ``folded``: some layers are stored as LoRA because PEFT does
    not have their method.

    Raises ValueError for a model without adapted layers, NotImplementedError for what PEFT's format
    cannot say.
    """

    def __init__(self, model: Any) -> None:
        self.model = _unwrapped(model)
        layers = _layers(self.model)
        self.layers = {name: _as_peft_has_it(layer) for name, layer in layers.items()}
        self.folded = any(self.layers[name] is not layer for name, layer in layers.items())
        self.method = _method(self.layers)
        self.modules_to_save = _modules_to_save(self.model, self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """{key in PEFT's file: the tensor in the model, or the part of it that is used}."""
        keys = _PARAMETERS[self.method]
        found: dict[str, Tensor] = {
            f"{PREFIX}{name}.{key}": getattr(layer, parameter)
            for name, layer in self.layers.items()
            for parameter, key in keys.items()
        }
        if self.method is VeRALinear:
            shared = {id(layer.projections): layer.projections for layer in self.layers.values()}
            if len(shared) > 1:
                raise NotImplementedError(
                    f"PEFT's VeRA has projections that all layers share, got {len(shared)} of them"
                )
            (projections,) = shared.values()
            K, N = (
                max(getattr(x, f"{n}_features") for x in self.layers.values())
                for n in ("in", "out")
            )
            found["base_model.vera_A"] = projections.vera_A[:, :K]
            found["base_model.vera_B"] = projections.vera_B[:N]
        for name in self.modules_to_save:
            state = self.model.get_submodule(name).state_dict()
            found |= {f"{PREFIX}{name}.{key}": value for key, value in state.items()}
        return found

    def config(self) -> Any:
        """PEFT's LoraConfig or VeraConfig of it."""
        from peft import LoraConfig, VeraConfig

        layers, first = self.layers, next(iter(self.layers.values()))
        common = {
            "target_modules": _target_modules(self.model, layers),
            "modules_to_save": self.modules_to_save or None,
        }
        if self.method is VeRALinear:
            dropout = _one("vera_dropout", (layer.vera_dropout for layer in layers.values()))
            return VeraConfig(r=first.r, vera_dropout=dropout, d_initial=first.d_initial, **common)
        ranks = {name: layer.lora_A.shape[0] for name, layer in layers.items()}
        alphas = {name: _integer(layer.lora_alpha) for name, layer in layers.items()}
        return LoraConfig(
            r=_usual(ranks.values()),
            lora_alpha=_usual(alphas.values()),
            rank_pattern=_pattern(ranks),
            alpha_pattern=_pattern(alphas),
            lora_dropout=_one("lora_dropout", (layer.lora_dropout for layer in layers.values())),
            use_rslora=_use_rslora(layers),
            use_dora=self.method is DoRALinear,
            **common,
        )


def scaling(alpha: float, r: int, use_rslora: bool) -> float:
    """s of LoRA, or of rsLoRA."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def _unwrapped(model: Any) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _layers(model: nn.Module) -> dict[str, Any]:
    """{dotted name: adapted layer}, all of one method of ours."""
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, AdapterModule)
    }
    if not layers or "" in layers:
        raise ValueError(
            "model must contain layers that lora_fast.convert adapted, got "
            f"{'one layer' if layers else 'none'}; a PEFT model has save_pretrained"
        )
    _refuse_several_names(layers, "an adapted layer")
    return layers


def _as_peft_has_it(layer: Any) -> Any:
    """The layer itself if PEFT has its class, else LoRA with the same change of W."""
    if type(layer) in _PARAMETERS:
        return layer
    if layer.gain() is not None:
        raise NotImplementedError(
            f"PEFT's format must hold the adapter as LoRA, got {type(layer).__name__}, which has a "
            "gain g: merge it, or save its state_dict()"
        )
    term = layer.low_rank()
    A, B = term.A.detach(), term.B.detach().float() * term.scaling
    B = B if term.d is None else B * term.d.detach().float()
    B = B if term.b is None else B * term.b.detach().float().unsqueeze(1)
    R, p = A.shape[0], layer.dropout_p()
    lora = LoRALinear(layer.base_layer, r=R, lora_alpha=R, lora_dropout=p, dtype=A.dtype)
    lora.lora_A, lora.lora_B = nn.Parameter(A), nn.Parameter(B.to(term.B.dtype))
    return lora


def _method(layers: dict[str, Any]) -> type:
    found = {type(layer) for layer in layers.values()}
    if len(found) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in found))
        raise NotImplementedError(f"PEFT's format has one method for all layers, got {names}")
    return found.pop()


def _refuse_several_names(named: dict[str, Any], what: str) -> None:
    names: dict[int, str] = {}
    for name, shared in named.items():
        if names.setdefault(id(shared), name) != name:
            raise NotImplementedError(
                f"PEFT's format has one name for {what}, got {names[id(shared)]!r} and {name!r}"
            )


def _modules_to_save(model: nn.Module, layers: dict[str, Any]) -> list[str]:
    """The modules outside the adapters that train, each as a whole."""
    named = dict(model.named_parameters(remove_duplicate=False))
    outside = {n: p for n, p in named.items() if p.requires_grad and not _belongs(n, layers)}
    tied = {id(p) for p in outside.values()}
    _refuse_several_names({n: p for n, p in named.items() if id(p) in tied}, "a trained weight")
    found = list(dict.fromkeys(name.rpartition(".")[0] for name in outside))
    for name, parameter in named.items():
        owner = next((f for f in found if name.startswith(f"{f}.") or not f), None)
        if owner is not None and (not owner or not parameter.requires_grad):
            raise NotImplementedError(
                f"PEFT's format has modules that train as a whole, got {owner or 'the model'!r} "
                "of which a part trains"
            )
    names = _outer_names(model, layers)
    also = [n for n in names if n not in found and any(n.endswith(f) for f in found)]
    if also:
        raise NotImplementedError(
            f"PEFT takes modules_to_save for ends of names, got {found}, which are those of "
            f"{also}, too"
        )
    return found


def _belongs(parameter: str, layers: dict[str, Any]) -> bool:
    """Whether `parameter` belongs to an adapter; parameters of its base layer must not train."""
    owner = parameter.rpartition(".")[0]
    if owner in layers:
        return True
    for name in layers:
        if parameter.startswith(f"{name}."):
            raise NotImplementedError(
                f"PEFT's format has no trained weight below an adapter, got {parameter!r}"
            )
    return False


def _outer_names(model: nn.Module, layers: dict[str, Any]) -> list[str]:
    """Dotted names of the modules as they were before the layers were adapted."""
    inner = tuple(f"{name}." for name in layers)
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    return [name for name in names if name and not name.startswith(inner)]


def _target_modules(model: nn.Module, layers: dict[str, Any]) -> list[str] | str:
    """The last parts of the names if they identify these layers, else one pattern of all names."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    meant = {n for n in _outer_names(model, layers) if n.rpartition(".")[2] in ends}
    return ends if meant == layers.keys() else "|".join(re.escape(name) for name in layers)


def _use_rslora(layers: dict[str, Any]) -> bool:
    found = [(x.scaling, x.lora_alpha, x.lora_A.shape[0]) for x in layers.values()]
    for root in (False, True):
        if all(s == scaling(alpha, r, root) for s, alpha, r in found):
            return root
    raise NotImplementedError(
        "PEFT's format has the scaling α/R, or α/√R, for all layers, got "
        + ", ".join(sorted({f"{s:g}" for s, *_ in found}))
    )


def _usual(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _pattern(values: dict[str, Any]) -> dict[str, Any]:
    """{PEFT's pattern for one name: its value} for values other than the usual one."""
    usual = _usual(values.values())
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _one(option: str, values: Iterable[float]) -> float:
    found = sorted(set(values))
    if len(found) > 1:
        raise NotImplementedError(f"PEFT's format has one {option} for all layers, got {found}")
    return found[0]


def _integer(alpha: float) -> float:
    """As an int if it is whole, as other readers of the config expect."""
    return int(alpha) if float(alpha).is_integer() else alpha
