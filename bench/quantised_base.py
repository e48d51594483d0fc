"""LoRA on a base of bitsandbytes on a CPU: time over stock PEFT's.

    python -m bench.quantised_base [--rounds 15] [--json FILE]

A layer of 512 × 512 in bfloat16, 2048 tokens, r 16, forward and backward, one thread, CPU time. Its
base is in 8 bits (which computes its output by itself), FP4 or NF4; adapters are in bfloat16 and,
as PEFT makes them by default, in float32 under autocast.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .instruments import paired
from .instruments.device_label import label

WIDTH, TOKENS, R = 512, 2048, 16
BASES = ("int8", "fp4", "nf4")
# The most time over PEFT's without and with dropout.
MOST = {0.0: 1.00, 0.05: 0.85}


def base_layer(kind: str, linear: nn.Linear) -> nn.Module:
    """`linear` as bitsandbytes stores it."""
    import bitsandbytes as bnb

    made: Any
    if kind == "int8":
        made = bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
        made.load_state_dict(linear.state_dict())
    else:
        dtype = linear.weight.dtype
        made = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=dtype, quant_type=kind)
        made.weight.data = linear.weight.detach().clone()
    return made.to("cpu").requires_grad_(False)


def build(kind: str, p: float, adapter_dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A stock PEFT model of one layer on a base of `kind`, with B ≠ 0."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16)
    base: Any = nn.Sequential()
    base.add_module("fc", base_layer(kind, linear))
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = kind == "int8", kind != "int8"
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=p, target_modules=["fc"])
    model: Any = get_peft_model(base, config).train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return model


def step_of(model: nn.Module, *, autocast: bool = False, tokens: int = TOKENS) -> paired.Step:
    """A forward and a backward pass, with the gradients of the input and of the adapter."""
    generator = torch.Generator().manual_seed(1)
    x, dY = (torch.randn(tokens, WIDTH, generator=generator).bfloat16() for _ in range(2))
    wanted: list[Tensor] = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            y = model(x)
        return torch.autograd.grad(y, wanted, dY.to(y.dtype))

    return step


def run(
    kind: str, p: float, *, wide: bool, rounds: int, seconds: float, tokens: int = TOKENS
) -> dict[str, Any]:
    """Times of lora_fast over those of PEFT; `wide`: adapters in float32, under autocast."""
    import lora_fast

    stock = build(kind, p, torch.float32 if wide else torch.bfloat16)
    models = {"peft": stock, "lora_fast": lora_fast.accelerate(copy.deepcopy(stock))}
    steps = {name: step_of(m, autocast=wide, tokens=tokens) for name, m in models.items()}
    device = torch.device("cpu")
    timings = paired.measure(steps, rounds=rounds, device=device, sample_seconds=seconds)
    assert lora_fast.report(models["lora_fast"]).all_fused
    return {
        "base": kind,
        "dropout_p": p,
        "adapters": "float32" if wide else "bfloat16",
        "over_peft": asdict(timings.ratio("lora_fast", "peft")),
        "median_seconds": {name: timings.median(name) for name in models},
    }


def _line(row: dict[str, Any]) -> str:
    found, most = paired.Ratio(**row["over_peft"]), MOST[row["dropout_p"]]
    within = "" if found.median <= most else "NOT "
    head = f"{row['base']}, {row['adapters']} adapters, p {row['dropout_p']:g}"
    return f"{head}: time over PEFT's {found} ({within}≤ {most:.2f})"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{label(torch.device('cpu'))}, median (quartiles) of {options.rounds} rounds")
    rows = []
    for kind in BASES:
        for wide in (False, True):
            for p in MOST:
                row = run(kind, p, wide=wide, rounds=options.rounds, seconds=0.2)
                print(_line(row), flush=True)
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
