"""Adapters of models without PEFT, in PEFT's files, which PEFT can load, and the reverse.

``adapter_config.json`` is written and read by PEFT's own LoraConfig and VeraConfig,
``adapter_model.safetensors`` has the keys of :mod:`lora_fast.files.peft_format`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..base_layer.obstacles import tensor_obstacle
from ..modules.vera import VeRALinear, VeRAProjections
from ..optional_packages import needed
from .adapter_files import WEIGHTS, Header, adapter_config
from .peft_format import PeftAdapter, scaling
from .peft_read_back import config_as_peft_reads_it
from .safe_files import TensorFiles
from .whole_folder import WholeFolder

Model = TypeVar("Model", bound=nn.Module)

_PROJECTIONS = ("vera_A", "vera_B")
# Options of PEFT that are read here, or that do not affect what a trained adapter computes. Any
# other must have its default, since PEFT has layers that compute other results from these tensors.
_UNDERSTOOD = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path",
        "revision", "inference_mode", "r", "target_modules", "exclude_modules", "modules_to_save",
        "layers_to_transform", "layers_pattern", "lora_alpha", "lora_dropout", "use_rslora",
        "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "runtime_config", "ensure_weight_tying",
        "target_parameters", "vera_dropout", "d_initial", "init_weights", "projection_prng_key",
        "save_projection",
    }
)  # fmt: skip


def save_adapter(
    model: nn.Module, folder: str | Path, *, base_model_name_or_path: str | None = None
) -> Path:
    """Write the adapter of a model made by :func:`lora_fast.convert` for PEFT; return `folder`.

    Layers of a method that PEFT does not have are written as LoRA with the same change of W; that
    file is for PEFT, and :func:`load_adapter` does not read it back.

    `folder` must be new or empty, and appears once it is complete: ``adapter_config.json`` and
    ``adapter_model.safetensors``, which ``PeftModel.from_pretrained(base, folder)`` loads. Modules
    outside the adapters that train (``modules_to_save``) are saved as a whole.
    `base_model_name_or_path` is the base model named in the config, by default the ``name_or_path``
    of the model. Of several processes one must call; with sharded parameters (FSDP2) all must, and
    the first one writes.

    Raises ImportError without PEFT; ValueError for a model without adapted layers (a PEFT model has
    ``save_pretrained``); FileExistsError for a `folder` with something in it; NotImplementedError
    for parameters that are not in memory and for what PEFT's format cannot express: several
    methods, dropouts or projections in one model, a layer or a trained weight with several names, a
    scaling that is neither α/R nor α/√R everywhere, a gain of a method that PEFT does not have,
    parts of modules that train, and, with dropout or DoRA, layers whose names PEFT takes for a
    mixture's experts.
    """
    needed("peft", "saving or loading an adapter in PEFT's format")
    from safetensors.torch import save_file

    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"folder must be new or empty, got {path}")
    adapter = PeftAdapter(model)
    tensors, sharded = _gathered(adapter)
    _check_whole(tensors)
    config = config_as_peft_reads_it(adapter, tensors)
    name = base_model_name_or_path or adapter.model.__dict__.get("name_or_path")
    config.base_model_name_or_path, config.inference_mode = name or None, True
    if not sharded or torch.distributed.get_rank() == 0:
        with WholeFolder(path) as whole:
            config.save_pretrained(str(whole.path))
            save_file(tensors, whole.path / WEIGHTS, metadata={"format": "pt"})
    return path


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Load an adapter in PEFT's format into a model made by :func:`lora_fast.convert`; return it.

    `model` must be converted as the adapter was made: same method, layers, ranks, scalings and
    ``modules_to_save`` (as a whole, and training). Values are cast to the dtype of the parameter.
    VeRA's projections come from the file or, if it omits them, from its key. Dropout keeps the
    model's value.

    Raises ImportError without PEFT; ValueError that names them for keys that are missing,
    unexpected or of another shape, for another scaling, and for files that are not safetensors;
    NotImplementedError for options of PEFT that these layers do not have, and for sharded
    parameters: load before sharding. The model is then unchanged.
    """
    needed("peft", "saving or loading an adapter in PEFT's format")
    adapter, path = PeftAdapter(model), Path(folder)
    if adapter.folded:
        raise NotImplementedError(
            "model must have layers that PEFT has, got some that are saved as LoRA; load the "
            "folder with PEFT, or keep a state_dict()"
        )
    merged = next((name for name, layer in adapter.layers.items() if layer.merged), None)
    if merged is not None:
        raise ValueError(f"model must be unmerged, got a merged layer at {merged!r}")
    targets = adapter.tensors()
    _check_whole(targets)
    config = adapter_config(path)
    vera = adapter.method is VeRALinear
    _check_options(config, "VERA" if vera else "LORA", path)
    drawn = _drawn(targets, config, path) if vera and not config.save_projection else {}
    with TensorFiles(path, [WEIGHTS]) as files:
        expected = {key: target for key, target in targets.items() if key not in drawn}
        _check_header(files.header, expected, path / WEIGHTS)
        if not vera:
            _check_scalings(adapter.layers, config, path)
        values = drawn | {key: files.tensor(key) for key in expected}
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(values[key])
    return model


def _gathered(adapter: PeftAdapter) -> tuple[dict[str, Tensor], bool]:
    """The tensors to write, gathered in each process, and whether they were sharded."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in adapter.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # some may be gathered since the last call, and no DTensor
    found = {key: t.detach() for key, t in adapter.tensors().items()}
    sharded = any(hasattr(t, "full_tensor") for t in found.values())
    whole = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in found.items()}
    return {key: t.contiguous() for key, t in whole.items()}, sharded


def _check_whole(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        obstacle = tensor_obstacle(tensor, key)
        if obstacle is not None:
            raise NotImplementedError(f"tensors must be whole and in memory, got: {obstacle}")


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
            found = scaling(alpha, r, config.use_rslora)
        except (TypeError, ValueError, ZeroDivisionError, re.error) as error:
            raise ValueError(f"{path} must have ranks and alphas of PEFT, got: {error}") from error
        if found != layer.scaling:
            raise ValueError(
                f"{path}: {name} must have the model's scaling {layer.scaling:g}, got {found:g} "
                f"(lora_alpha {alpha}, r {r}, use_rslora {config.use_rslora})"
            )


def _drawn(targets: dict[str, Tensor], config: Any, path: Path) -> dict[str, Tensor]:
    """VeRA's projections, drawn from their key."""
    A, B = (targets[f"base_model.{name}"] for name in _PROJECTIONS)
    try:
        drawn = VeRAProjections(
            A.shape[1], B.shape[0], A.shape[0], projection_prng_key=config.projection_prng_key
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} must have a projection_prng_key, got: {error}") from error
    return {f"base_model.{name}": getattr(drawn, name) for name in _PROJECTIONS}
