"""A block of experts with LoRA: time over stock PEFT's on a CPU, launches and bytes counted.

    python -m bench.experts [--rounds 15] [--threads 1] [--json FILE]

On a CPU 64 experts, of which each of 1024 tokens takes 8, hidden size 512, inner size 256, r 16,
float32, forward and backward. Counted are the operations of the layers in LAYERS in bfloat16 on
fake tensors: each that is not a view as one launch, which reads its arguments and writes its
results once. Contestants: the frozen block and PEFT's wrappers around it with transformers'
grouped_mm, and lora_fast as on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from .instruments import paired
from .instruments.device_label import label
from .offline.operations import OperationCounter, SavedBytes

CONTESTANTS = ("frozen", "peft", "lora_fast")
R = 16
# The most time over PEFT's, and over the frozen block's.
MOST = {"peft": 0.60, "frozen": 1.30}


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


def build(block: Block, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The contestants, with the same weights."""
    from peft import LoraConfig, get_peft_model

    import lora_fast

    torch.manual_seed(0)
    base = nn.ModuleDict({"experts": _experts(block).to(dtype)}).requires_grad_(False)
    config = LoraConfig(
        r=R, lora_alpha=R, target_modules=[], init_lora_weights=False,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    stock: Any = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    models = {"frozen": base, "peft": stock.base_model.model, "lora_fast": fused.base_model.model}
    return {name: model["experts"] for name, model in models.items()}


def _experts(block: Block) -> nn.Module:
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
    experts: nn.Module, block: Block, tokens: int, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A forward pass whose gradients are those of x, the routing weights and all adapters; and its
    inputs."""
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(tokens, block.H, generator=generator).to(dtype).requires_grad_()
    scores = torch.randn(tokens, block.E, generator=generator).softmax(-1)
    w, index = scores.topk(block.k)
    w = w.to(dtype).requires_grad_()
    return lambda: experts(x, index, w), [x, index, w]


def ratios(rounds: int) -> dict[str, Any]:
    """Times of lora_fast over the others' on this CPU."""
    models = build(SMALL, torch.float32)
    dY = torch.randn(1024, SMALL.H, generator=torch.Generator().manual_seed(2))
    steps: dict[str, paired.Step] = {}
    for name, model in models.items():
        forward, _ = step_of(model, SMALL, 1024, torch.float32)
        steps[name] = lambda forward=forward: forward().backward(dY)  # type: ignore[misc]
    timings = paired.measure(steps, rounds=rounds, device=torch.device("cpu"))
    _check_fused(models["lora_fast"])
    return {name: asdict(timings.ratio("lora_fast", name)) for name in ("peft", "frozen")}


def counts(block: Block, tokens: int, contestant: str) -> dict[str, Any]:
    """Launches, bytes, the largest result and the bytes saved of one contestant's step."""
    from lora_fast.backends import torch_grouped
    from lora_fast.skeleton import imagined

    with torch.device("meta"):
        built = build(block, torch.bfloat16)[contestant]
    grouped = mock.patch.object(torch_grouped, "takes", torch_grouped.fits)
    with grouped, imagined(built) as experts:
        forward, inputs = step_of(experts, block, tokens, torch.bfloat16)
        dY = torch.empty(tokens, block.H, dtype=torch.bfloat16)
        counter = OperationCounter()
        with SavedBytes([*experts.parameters(), *inputs]) as saved, counter:
            out = forward()
        with counter:
            out.backward(dY)
        if contestant == "lora_fast":
            _check_fused(experts)
    return {
        "layer": block.name,
        "M": tokens,
        "contestant": contestant,
        "launches": len(counter.operations),
        "bytes": sum(op.bytes for op in counter.operations),
        "largest": max(op.written for op in counter.operations) // 2,
        "weight": block.E * 2 * block.I * block.H,
        "saved": saved.total,
    }


def _check_fused(experts: Any) -> None:
    if not experts._lora_fast_calls.fused:
        reasons = experts._lora_fast_calls.by_reason()
        raise RuntimeError(f"the fused path never ran, so nothing was measured: {reasons}")


def text(row: dict[str, Any]) -> str:
    return (
        f"{row['layer']:14}  {row['M']:5}  {row['contestant']:9}  {row['launches']:8}  "
        f"{row['bytes'] / 1e9:7.2f}  {row['saved'] / 1e6:8.1f}  "
        f"{row['largest'] / row['weight']:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{label(torch.device('cpu'))}, median of {options.rounds} interleaved rounds", flush=True
    )
    measured = ratios(options.rounds)
    for name, ratio in measured.items():
        found, most = paired.Ratio(**ratio), MOST[name]
        print(f"lora_fast over {name:7} {found}, at most {most:.2f}", end="")
        print("" if found.median <= most else "  NOT")
    print("\nCounted, forward and backward: launches, GB read and written, MB saved beside x, and")
    print("the largest result in units of the experts' first weight, E × N × K elements.")
    print("layer               M  contestant  launches       GB  saved MB   largest")
    rows = []
    for block in LAYERS:
        for tokens in ROWS:
            for contestant in CONTESTANTS:
                rows.append(counts(block, tokens, contestant))
                print(text(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"ratios": measured, "counts": rows}, indent=1))


if __name__ == "__main__":
    main()
