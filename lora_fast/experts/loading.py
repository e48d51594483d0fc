"""Quantising experts while a model is loaded, a parameter at a time.

transformers makes a model on the meta device and then sets one parameter after the other from its
part of the checkpoint: the experts' parameters are quantised as they are set. Loading in threads
would read ahead of that and is off meanwhile. Where a checkpoint holds each expert apart,
transformers reads all of them, stacks them and joins gate and up; here each is written to its place
in the parameter as it is read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .quantisation import check_options, check_weight, packed_like
from .storage import store_packed

# Absent on parameters that replace meta ones and are not part of a checkpoint.
_LOADED = "_is_hf_initialized"
_READS_AHEAD = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}


@contextmanager
def quantize_experts_on_load(
    *, quant_type: str = "nf4", blocksize: int = 64, double_quant: bool = True
) -> Iterator[None]:
    """Store the experts of a model in NF4 while ``from_pretrained`` loads it in this block.

        with lora_fast.quantize_experts_on_load():
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)

    The model is that of :func:`lora_fast.quantize_experts` after loading, bit for bit, but no more
    than one parameter of experts is in 16 bits at a time, beside one expert of the checkpoint.
    Linear layers are quantised by ``quantization_config``. Models whose experts are no parameters,
    and modules made by other threads, stay as they are.

    Raises TypeError or ValueError for arguments that are out of range, a block that loads no
    experts and, from ``from_pretrained``, experts whose elements are not a multiple of `blocksize`;
    ImportError without bitsandbytes.
    """
    check_options(quant_type, blocksize, double_quant)
    with packing_on_load(blocksize=blocksize, double_quant=double_quant) as loading:
        yield
    if not loading.packed:
        raise ValueError(
            "the block must load a model whose experts are parameters [E, …, …], got none; call "
            "lora_fast.quantize_experts on a model that was loaded otherwise"
        )


@contextmanager
def packing_on_load(*, blocksize: int = 64, double_quant: bool = True) -> Iterator[Loading]:
    """The same for a model with or without experts; its parameters that were packed are `packed` of
    what this gives."""
    loading = Loading(blocksize, double_quant)
    called: Any = loading  # that it may give another parameter is missing from its annotation
    hook = register_module_parameter_registration_hook(called)
    try:
        with mock.patch.dict(os.environ, _READS_AHEAD), _joining_by_expert():
            yield loading
    finally:
        hook.remove()
    loading.finish()


class Loading:
    """Called for every parameter that any module registers; packs those of loaded experts.

    Until :meth:`finish` the modules keep their class, so that transformers finds the bytes that it
    has set, not what they stand for.
    """

    def __init__(self, blocksize: int, double_quant: bool) -> None:
        self._blocksize, self._double_quant = blocksize, double_quant
        self._thread = threading.get_ident()
        self.packed: list[tuple[nn.Module, str, nn.Parameter, Any]] = []

    def __call__(self, module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
        if threading.get_ident() != self._thread or not _is_loaded(module, name, parameter):
            return None
        check_weight(f"{type(module).__name__}.{name}", parameter, self._blocksize)
        packed, state = packed_like(parameter, self._blocksize, self._double_quant)
        made = nn.Parameter(packed, requires_grad=False)
        setattr(made, _LOADED, True)
        self.packed.append((module, name, made, state))
        return made

    def finish(self) -> None:
        for module, name, made, state in self.packed:
            if module._parameters.get(name) is made:
                store_packed(module, name, made.detach(), state)


@contextmanager
def _joining_by_expert() -> Iterator[None]:
    """Let transformers join the experts of a parameter as they are read."""
    try:
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # there is none, or one before 5
        yield
        return
    materialize: Any = WeightConverter.materialize_tensors

    def joined_later(self: Any) -> Any:
        if not _joins_experts(self):
            return materialize(self)
        # Of a copy that transformers makes for each parameter.
        self.operations = [JoinedByExpert(), *self.operations[_joining(self) :]]
        reads = dict(self.collected_tensors)
        self.collected_tensors.clear()
        return reads

    with mock.patch.object(WeightConverter, "materialize_tensors", joined_later):
        yield


def _joining(converter: Any) -> int:
    """How many operations of a converter stack experts and join their parts."""
    found = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations[:2]]
    if found == [("MergeModulelist", 0), ("Concatenate", 1)]:
        return 2
    return int(found[:1] == [("MergeModulelist", 0)] and len(converter.source_patterns) == 1)


def _joins_experts(converter: Any) -> bool:
    # A process of several may read a part of the experts alone.
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    reads = [read for tensors in converter.collected_tensors.values() for read in tensors]
    one_target = len(converter.target_patterns) == 1
    return alone and one_target and _joining(converter) > 0 and all(map(callable, reads))


class JoinedByExpert:
    """In place of transformers' operations that stack experts and join their parts: of functions
    that read the parts of experts, each [N_i, …], one tensor [E, Σ N_i, …]."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Callable[[], Tensor]]],
        source_patterns: list[str],
        target_patterns: list[str],
        **_: Any,
    ) -> dict[str, Tensor]:
        parts = [input_dict.pop(name) for name in source_patterns if name in input_dict]
        whole: Any = None
        sizes: list[torch.Size] = []
        for expert, of_one in enumerate(zip(*parts, strict=True)):
            tensors: Iterable[Tensor] = (read() for read in of_one)
            if whole is None:
                tensors = list(tensors)
                sizes = [part.shape for part in tensors]
                whole = tensors[0].new_empty(len(parts[0]), *_joined(sizes))
            places = whole[expert].split([n[0] for n in sizes]) if sizes[1:] else [whole[expert]]
            for part, place in zip(tensors, places, strict=True):
                if part.shape != place.shape:
                    raise ValueError(
                        f"experts must have parts of one shape, got {tuple(part.shape)} of expert "
                        f"{expert} for {tuple(place.shape)}"
                    )
                place.copy_(part)
        return {target_patterns[0]: whole}


def _joined(sizes: list[torch.Size]) -> tuple[int, ...]:
    """The shape of an expert, of those of its parts."""
    return (sum(n[0] for n in sizes), *sizes[0][1:]) if sizes[1:] else sizes[0]


def _is_loaded(module: nn.Module, name: str, parameter: Any) -> bool:
    """Whether a tensor of a checkpoint takes the place of experts on the meta device."""
    before = module._parameters.get(name)
    return (
        before is not None
        and before.is_meta
        and before.dim() == 3
        and before.shape[0] == getattr(module, "num_experts", None)
        and getattr(parameter, _LOADED, False)
        and not parameter.is_meta
        and parameter.shape == before.shape
    )
