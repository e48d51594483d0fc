"""Quantising experts while a model is loaded, a parameter at a time.

transformers makes a model on the meta device and then sets one parameter after the other, each made
of its part of the checkpoint: the experts' parameters are quantised as they are set. Loading in
threads, which reads ahead of that, is off meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .quantisation import check_options, check_weight, packed_like
from .storage import store_packed

# Parameters in place of others on the meta device that are no part of a checkpoint lack it.
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
    than one parameter of experts is in 16 bits at a time, beside the tensors of the checkpoint that
    transformers makes it of. Linear layers are quantised by ``quantization_config``. Models whose
    experts are no parameters, and modules made by other threads, stay as they are.

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
        with mock.patch.dict(os.environ, _READS_AHEAD):
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
