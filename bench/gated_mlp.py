"""A gated MLP on a CPU, its three linears adapted: time over stock PEFT's, and saved bytes.

    python -m bench.gated_mlp [--rounds 15] [--threads 1] [--json FILE]

A Llama MLP of width 512 and 1408, 2048 tokens, r 16, in float32 and bfloat16, forward and backward.
Contestants: those of bench.decoder_layer, and lora_fast with fuse_mlp=False, whose three linears
are operations of their own. With one thread CPU time is measured, with several wall time.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .instruments import paired
from .instruments.device_label import label
from .instruments.saved_tensors import SavedTensors

H, WIDTH, TOKENS, R = 512, 1408, 2048, 16
CONTESTANTS = ("frozen", "peft", "lora_fast", "lora_fast unfused", "peft fp32", "lora_fast fp32")
# The most time over PEFT's with adapters of the same dtype.
MOST = 0.80


def build(contestant: str, dtype: torch.dtype, p: float) -> nn.Module:
    """One of CONTESTANTS, with the weights of every other."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=WIDTH))
    base = nn.Sequential(mlp).to(dtype).requires_grad_(False)
    if contestant == "frozen":
        return base
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=p, target_modules=targets)
    model: Any = get_peft_model(base, config).train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if "fp32" in contestant else dtype)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    if contestant.startswith("lora_fast"):
        import lora_fast

        lora_fast.accelerate(model, fuse_mlp="unfused" not in contestant)
    return model


def step_of(model: nn.Module, dtype: torch.dtype, tokens: int = TOKENS) -> paired.Step:
    """A forward and a backward pass, with the gradients of the input and of all adapters."""
    generator = torch.Generator().manual_seed(1)
    x, dY = (torch.randn(tokens, H, generator=generator).to(dtype) for _ in range(2))
    wanted: list[Tensor] = [x.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(model(x), wanted, dY)


def saved_bytes(model: nn.Module, dtype: torch.dtype, tokens: int = TOKENS) -> int:
    """Of storages that a forward pass saves for backward, each once, without parameters."""
    with SavedTensors(model.parameters()) as saved:
        model(torch.randn(tokens, H).to(dtype).requires_grad_())
    return saved.bytes


def run(dtype: torch.dtype, p: float, rounds: int, seconds: float, tokens: int) -> dict[str, Any]:
    """Times over those of PEFT, and saved bytes over those of x, gate and up."""
    models = {name: build(name, dtype, p) for name in CONTESTANTS}
    steps = {name: step_of(model, dtype, tokens) for name, model in models.items()}
    device = torch.device("cpu")
    if torch.get_num_threads() == 1:
        timings = paired.measure(steps, rounds=rounds, device=device, sample_seconds=seconds)
    else:
        for step in steps.values():
            step()
        calls = dict.fromkeys(steps, 1)
        timings = paired.interleaved(steps, calls, rounds=rounds, timer=_wall_time)
    least = dtype.itemsize * tokens * (H + 2 * WIDTH)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "dropout_p": p,
        "over_peft": {
            name: asdict(timings.ratio(name, "peft fp32" if "fp32" in name else "peft"))
            for name in CONTESTANTS
            if not name.startswith("peft")
        },
        "median_seconds": {name: timings.median(name) for name in CONTESTANTS},
        "saved": {n: saved_bytes(m, dtype, tokens) / least for n, m in models.items()},
    }


def _wall_time(step: paired.Step, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - started


def _line(row: dict[str, Any]) -> str:
    times = {name: r["median"] for name, r in row["over_peft"].items()}
    found = ", ".join(f"{name} {time:.2f}" for name, time in times.items())
    within = all(times[name] <= MOST for name in ("lora_fast", "lora_fast fp32"))
    saved = ", ".join(f"{name} {row['saved'][name]:.2f}" for name in ("peft", "lora_fast"))
    head = f"{row['dtype']} p {row['dropout_p']:g}: time over PEFT's: {found}"
    return f"{head} ({'' if within else 'NOT '}≤ {MOST:.2f}); saved over x, gate, up: {saved}"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{label(torch.device('cpu'))}, median of {options.rounds} interleaved rounds")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for p in (0.0, 0.1):
            row = run(dtype, p, options.rounds, 0.3, TOKENS)
            print(_line(row), flush=True)
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
