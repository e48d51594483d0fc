"""Adapters of models without PEFT, in PEFT's files: PEFT loads what is saved here, and back.

adapter_config.json           written by PEFT's LoraConfig or VeraConfig
adapter_model.safetensors     base_model.model.<path>.lora_A.weight [R, K], .lora_B.weight [N, R]
                              DoRA: .lora_magnitude_vector [N]
                              VeRA: .vera_lambda_b [N], .vera_lambda_d [R], and once for all
                              layers base_model.vera_A [R, K], base_model.vera_B [N, R]
                              base_model.model.<path>.<name> of modules that train as a whole
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapter_module import AdapterModule
from .base_linear import tensor_obstacle
from .dora import DoRALinear
from .export.adapter_files import PREFIX, WEIGHTS, Header, adapter_config
from .export.safe_files import TensorFiles
from .export.whole_folder import WholeFolder
from .modules import LoRALinear
from .vera import VeRALinear, VeRAProjections

Model = TypeVar("Model", bound=nn.Module)

_PARAMETERS: dict[type, dict[str, str]] = {
    LoRALinear: {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
    DoRALinear: {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude_vector": "lora_magnitude_vector",
    },
    VeRALinear: {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
}
_PROJECTIONS = ("vera_A", "vera_B")
# Options of PEFT that are read here, or that say nothing of what a trained adapter computes. Any
# other one must have its default: PEFT has layers that compute something else of the same tensors.
_UNDERSTOOD = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "inference_mode", "r", "target_modules", "exclude_modules", "modules_to_save",
        "layers_to_transform", "layers_pattern", "lora_alpha", "lora_dropout", "use_rslora",
        "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
        "vera_dropout", "d_initial", "init_weights", "projection_prng_key", "save_projection",
    }
)  # fmt: skip


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model_name_or_path: str | None = None
) -> Path:
    """Write the adapter of a model made by :func:`lora_fast.convert` for PEFT; return `folder`.

    `folder` is new or empty, and appears when it is complete: ``adapter_config.json`` and
    ``adapter_model.safetensors``, which ``PeftModel.from_pretrained(base, folder)`` loads. Modules
    outside the adapters that train (``modules_to_save``) are saved as a whole.
    `base_model_name_or_path` is what the config says that the adapter is for, by default the
    ``name_or_path`` of the model. Of several processes one must call.

    Raises ImportError without PEFT; ValueError for a model without adapted layers (a PEFT model has
    ``save_pretrained``); NotImplementedError for what PEFT's format cannot say: several methods,
    dropouts or projections in one model, a layer or a trained weight with several names, a scaling
    that is neither α/R nor α/√R everywhere, parts of modules that train, sharded parameters;
    FileExistsError for a `folder` with something in it.
    """
    _require_peft()
    from safetensors.torch import save_file

    model = _unwrapped(model)
    layers = _layers(model)
    kept = _modules_to_save(model, layers)
    config = _config(model, layers, kept)
    name = base_model_name_or_path or model.__dict__.get("name_or_path")
    config.base_model_name_or_path, config.inference_mode = name or None, True
    tensors = {k: t.detach().contiguous() for k, t in _tensors(model, layers, kept).items()}
    with WholeFolder(Path(folder)) as whole:
        config.save_pretrained(str(whole.path))
        save_file(tensors, whole.path / WEIGHTS, metadata={"format": "pt"})
    return Path(folder)


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Load an adapter in PEFT's format into a model made by :func:`lora_fast.convert`; return it.

    `model` must be converted as the adapter was made: same method, layers, ranks, scalings and
    ``modules_to_save`` (as a whole, and training). Values are cast to the dtype of the parameter.
    VeRA's projections come from the file or, where it leaves them out, from its key. Dropout stays
    as the model has it.

    Raises ImportError without PEFT; ValueError that names them for keys that are missing,
    unexpected or of another shape, for another scaling, and for files that are no safetensors;
    NotImplementedError for options of PEFT that these layers do not have. The model is then
    unchanged.
    """
    _require_peft()
    plain, path = _unwrapped(model), Path(folder)
    layers = _layers(plain)
    merged = next((name for name, layer in layers.items() if layer.merged), None)
    if merged is not None:
        raise ValueError(f"model must be unmerged, got a merged layer at {merged!r}")
    targets = _tensors(plain, layers, _modules_to_save(plain, layers))
    config = adapter_config(path)
    vera = _method(layers) is VeRALinear
    _check_options(config, "VERA" if vera else "LORA", path)
    drawn = _drawn(targets, config, path) if vera and not config.save_projection else {}
    with TensorFiles(path, [WEIGHTS]) as files:
        expected = {key: target for key, target in targets.items() if key not in drawn}
        _check_header(files.header, expected, path / WEIGHTS)
        if not vera:
            _check_scalings(layers, config, path)
        values = drawn | {key: files.tensor(key) for key in expected}
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(values[key])
    return model


def _require_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "adapters are saved and loaded in PEFT's format: pip install 'lora_fast[peft]'"
        ) from error


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
    _method(layers)
    return layers


def _method(layers: dict[str, Any]) -> type:
    found = {type(layer) for layer in layers.values()}
    if len(found) > 1 or not found <= _PARAMETERS.keys():
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
    """Whether it is a parameter of an adapter; those of its base layer must not train."""
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


