"""Adapt the linear layers of any model, without PEFT."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ..four_bit import is_four_bit
from ..four_bit.decoded import provide_for
from ..four_bit.decoding import CODES
from ..four_bit.layout import forbid_packing
from ..gated_mlps.switch import fuse
from ..optional_packages import needed
from .adapter_module import AdapterModule, check_base
from .dora import DoRALinear
from .expert_targets import check_experts, warn_of_experts
from .lora import LoRALinear, check_lora_arguments
from .vera import VeRALinear, VeRAProjections
from .weight_reads import multiplies_by_itself

Model = TypeVar("Model", bound=nn.Module)

_METHODS = ("lora", "dora", "vera")
_RANKS = {"lora": 16, "dora": 16, "vera": 256}
_QUANTIZATIONS = (None, *CODES)
_ALL_LINEAR = "all-linear"
# Names of the new head of a sequence classifier in transformers, which PEFT does not adapt either.
_CLASSIFIER_HEADS = ("score", "classifier")


def convert(
    model: Model,
    target_modules: str | Iterable[str],
    *,
    method: Literal["lora", "dora", "vera"] | Callable[[nn.Module], AdapterModule] = "lora",
    r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    projection_prng_key: int = 0,
    quantize: Literal["nf4", "fp4"] | None = None,
    modules_to_save: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    fuse_mlp: bool = True,
) -> Model:
    """Adapt the linear layers of `model` that `target_modules` names, in place.

        y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias

    "lora" and "dora" take `r` (16), `lora_alpha` (32) and `use_rslora`; "vera" takes `r` (256) and
    `projection_prng_key`, from which the A and B that all its layers share are drawn; it has no
    alpha. A method of your own is a function of the linear layer that returns an AdapterModule,
    such as ``partial(SVFTLinear.from_linear, r=4)``, and takes none of these options.
    `target_modules` is read as PEFT reads it: names or ends of dotted names; or one string,
    a regular expression for the whole dotted name; or "all-linear", every linear layer but the
    output head. Each target must be an ``nn.Linear`` or a ``bitsandbytes.nn.Linear4bit`` that the
    model calls; "all-linear" skips others, with a warning that names them, as it does experts that
    are parameters: :func:`lora_fast.accelerate` takes PEFT's adapters on those.
    `quantize` stores the targets that are dense in 4 bits (blocks of 64, double quantisation,
    computing in the dtype of the weight); the dense weights are released once all are quantised, so
    a failure changes nothing. Everything is frozen except the adapters and `modules_to_save`
    (names or ends of names, such as that of a new head), which are never adapted. A layer that is
    reachable under several names stays one layer. `fuse_mlp` is that of
    :func:`lora_fast.accelerate`: gated MLPs run as one operation.

    Raises TypeError or ValueError that names the argument, ImportError for `quantize`
    without bitsandbytes, before anything is changed.
    Sources: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), VeRA
    (Kopiczko et al. 2023), QLoRA (Dettmers et al. 2023).
    """
    _check_arguments(model, method, quantize)
    if not isinstance(fuse_mlp, bool):
        raise TypeError(f"fuse_mlp must be a bool, got {type(fuse_mlp).__name__}")
    if method == "vera" and (lora_alpha is not None or use_rslora):
        raise ValueError('lora_alpha and use_rslora must not be given with method="vera"')
    if callable(method) and (r, lora_alpha, lora_dropout, use_rslora) != (None, None, 0.0, False):
        raise ValueError("r, lora_alpha, lora_dropout and use_rslora must be given to `method`")
    r = _RANKS.get(str(method), 16) if r is None else r
    lora_alpha = 32.0 if lora_alpha is None else lora_alpha
    check_lora_arguments(r, lora_alpha, lora_dropout, dtype)
    kept = _kept(model, modules_to_save)
    if isinstance(target_modules, Iterable) and not isinstance(target_modules, str):
        target_modules = list(target_modules)
    named = _namers(target_modules)
    try:
        targets = _targets(model, target_modules, kept)
    except (TypeError, ValueError):
        check_experts(model, named)
        raise
    adapt: Callable[[nn.Module], AdapterModule]
    if callable(method):
        adapt = method
    elif method == "vera":
        projections = _projections(targets.values(), r, projection_prng_key, dtype)
        adapt = partial(
            VeRALinear.from_linear, r=r, vera_dropout=lora_dropout, projections=projections,
            dtype=dtype,
        )  # fmt: skip
    else:
        adapt = partial(
            (DoRALinear if method == "dora" else LoRALinear).from_linear, r=r,
            lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora, dtype=dtype,
        )  # fmt: skip

    trainable = {id(p): p.requires_grad for p in model.parameters()}
    try:
        adapted = {
            id(linear): adapt(_base(linear, quantize)) for linear in dict.fromkeys(targets.values())
        }
    except BaseException:
        for parameter in model.parameters():
            parameter.requires_grad_(trainable[id(parameter)])
        raise
    model.requires_grad_(False)
    for module in kept.values():
        module.requires_grad_(True)
    for name, linear in targets.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapted[id(linear)])
    forbid_packing(model)
    provide_for(model)
    if fuse_mlp:
        fuse(model)
    warn_of_experts(model, named, quantised=quantize is not None, stacklevel=3)
    return model


def _projections(
    targets: Iterable[Any], r: int, projection_prng_key: int, dtype: torch.dtype
) -> VeRAProjections:
    """A and B for the largest of the layers, as PEFT draws them."""
    layers = list(targets)
    return VeRAProjections(
        max(layer.in_features for layer in layers),
        max(layer.out_features for layer in layers),
        r,
        projection_prng_key=projection_prng_key,
        dtype=dtype,
        device=layers[0].weight.device,
    )


def _base(linear: nn.Module, quantize: str | None) -> nn.Module:
    """`linear` itself, or its 4-bit copy if it is dense and to be quantised."""
    if quantize is None or is_four_bit(linear) or not isinstance(linear, nn.Linear):
        return linear
    weight, bias = linear.weight, linear.bias
    quantised = needed("bitsandbytes.nn", f'quantize="{quantize}"').Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=bias is not None,
        compute_dtype=weight.dtype,
        compress_statistics=True,
        quant_type=quantize,
        device="meta",
    )
    quantised.weight = type(quantised.weight)(
        weight.detach(), requires_grad=False, quant_type=quantize, module=quantised
    ).to(weight.device)
    quantised.bias = bias
    return quantised.train(linear.training)


def _kept(model: nn.Module, modules_to_save: Any) -> dict[str, nn.Module]:
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save must be a list of names, got {modules_to_save!r}")
    kept = _named(model, "modules_to_save", list(modules_to_save))
    for name, module in kept.items():
        if not all(p.is_floating_point() for p in module.parameters()):
            raise ValueError(
                f"modules_to_save must be trainable, got {name!r} with quantised weights"
            )
    return kept


def _targets(
    model: nn.Module, target_modules: Any, kept: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """{dotted name: linear layer} to adapt, every one of them checked."""
    targets = {
        name: module
        for name, module in _matched(model, target_modules).items()
        if not any(name == k or name.startswith(f"{k}.") for k in kept)
    }
    if _names_all(target_modules):
        for name in [name for name in targets if _passed_by(model, name)]:
            warnings.warn(f"{name} gets no adapter: {_passed_by(model, name)}", stacklevel=3)
            del targets[name]
    if not targets:
        raise ValueError("target_modules must name a layer that is not in modules_to_save")
    for name, linear in targets.items():
        try:
            check_base(linear)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"target_modules must name linear layers, got {name!r}: {error}"
            ) from None
        passed_by = _passed_by(model, name)
        if passed_by is not None:
            raise ValueError(
                f"target_modules must name layers that are called, got {name!r}: {passed_by}"
            )
    return targets


def _passed_by(model: nn.Module, name: str) -> str | None:
    """Why an adapter on the layer `name` would have no effect, or only a partial one."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if not multiplies_by_itself(parent, child):
        return None
    return f"{type(parent).__name__} multiplies with its weight instead of calling it"


