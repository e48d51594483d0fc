"""The tensors that training changed: for checkpoints, a second arm and other programs.

An NF4 weight is stored as bitsandbytes stores it in a state dict: its packed bytes under its own
name, its constants below it (``….weight.absmax``, …).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files.safe_files import TensorFiles
from ..four_bit.layout import forbid_packing

ALLOCATOR = "rank_allocator"
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

Tensors = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], Tensor]


def capture(model: nn.Module, *, frozen: bool) -> Tensors:
    """Copies of everything that a training step may change, by name.

    That is every parameter that trains, the state of AdaLoRA's rank allocator and, with
    ``frozen``, the frozen weights below LoRA layers, which Delta-LoRA moves.
    """
    found: Tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if frozen:
        found |= base_weights(model)
    found |= _allocator_tensors(model)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def restore(model: nn.Module, tensors: Tensors | Path) -> None:
    """Put back what :func:`capture` returned, in place: the tensors, or the file that holds them.

    Raises ValueError: a tensor does not belong to this model or has another shape, or one that
    trains is missing; the model is then unchanged.
    """
    with _opened(tensors) as (shapes, read, source):
        state = {name: s for name, s in shapes.items() if not name.startswith(ALLOCATOR)}
        missing = sorted(trained(model).keys() - state.keys())
        if missing:
            raise ValueError(f"{source} must hold all that trains, misses {missing[0]}")
        _load(model, state, read, source)
        _restore_allocator(model, {name: read(name) for name in shapes.keys() - state.keys()})


def trained(model: nn.Module) -> Tensors:
    """Every parameter that trains, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def base_weights(model: nn.Module) -> Tensors:
    """The frozen weight of every LoRA layer, by its name in ``model``."""
    from ..acceleration.report import adapted_layers

    found: Tensors = {}
    for name, layer in adapted_layers(model):
        own = layer.base_layer.state_dict()  # type: ignore[union-attr]
        weight = {key: tensor for key, tensor in own.items() if key.startswith("weight")}
        found |= {f"{name}.base_layer.{key}": tensor for key, tensor in weight.items()}
    return found


def unwrapped(tensors: Tensors) -> Tensors:
    """``tensors`` under the names that they have in the model without PEFT around it."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
    }


def save_weights(tensors: Tensors, path: Path) -> None:
    """Write tensors as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load into ``model``, in place, weights that ``lora-fast train`` saved; return ``model``.

    Raises ValueError: the file is truncated or not safetensors, a name is not of this model, a
    shape differs, or the one is quantised and the other is not; the model is then unchanged;
    FileNotFoundError: there is no such file.
    """
    forbid_packing(model)
    with _opened(Path(path)) as (shapes, read, source):
        _load(model, shapes, read, source)
    return model


@contextmanager
def _opened(tensors: Tensors | Path) -> Iterator[tuple[Shapes, Read, str]]:
    """Shapes, and a function that returns values: those of a file are read on demand."""
    if not isinstance(tensors, Path):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        yield shapes, tensors.__getitem__, "the checkpoint"
        return
    path = tensors.resolve(strict=True)
    with TensorFiles(path.parent, [path.name]) as files:
        yield {name: entry.shape for name, entry in files.header.items()}, files.tensor, str(path)


def _load(model: nn.Module, shapes: Shapes, read: Read, source: str) -> None:
    parameters = dict(model.named_parameters())
    owners = sorted({_owner(name) for name in shapes})
    unknown = [name for name in owners if name not in parameters]
    if unknown:
        raise ValueError(f"{source} must hold parameters of this model, got {unknown[0]}")
    for name in owners:
        _check(name, parameters[name], shapes, source)
    with torch.no_grad():
        for name in owners:
            parameter = parameters[name]
            parameter.data.copy_(read(name))
            constants = {key: read(f"{name}.{key}") for key in _constants(name, shapes)}
            if constants:
                kind = type(parameter.quant_state)  # type: ignore[attr-defined]
                state = kind.from_dict(constants, device=parameter.device)
                parameter.quant_state = state  # type: ignore[attr-defined]
    for module in model.modules():
        # bitsandbytes also keeps the state in the module, and uses that one after a move.
        if getattr(module, "quant_state", None) is not None:
            module.quant_state = module.weight.quant_state  # type: ignore[union-attr]


def _check(name: str, parameter: nn.Parameter, shapes: Shapes, source: str) -> None:
    if name not in shapes:
        raise ValueError(f"{source} must hold {name}, got its constants only")
    given, quantised = shapes[name], hasattr(parameter, "quant_state")
    if given != tuple(parameter.shape) or quantised != bool(_constants(name, shapes)):
        raise ValueError(
            f"{source}: {name} must have shape {tuple(parameter.shape)}"
            f"{' and be NF4' if quantised else ''}, got {given}"
        )


def _owner(name: str) -> str:
    """The parameter that a tensor belongs to: ``a.weight.absmax`` to ``a.weight``."""
    head, found, _ = name.partition(".weight.")
    if found and name.rpartition(".")[2] in _CONSTANTS:
        return f"{head}.weight"
    return f"{head}.weight" if ".weight.quant_state." in name else name


_CONSTANTS = frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map"})


def _constants(name: str, shapes: Shapes) -> list[str]:
    prefix = f"{name}."
    return [key.removeprefix(prefix) for key in shapes if key.startswith(prefix)]


def _allocator(model: Any) -> Any:
    return getattr(getattr(model, "base_model", None), "rankallocator", None)


def _allocator_tensors(model: nn.Module) -> Tensors:
    allocator = _allocator(model)
    if allocator is None:
        return {}
    found: Tensors = {}
    for average in _AVERAGES:
        for name, tensor in getattr(allocator, average).items():
            found[f"{ALLOCATOR}:{average}:{name}"] = tensor
    for name, kept in (allocator.peft_config.rank_pattern or {}).items():
        found[f"{ALLOCATOR}:kept:{name}"] = torch.tensor(kept)
    return found


def _restore_allocator(model: nn.Module, tensors: Tensors) -> None:
    allocator = _allocator(model)
    if allocator is None:
        return
    allocator.reset_ipt()
    pattern: dict[str, list[bool]] = {}
    for key, tensor in tensors.items():
        _, kind, name = key.split(":", 2)
        if kind == "kept":
            pattern[name] = tensor.tolist()
        else:
            getattr(allocator, kind)[name] = tensor.to(_device(model))
    allocator.peft_config.rank_pattern = pattern or None


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
