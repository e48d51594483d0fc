"""Adapters on disk, checked name by name and shape by shape before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import some
from .safe_files import Entry, inside, read_json

CONFIG, WEIGHTS, CHANGED = "adapter_config.json", "adapter_model.safetensors", "weights.safetensors"
PREFIX = "base_model.model."
# Initialisations that change the base weight relative to its checkpoint.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Header = Mapping[str, Entry]


def adapter_config(folder: Path, *, has_weights: bool = True) -> Any:
    """PEFT's config of the adapter in `folder`, which `has_weights` unless it is to be trained.

    Nothing that it names is imported: Megatron layers, whose module a config may name, are refused.

    Raises ValueError: there is no adapter, it is not in safetensors, or its config is invalid.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    raw = read_json(folder, CONFIG)
    if has_weights and not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} must hold {WEIGHTS}, got none: only safetensors are read, save the adapter "
            "with save_pretrained"
        )
    if has_weights:
        inside(folder, WEIGHTS)
    if raw.get("peft_type") not in {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}:
        kind = raw.get("peft_type")
        raise ValueError(f"{folder / CONFIG} must name a peft_type of PEFT, got {kind!r}")
    if raw.get("megatron_config") is not None:
        raise ValueError(f"{folder / CONFIG} must not have a megatron_config")
    if raw.get("layer_replication"):
        raise NotImplementedError(
            f"{folder / CONFIG} has layer_replication, which makes a deeper model of the base: "
            "merge with PEFT's merge_and_unload"
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT does not check the values: any error may follow
        raise ValueError(f"{folder / CONFIG} must be a config of PEFT, got: {error}") from error
    config.auto_mapping = None
    _settle_initialisation(config, folder)
    return config


def _settle_initialisation(config: Any, folder: Path) -> None:
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith(MOVES_BASE):
        raise ValueError(
            f"{folder / CONFIG}: the adapter must belong to the unchanged base, got "
            f"init_lora_weights {start!r}, which changes the base; save it with "
            "path_initial_model_for_weight_conversion"
        )
    if start is not None:
        config.init_lora_weights = True


def adapt(skeleton: nn.Module, config: Any, folder: Path) -> Any:
    """PEFT's model around `skeleton`, on the meta device.

    Raises ValueError: the config does not fit the model; NotImplementedError: a method that changes
    no weight, which cannot be merged.
    """
    from peft import get_peft_model

    if config.is_prompt_learning:
        raise NotImplementedError(
            f"{folder}: the adapter must change weights to be merged, got "
            f"{config.peft_type.value}, which is part of the input"
        )
    try:
        return get_peft_model(skeleton, config)
    except Exception as error:  # for example target_modules that are not a regular expression
        raise ValueError(f"{folder / CONFIG} must fit the base model: {error}") from error


def check_header(header: Header, model: Any, config: Any, path: Path) -> None:
    """Check an adapter's file against the model that it is for.

    Raises ValueError: a tensor is unknown, missing or has another shape.
    """
    expected = expected_shapes(model, config)
    optional = _embeddings(model)
    unknown = sorted(header.keys() - expected.keys() - optional.keys())
    missing = sorted(expected.keys() - header.keys())
    if unknown:
        raise ValueError(f"{path} must hold tensors of this model, got {some(unknown)}")
    if missing:
        raise ValueError(f"{path} must hold every tensor of its config, misses {some(missing)}")
    for key, (shape, dtype) in header.items():
        wanted = expected.get(key) or optional[key]
        if shape != wanted:
            raise ValueError(f"{path}: {key} must have shape {wanted}, got {shape}")
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ValueError(
                f"{path}: {key} must be floating point of 16 bits or more, got "
                f"{str(dtype).removeprefix('torch.')}"
            )


def expected_shapes(model: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the file that PEFT's `model` saves."""
    from peft import get_peft_model_state_dict

    # AdaLoRA's file holds the directions that its pattern keeps; PEFT would select them from
    # tensors that do not exist here.
    pattern = config.rank_pattern if config.peft_type == "ADALORA" else None
    if pattern is not None:
        config.rank_pattern = None
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    if pattern is not None:
        config.rank_pattern = pattern
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for name, kept in (pattern or {}).items():
        layer, rank = f"{PREFIX}{name.removesuffix('.default').removesuffix('.lora_E')}", sum(kept)
        for factor in ("lora_A", "lora_B", "lora_E"):
            whole = shapes.get(f"{layer}.{factor}")
            if whole is None:
                raise ValueError(f"rank_pattern must name layers of the model, got {name}")
            shapes[f"{layer}.{factor}"] = (
                (whole[0], rank) if factor == "lora_B" else (rank, whole[1])
            )
    return shapes


def _embeddings(model: Any) -> dict[str, tuple[int, ...]]:
    """Weights of the base that PEFT may store beside an adapter."""
    base, found = model.get_base_model(), {}
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    inner = {id(getattr(layer, "base_layer", layer)) for layer in layers if layer is not None}
    for name, module in model.named_modules():
        if id(module) in inner or any(module is layer for layer in layers):
            for key, tensor in module.named_parameters(recurse=False):
                found[f"{name}.{key}"] = tuple(tensor.shape)
    return found