def _names_all(target_modules: Any) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == _ALL_LINEAR


def _matched(model: nn.Module, target_modules: Any) -> dict[str, nn.Module]:
    """{dotted name: module} of the targets, in the order of the model."""
    if isinstance(target_modules, str):
        if _names_all(target_modules):
            found = _all_linear(model)
        else:
            try:
                pattern = re.compile(target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules must be a regular expression, got {target_modules!r}: {error}"
                ) from None
            found = {n: m for n, m in _modules(model) if n and pattern.fullmatch(n)}
        if not found:
            raise ValueError(
                f"target_modules must match linear layers of the model, got {target_modules!r}; "
                f"it has {_linear_names(model)}"
            )
        return found
    names = list(target_modules) if isinstance(target_modules, Iterable) else [target_modules]
    if not names:
        raise ValueError("target_modules must name at least one layer, got an empty list")
    return _named(model, "target_modules", names)


def _named(model: nn.Module, argument: str, names: list[Any]) -> dict[str, nn.Module]:
    """{dotted name: module} of all modules whose name is, or ends with, one of `names`."""
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{argument} must be a string or a list of strings, got {name!r}")
    modules = _modules(model)
    unknown = [name for name in names if not any(_ends_with(full, name) for full, _ in modules)]
    if unknown:
        raise ValueError(
            f"{argument} must name modules of the model, got {', '.join(map(repr, unknown))}; "
            f"its linear layers are {_linear_names(model)}"
        )
    return {full: m for full, m in modules if any(_ends_with(full, name) for name in names)}