def _tensors(model: nn.Module, layers: dict[str, Any], kept: list[str]) -> dict[str, Tensor]:
    """{key in PEFT's file: the tensor in the model}."""
    keys = _PARAMETERS[_method(layers)]
    found: dict[str, Tensor] = {
        f"{PREFIX}{name}.{key}": getattr(layer, parameter)
        for name, layer in layers.items()
        for parameter, key in keys.items()
    }
    if _method(layers) is VeRALinear:
        shared = {id(layer.projections): layer.projections for layer in layers.values()}
        if len(shared) > 1:
            raise NotImplementedError(
                f"PEFT's VeRA has projections that all layers share, got {len(shared)} of them"
            )
        (projections,) = shared.values()
        K, N = (max(getattr(x, f"{n}_features") for x in layers.values()) for n in ("in", "out"))
        found["base_model.vera_A"] = projections.vera_A[:, :K]
        found["base_model.vera_B"] = projections.vera_B[:N]
    for name in kept:
        state = model.get_submodule(name).state_dict()
        found |= {f"{PREFIX}{name}.{key}": value for key, value in state.items()}
    for key, tensor in found.items():
        obstacle = tensor_obstacle(tensor, key)
        if obstacle is not None:
            raise NotImplementedError(f"tensors must be whole and in memory, got: {obstacle}")
    return found


def _config(model: nn.Module, layers: dict[str, Any], kept: list[str]) -> Any:
    from peft import LoraConfig, VeraConfig

    method, first = _method(layers), next(iter(layers.values()))
    common = {"target_modules": _target_modules(model, layers), "modules_to_save": kept or None}
    if method is VeRALinear:
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
        use_dora=method is DoRALinear,
        **common,
    )


def _target_modules(model: nn.Module, layers: dict[str, Any]) -> list[str] | str:
    """The last parts of the names where they mean these layers, else all names in one pattern."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    meant = {n for n in _outer_names(model, layers) if n.rpartition(".")[2] in ends}
    return ends if meant == layers.keys() else "|".join(re.escape(name) for name in layers)


def _use_rslora(layers: dict[str, Any]) -> bool:
    found = [(x.scaling, x.lora_alpha, x.lora_A.shape[0]) for x in layers.values()]
    for root in (False, True):
        if all(scaling == _scaling(alpha, r, root) for scaling, alpha, r in found):
            return root
    raise NotImplementedError(
        "PEFT's format has the scaling α/R, or α/√R, for all layers, got "
        + ", ".join(sorted({f"{scaling:g}" for scaling, *_ in found}))
    )


def _scaling(alpha: float, r: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(r) if use_rslora else r)


def _usual(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _pattern(values: dict[str, Any]) -> dict[str, Any]:
    """{PEFT's pattern for one name: its value} where it is not the usual one."""
    usual = _usual(values.values())
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != usual}


def _one(option: str, values: Iterable[float]) -> float:
    found = sorted(set(values))
    if len(found) > 1:
        raise NotImplementedError(f"PEFT's format has one {option} for all layers, got {found}")
    return found[0]


def _integer(alpha: float) -> float:
    """As an int where it is one, which is what other readers of the config expect."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _check_options(config: Any, kind: str, path: Path) -> None:
    if config.peft_type.value != kind:
        raise ValueError(f"{path} must hold a {kind} adapter, got {config.peft_type.value}")
    default = type(config)()
    for option in sorted(vars(config).keys() - _UNDERSTOOD):
        if getattr(config, option) != getattr(default, option, None):
            raise NotImplementedError(
                f"{path}: {option} must be {getattr(default, option, None)!r} for layers without "
                f"PEFT, got {getattr(config, option)!r}; use PEFT and lora_fast.accelerate"
            )


def _check_header(header: Header, expected: dict[str, Tensor], path: Path) -> None:
    for found, problem in (
        (expected.keys() - header.keys(), "must hold every tensor of the model's adapter, misses"),
        (header.keys() - expected.keys(), "must hold tensors of the model's adapter alone, got"),
    ):
        if found:
            raise ValueError(f"{path} {problem} {', '.join(sorted(found))}")
    for key, target in expected.items():
        shape, dtype = header[key]
        if shape != tuple(target.shape):
            raise ValueError(f"{path}: {key} must have shape {tuple(target.shape)}, got {shape}")
        if dtype.is_floating_point != target.is_floating_point():
            raise ValueError(f"{path}: {key} must be {target.dtype} or like it, got {dtype}")


def _check_scalings(layers: dict[str, Any], config: Any, path: Path) -> None:
    from peft.utils.other import get_pattern_key

    for name, layer in layers.items():
        try:
            ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
            r = ranks.get(get_pattern_key(list(ranks), name), config.r)
            alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
            found = _scaling(alpha, r, config.use_rslora)
        except (TypeError, ValueError, ZeroDivisionError, re.error) as error:
            raise ValueError(f"{path} must have ranks and alphas of PEFT, got: {error}") from error
        if found != layer.scaling:
            raise ValueError(
                f"{path}: {name} must have the model's scaling {layer.scaling:g}, got {found:g} "
                f"(lora_alpha {alpha}, r {r}, use_rslora {config.use_rslora})"
            )


def _drawn(targets: dict[str, Tensor], config: Any, path: Path) -> dict[str, Tensor]:
    """VeRA's projections from the key that stands for them."""
    A, B = (targets[f"base_model.{name}"] for name in _PROJECTIONS)
    try:
        drawn = VeRAProjections(
            A.shape[1], B.shape[0], A.shape[0], projection_prng_key=config.projection_prng_key
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} must have a projection_prng_key, got: {error}") from error
    return {f"base_model.{name}": getattr(drawn, name) for name in _PROJECTIONS}
