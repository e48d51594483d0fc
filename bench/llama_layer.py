"""A whole Llama decoder layer, all seven linears adapted: time and memory over the frozen layer.

    python -m bench.llama_layer [--device cuda] [--rounds 15] [--json FILE]

Llama-3-8B's shape on a GPU, a small one on a CPU. Weights are random: they do not change the speed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .device_label import default_device, label, steady
from .linear_cases import linear4bit
from .paired import Step, measure

VARIANTS = ("frozen", "peft", "lora_fast")


@dataclass(frozen=True)
class Size:
    """Shape of the layer and of its input [batch, tokens, hidden]."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    batch: int
    tokens: int
    R: int = 16


LLAMA_3_8B = Size(4096, 14336, 32, 8, batch=4, tokens=2048)
SMALL = Size(128, 256, 4, 2, batch=2, tokens=32)


def build(size: Size, weight: str, variant: str, device: torch.device) -> nn.Module:
    """One decoder layer in bfloat16 (float32 on a CPU) as a model that takes embeddings."""
    from transformers import LlamaConfig, LlamaModel

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        num_hidden_layers=1,
        vocab_size=32,
    )
    torch.manual_seed(0)
    model: Any = LlamaModel(config).to(device, dtype).requires_grad_(False)
    if weight == "nf4":
        _quantize(model)
        model.is_loaded_in_4bit = True
    if variant != "frozen":
        model = _adapted(model, size.R)
    if variant == "lora_fast":
        import lora_fast

        model = lora_fast.accelerate(model)
    trained: nn.Module = model.train()
    return trained


def run(
    size: Size, weight: str, device: torch.device, rounds: int, sample_seconds: float
) -> dict[str, Any]:
    """Time and peak memory of a forward and backward pass, of every variant over the frozen one."""
    x = torch.randn(size.batch, size.tokens, size.hidden, device=device)
    steps: dict[str, Step] = {}
    models = {}
    for variant in VARIANTS:
        models[variant] = build(size, weight, variant, device)
        steps[variant] = _step(models[variant], x)
    timings = measure(steps, rounds=rounds, device=device, sample_seconds=sample_seconds)
    row = {
        "layer": f"{weight} hidden {size.hidden}, {size.batch * size.tokens} tokens, R{size.R}",
        "over_frozen": {v: asdict(timings.ratio(v, "frozen")) for v in VARIANTS[1:]},
        "lora_fast_over_peft": asdict(timings.ratio("lora_fast", "peft")),
        "median_seconds": {v: timings.median(v) for v in VARIANTS},
    }
    if device.type == "cuda":
        row["peak_bytes_over_frozen"] = _peaks(steps, device)
    _check_fused(models["lora_fast"])
    return row


def _step(model: nn.Module, x: Tensor) -> Step:
    trainable = [p for p in model.parameters() if p.requires_grad]
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    x = x.to(dtype).requires_grad_()

    def step() -> object:
        y = model(inputs_embeds=x, use_cache=False).last_hidden_state
        return torch.autograd.grad(y, [x, *trainable], torch.ones_like(y))

    return step


def _peaks(steps: dict[str, Step], device: torch.device) -> dict[str, int]:
    """Bytes that a step needs at its peak, less what the frozen layer's step needs."""
    peaks = {}
    for name, step in steps.items():
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peaks[name] = torch.cuda.max_memory_allocated(device) - before
    return {name: peak - peaks["frozen"] for name, peak in peaks.items() if name != "frozen"}


def _adapted(model: nn.Module, R: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, config)  # type: ignore[arg-type]


def _quantize(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, linear4bit(child))


def _check_fused(model: nn.Module) -> None:
    import lora_fast

    found = lora_fast.report(model)
    if not found.all_fused or found.fused_calls == 0:
        raise RuntimeError(f"not every adapted linear ran fused:\n{found}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    device = steady(options.device)
    size, sample = (LLAMA_3_8B, 0.1) if device.type == "cuda" else (SMALL, 0.05)
    print(f"{label(device)}, forward+backward, median of {options.rounds} interleaved rounds")
    rows = [run(size, weight, device, options.rounds, sample) for weight in ("dense", "nf4")]
    for row in rows:
        times = ", ".join(f"{v} {r['median']:.2f}" for v, r in row["over_frozen"].items())
        last = row["lora_fast_over_peft"]
        print(
            f"{row['layer']}: time over frozen: {times}; "
            f"lora_fast/peft {last['median']:.2f} ({last['low']:.2f}-{last['high']:.2f})"
        )
        if peaks := row.get("peak_bytes_over_frozen"):
            print(
                "  peak GB over frozen: "
                + ", ".join(f"{v} {b / 1e9:.2f}" for v, b in peaks.items())
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
