"""Blocks of experts of real models, and a step of one, for ``python -m bench.experts``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

R = 16


class Block(NamedTuple):
    """E experts, k of them a token, hidden size H, inner size I."""

    name: str
    E: int
    k: int
    H: int
    I: int  # noqa: E741
    interleaved: bool = False


SMALL = Block("64 experts", 64, 8, 512, 256)
LAYERS = (
    Block("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Block("gpt-oss-20b", 32, 4, 2880, 2880, interleaved=True),
    Block("Mixtral-8x7B", 8, 2, 4096, 14336),
    Block("DeepSeek-V3", 256, 8, 7168, 2048),
)
ROWS = (2048, 8192)


def build(block: Block, dtype: torch.dtype, *, quantised: bool = False) -> dict[str, nn.Module]:
    """The contestants, with the same weights, which may be quantised to NF4."""
    from peft import LoraConfig, get_peft_model

    import lora_fast

    torch.manual_seed(0)
    base = nn.ModuleDict({"experts": experts_of(block).to(dtype)}).requires_grad_(False)
    if quantised:
        lora_fast.quantize_experts(base)
    config = LoraConfig(
        r=R, lora_alpha=R, target_modules=[], init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    stock: Any = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    models = {"frozen": base, "peft": stock.base_model.model, "lora_fast": fused.base_model.model}
    return {name: model["experts"] for name, model in models.items()}


def experts_of(block: Block) -> nn.Module:
    from transformers import GptOssConfig, Qwen3MoeConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config: Any
    if block.interleaved:
        config = GptOssConfig(
            hidden_size=block.H, intermediate_size=block.I, num_local_experts=block.E
        )
        experts: Any = GptOssExperts
    else:
        config = Qwen3MoeConfig(
            hidden_size=block.H, moe_intermediate_size=block.I, num_experts=block.E
        )
        experts = Qwen3MoeExperts
    config._experts_implementation = "grouped_mm"
    made: nn.Module = experts(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.05)
    return made


def step_of(
    experts: nn.Module,
    block: Block,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A forward pass whose gradients are those of x, the routing weights and all adapters; and its
    inputs."""
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(tokens, block.H, generator=generator).to(device, dtype).requires_grad_()
    scores = torch.randn(tokens, block.E, generator=generator).softmax(-1)
    w, index = scores.to(device).topk(block.k)
    w = w.to(dtype).requires_grad_()
    return lambda: experts(x, index, w), [x, index, w]


def check_fused(experts: Any) -> None:
    if not experts._lora_fast_calls.fused:
        reasons = experts._lora_fast_calls.by_reason()
        raise RuntimeError(f"the fused path never ran, so nothing was measured: {reasons}")
