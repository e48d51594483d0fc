"""A training step of a model that was planned: built for real, and its bytes measured."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lora_fast
from lora_fast.methods import table
from lora_fast.methods.base_model import Base
from lora_fast.optim import DeltaLoRA
from lora_fast.planning import MemoryPlan, Settings, plan
from lora_fast.training.config import TrainConfig

TOLERANCE = 0.05  # what planning promises
VOCABULARY, BATCH, LENGTH = 96, 2, 24
BATCHES = {"batch_size": BATCH, "max_length": LENGTH}
SHAPE = {**BATCHES, "quantize": "none", "task": "causal-lm"}


class SavedBytes:
    """Peak of bytes saved for backward, without those as wide as the vocabulary."""

    def __init__(self, model: nn.Module) -> None:
        constant = [*model.parameters(), *model.buffers()]
        self.permanent = {t.untyped_storage().data_ptr() for t in constant}
        self.live: dict[int, list[int]] = {}
        self.now = self.peak = self.wide = 0

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self.permanent:
            return tensor
        entry = self.live.setdefault(key, [0, storage.nbytes()])
        if tensor.shape[-1:] == (VOCABULARY,) and tensor.dim() > 1:
            self.wide, entry[1] = self.wide + entry[1], 0
        if entry[0] == 0:
            self.now += entry[1]
            self.peak = max(self.peak, self.now)
        entry[0] += 1
        held = Held(tensor)
        weakref.finalize(held, self.release, key)
        return held

    def release(self, key: int) -> None:
        entry = self.live[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.live[key]


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def unpack(held: Any) -> Tensor:
    return held.tensor if isinstance(held, Held) else held


def real_model(config: Any, settings: Settings) -> Any:
    """What `lora-fast train` would train, in memory."""
    dtype = getattr(torch, settings.dtype)
    auto = (
        AutoModelForCausalLM if settings.task == "causal-lm" else AutoModelForSequenceClassification
    )
    base = auto.from_config(config, dtype=dtype)
    base.config.use_cache = settings.method == "prefix"
    if settings.gradient_checkpointing:
        # The reentrant kind saves through autograd, where it can be observed.
        base.gradient_checkpointing_enable({"use_reentrant": True})
        base.enable_input_require_grads()
    if settings.method == "full":
        return base.train()
    options = {key: getattr(settings, key) for key in ("method", "task", "r", "dropout")}
    options["experts"] = bool(settings.experts)
    if settings.experts and settings.quantize == "nf4":
        lora_fast.quantize_experts(base)
    run = TrainConfig(model="tiny", data="-", quantize="none", steps=100, **options)
    held = Base("tiny", base, type("T", (), {})(), dtype, torch.device("cpu"))
    model = table.METHODS[settings.method].build(held, run.with_defaults(0), 100)
    if settings.fused and table.METHODS[settings.method].fused:
        lora_fast.accelerate(model)
    return model.train()


def step(model: Any, settings: Settings) -> tuple[SavedBytes, Any]:
    """One training step: the bytes it saved, and the optimizer."""
    ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % VOCABULARY
    labels = ids if settings.task == "causal-lm" else torch.tensor([0, 1])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.AdamW(trained)
    if settings.method == "delta-lora":
        optimizer = DeltaLoRA(optimizer, model, c=1.0)
    saved = SavedBytes(model)
    dtype = getattr(torch, settings.dtype)
    with (
        torch.autograd.graph.saved_tensors_hooks(saved.pack, unpack),
        torch.autocast("cpu", dtype, enabled=settings.dtype != "float32"),
    ):
        loss = model(input_ids=ids, labels=labels).loss
    if settings.gradient_checkpointing:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, unpack):
            loss.backward()
    else:
        loss.backward()
    optimizer.step()
    return saved, optimizer


def state_bytes(model: Any, optimizer: Any, method: str) -> int:
    """State of the optimizer, and of the method beside it."""
    inner = getattr(optimizer, "optimizer", optimizer)
    held = [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor)]
    if method == "delta-lora":
        for layer in optimizer._layers:
            held += [factor for pair in layer.anchor for factor in pair]
            held += [layer.start] if isinstance(layer.start, Tensor) else []
    if method == "adalora":
        allocator = model.base_model.rankallocator
        allocator.update_ipt(model.base_model)
        for average in (allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc):
            held += average.values()
    return sum(t.nbytes for t in held)


def storages(tensors: Any) -> int:
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def part(found: MemoryPlan, name: str) -> int:
    return sum(size for key, size in found.parts.items() if key.startswith(name))


def close(planned: int, measured: int, what: str) -> None:
    assert abs(planned - measured) <= TOLERANCE * measured, f"{what}: {planned} for {measured}"


def compare_a_step(config: Any, settings: Settings) -> None:
    planned = plan(config, advise=False, **vars(settings))
    model = real_model(config, settings)
    saved, optimizer = step(model, settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    held = part(planned, "weights") + planned.parts["adapters"]
    close(held, storages([*model.parameters(), *model.buffers()]), "weights and adapters")
    assert planned.trainable == sum(p.numel() for p in trained)
    close(planned.parts["gradients"], sum(p.grad.nbytes for p in trained), "gradients")
    state = state_bytes(model, optimizer, settings.method)
    close(planned.parts["optimizer state"], state, "optimizer state")
    close(planned.parts["activations"], saved.peak, "activations")
