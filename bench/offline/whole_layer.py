"""Bytes that a whole decoder layer saves for backward: the linears and everything between them.

Stock PEFT and lora_fast are counted on transformers' LlamaDecoderLayer, at the real size and with
nothing computed. LoRAFusion replaces the linears alone: the rest is stock PEFT's. Unsloth also
replaces what lies between them: the tensors that its public sources save are added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.instruments import stub_driver
from bench.instruments.saved_tensors import SavedTensors

from . import contestants, layers
from .contestants import Case
from .operations import OperationCounter

CASE = Case(layers.SHAPES[1], 8192, 16, "dense", 0.0)
HEADS, HEAD_DIM = 32, 128
WHO = ("peft fp32", "peft", "unsloth", "lorafusion", "lora_fast")


def rows() -> list[dict[str, Any]]:
    """One row for each of WHO."""
    return [{"layer": CASE.shape.name, "who": who, "saved_bytes": saved_bytes(who)} for who in WHO]


def saved_bytes(who: str) -> int:
    """Bytes that one layer leaves for its backward pass: M = 8192, r = 16, bfloat16."""
    if who == "unsloth":
        return _of_unsloth()
    if who == "lorafusion":
        between = _counted("peft") - contestants.stock(CASE, "peft").saved_bytes
        return between + _linears(who)
    return _counted(who)


def _counted(who: str) -> int:
    import lora_fast

    layer = _layer("float32" if who == "peft fp32" else "bfloat16")
    if who == "lora_fast":
        lora_fast.accelerate(layer)
    x = torch.empty(1, CASE.M, CASE.shape.hidden, dtype=layers.DTYPE).requires_grad_()
    angles = torch.empty(2, 1, CASE.M, HEAD_DIM, dtype=layers.DTYPE).unbind()
    constants = [*layers.constants(layer), *angles]
    with (
        lora_fast.set_backend("triton"),
        stub_driver.recording(90),
        OperationCounter(compute=False),
        SavedTensors(constants) as saved,
    ):
        layer(x, position_embeddings=angles, attention_mask=None)
    if who == "lora_fast" and not lora_fast.report(layer).all_fused:
        raise RuntimeError(f"not every adapted linear ran fused:\n{lora_fast.report(layer)}")
    return saved.bytes


def _layer(adapters: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    shape = CASE.shape
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=HEADS,
        num_key_value_heads=shape.kv_width // HEAD_DIM,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0).to(layers.DTYPE).requires_grad_(False)
    layer = layer.to_empty(device="cpu")
    targets = [path.split(".")[1] for path in shape.linears]
    adapted = get_peft_model(layer, LoraConfig(r=CASE.R, target_modules=targets)).base_model.model
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, adapters))
    found: nn.Module = adapted.train()
    return found


def _of_unsloth() -> int:
    """Its linears' functions save their inputs; the MLP's saves gate and up instead of h."""
    shape, e = CASE.shape, layers.DTYPE.itemsize
    norms = 2 * (shape.hidden * e + 4)
    attention = (shape.q_width + 2 * shape.kv_width) * e + 4 * HEADS
    activation = 2 * shape.intermediate * e
    return _linears("unsloth") + CASE.M * (norms + attention + activation)


def _linears(graph: str) -> int:
    step = contestants.modelled(CASE, graph)
    assert step is not None
    return step.saved_bytes
