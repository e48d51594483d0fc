"""What a forward pass saves for backward, counted on fake tensors.

The real forward pass of the real modules runs, under the autocast of training, with
``torch.autograd.graph.saved_tensors_hooks``: whole storages, each once, without parameters and the
batch. The repeated blocks of the model tell what gradient checkpointing would save instead: the
inputs of all blocks, and the storages of one block at a time. Attention counts as one fused kernel
that saves no mask and no scores, which is what SDPA and FlashAttention are without padding.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..acceleration.report import adapted_layers
from ..acceleration.switch import accelerate
from ..skeleton import imagined

ATTENTION = "lora_fast_fused"
BEFORE, AFTER = -1, -2
DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


@dataclass(frozen=True)
class Activations:
    """Bytes. ``blocks``: saved by each repeated block alone; ``before`` and ``after``: everything
    else except the logits, up to the end of the last block and after it; ``boundaries``: inputs of
    the blocks not in ``before``; ``recomputed``: saved by the largest block in addition to
    them. ``logits``: see :func:`_logits_bytes`. ``widest``: the largest single storage of a block.
    """

    before: int
    after: int
    blocks: tuple[int, ...]
    boundaries: int
    recomputed: int
    logits: int
    widest: int

    def kept(self, *, checkpointing: bool) -> int:
        """Bytes alive when the backward pass begins or, with checkpointing, at its peak."""
        if checkpointing:
            # Storages after the blocks are freed before the first block is recomputed.
            return self.before + self.boundaries + max(self.recomputed, self.after)
        return self.before + sum(self.blocks) + self.after

    def scaled(self, factor: float) -> Activations:
        """The same for `factor` times as many tokens, in a batch of the same length."""
        numbers = {
            name: int(factor * value) for name, value in vars(self).items() if name != "blocks"
        }
        return replace(self, blocks=tuple(int(factor * b) for b in self.blocks), **numbers)


def count_activations(
    model: nn.Module,
    *,
    task: str | None,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    fused: bool,
) -> Activations:
    """Count the forward pass of `model`, which may live on the meta device or anywhere.

    `fused`: as after :func:`lora_fast.accelerate`.

    Raises NotImplementedError: the forward pass depends on values, or on inputs other than tokens.
    """
    with warnings.catch_warnings(), imagined(model) as fake:
        warnings.simplefilter("ignore")
        fake.train()
        if fused and next(adapted_layers(fake), None) is not None:
            accelerate(fake)
            _keep_no_masks(fake)
        _use_fused_attention(fake)
        shape = (batch_size, max_length)
        batch = {"input_ids": torch.zeros(shape, dtype=torch.long)}
        if task is not None:
            labels = shape if task == "causal-lm" else shape[:1]
            batch["labels"] = torch.zeros(labels, dtype=torch.long)
        try:
            return _traced(fake, batch, dtype)
        except Exception as error:  # a model's own code may raise anything without values
            kind = type(getattr(fake, "base_model", fake)).__name__
            raise NotImplementedError(
                f"activations must be countable without values, got {kind}: {_first(error)}"
            ) from error


def _keep_no_masks(model: nn.Module) -> None:
    """The kernels save a dropout mask as its seed and regenerate it in backward."""
    for _, layer in adapted_layers(model):
        for module in layer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


@dataclass
class _Record:
    """Saved storages, by the place that saved them first: the index of a block, BEFORE (outside
    all blocks, before the end of the last) and AFTER."""

    permanent: set[int]
    count: int
    saved: dict[int, tuple[torch.UntypedStorage, int]] = field(default_factory=dict)
    wide: set[int] = field(default_factory=set)
    inputs: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    place: int = BEFORE
    vocabulary: int | None = None

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.permanent and key not in self.saved:
            self.saved[key] = (storage, self.place)
            if self.place < 0 and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary:
                self.wide.add(key)
        return tensor

    def enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.place = index
        for value in _tensors([*args, *kwargs.values()]):
            storage = value.untyped_storage()
            if storage._cdata not in self.permanent:
                self.inputs[storage._cdata] = storage

    def leave(self) -> None:
        self.place = AFTER if self.place == self.count - 1 else BEFORE


def _traced(model: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> Activations:
    constant = [*model.parameters(), *model.buffers(), *batch.values()]
    blocks = blocks_of(model)
    record = _Record({t.untyped_storage()._cdata for t in constant}, len(blocks))
    config = getattr(model, "config", None)
    record.vocabulary = getattr(config, "vocab_size", None)
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: record.enter(index, args, kwargs), with_kwargs=True
        )
        block.register_forward_hook(lambda *_: record.leave())
    hooks = torch.autograd.graph.saved_tensors_hooks(record.pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = model(**batch)
    found = _by_place(record)
    return replace(found, logits=_logits_bytes(output.logits))


def _by_place(record: _Record) -> Activations:
    held: Counter[int] = Counter()
    recomputed: Counter[int] = Counter()
    widest = 0
    for key, (storage, place) in record.saved.items():
        if key not in record.wide:
            held[place] += storage.nbytes()
        if place >= 0 and key not in record.inputs:
            recomputed[place] += storage.nbytes()
            widest = max(widest, storage.nbytes())
    elsewhere = {key for key, (_, place) in record.saved.items() if place < 0}
    boundaries = sum(s.nbytes() for key, s in record.inputs.items() if key not in elsewhere)
    blocks = tuple(size for place, size in held.items() if place >= 0)
    largest = max(recomputed.values(), default=0)
    return Activations(held[BEFORE], held[AFTER], blocks, boundaries, largest, 0, widest)


def _logits_bytes(logits: Tensor) -> int:
    """The logits, a float32 copy (the log-softmax, saved) and another (its gradient)."""
    return logits.untyped_storage().nbytes() + 2 * 4 * logits.numel()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that gradient checkpointing recomputes, one at a time."""
    # A caller with a model of transformers has imported transformers.
    layers: Any = sys.modules.get("transformers.modeling_layers")
    kind = () if layers is None else layers.GradientCheckpointingLayer
    found = [m for m in model.modules() if isinstance(m, kind)]
    if found:
        return found
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def _use_fused_attention(model: Any) -> None:
    """Attention without a mask: fake tensors cannot tell that there is no padding."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(inner, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or _has_prefix(model):
        return
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
    inner.set_attn_implementation(ATTENTION)
    for module in inner.modules():
        for name in (*DROPOUTS, "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _has_prefix(model: Any) -> bool:
    """Whether prefix tuning is on, which attends beyond the batch and so needs a mask."""
    configs = getattr(model, "peft_config", {}).values()
    return any(config.peft_type == "PREFIX_TUNING" for config in configs)


def _tensors(values: list[Any]) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(list(value))
    return found


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