def _namers(target_modules: Any) -> list[Callable[[str], bool]]:
    """For every target whether it names what is at a dotted name; "all-linear" names everything."""
    if _names_all(target_modules):
        return [lambda full: True]
    if isinstance(target_modules, str):
        with contextlib.suppress(re.error):
            pattern = re.compile(target_modules)
            return [lambda full: pattern.fullmatch(full) is not None]
        return []
    names = target_modules if isinstance(target_modules, list) else []
    return [partial(_ends_with, name=n) for n in names if isinstance(n, str) and n]


def _all_linear(model: nn.Module) -> dict[str, nn.Module]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = (
        [output]
        if output is not None
        else [
            head for name in _CLASSIFIER_HEADS if (head := getattr(model, name, None)) is not None
        ][:1]
    )
    return {
        name: module
        for name, module in _modules(model)
        if name and isinstance(module, nn.Linear) and not any(module is head for head in heads)
    }


def _check_arguments(model: Any, method: Any, quantize: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model must contain its linear layers, got one layer; use LoRALinear.from_linear"
        )
    if method not in _METHODS and not callable(method):
        known = ", ".join(_METHODS)
        raise ValueError(f"method must be one of {known}, got {method!r}; or a function of a layer")
    if quantize not in _QUANTIZATIONS:
        raise ValueError(f"quantize must be one of {_QUANTIZATIONS}, got {quantize!r}")
    peft = sys.modules.get("peft.tuners.tuners_utils")
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule):
            raise ValueError(f"model must not be adapted yet, got an adapted layer at {name!r}")
        if peft is not None and isinstance(module, peft.BaseTunerLayer):
            raise ValueError(
                f"model must not be adapted yet, got a PEFT layer at {name!r}; "
                "use lora_fast.accelerate"
            )


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))


def _ends_with(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _linear_names(model: nn.Module) -> str:
    """The last parts of the names of all linear layers, each once."""
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return ", ".join(sorted(names)) or "no linear layer"
