"""Forward and backward of a whole pretrained encoder: lora_fast against stock PEFT and the floor.

    python -m bench.builtin_model [--rounds 9] [--threads 2] [--dtype float32] [--json FILE]

The model is the one of ``lora-fast train``, with an adapter of rank 16 on all linear layers, and a
batch of 16 × 128 tokens. The floor is the same model frozen, with the gradient of the input
embeddings. Every round runs all variants in a new random order; medians of the ratios.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora_fast  # noqa: E402 - needs the path
from bench.instruments.paired import measure  # noqa: E402
from lora_fast.files.model_source import resolve_model  # noqa: E402

BATCH, LENGTH, RANK = 16, 128, 16
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, dropout 0.05": {"lora_dropout": 0.05},
    "DoRA": {"use_dora": True},
}
# The most time that lora_fast may take over stock PEFT, whose adapters are float32.
MOST = {
    "float32": dict.fromkeys(VARIANTS, 0.92),
    "bfloat16": dict(zip(VARIANTS, (0.80, 0.70, 0.70), strict=True)),
}


def base_model(dtype: torch.dtype) -> Any:
    """The pretrained encoder, frozen, without dropout of its own."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        resolve_model("builtin"), dtype=dtype, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return model.requires_grad_(False).train()


def step(model: Any, embeddings: torch.Tensor) -> Callable[[], object]:
    """One forward and backward pass through all layers."""

    def run() -> object:
        x = embeddings.detach().requires_grad_()
        hidden = model(inputs_embeds=x).last_hidden_state
        hidden.backward(torch.ones_like(hidden))
        return x.grad

    return run


def steps(base: Any, options: dict[str, Any], embeddings: torch.Tensor) -> dict[str, Any]:
    """The floor, stock PEFT and lora_fast, each on its own copy of the model."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", **options)
    stock = get_peft_model(copy.deepcopy(base), config).train()
    fused = lora_fast.accelerate(copy.deepcopy(stock))
    variants = {
        "frozen floor": step(base, embeddings),
        "stock PEFT": step(stock, embeddings),
        "lora_fast": step(fused, embeddings),
    }
    for run in variants.values():
        run()
    report = lora_fast.report(fused)
    # The pooler is adapted but never called, since the output does not depend on it.
    if not report.fused_calls or report.fallback_calls:
        raise RuntimeError(f"all calls must run fused, got {report.fallback_calls}")
    return variants


def table(rounds: int, dtypes: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print a line for every dtype (float32 and bfloat16) and variant, and return its ratios."""
    warnings.filterwarnings("ignore")
    results = []
    print(f"{'':32} {'lora_fast / PEFT':>27} {'PEFT / floor':>18} {'lora_fast / floor':>18}")
    for name in dtypes or MOST:
        torch.manual_seed(0)
        dtype = getattr(torch, name)
        base = base_model(dtype)
        embeddings = torch.randn(BATCH, LENGTH, base.config.hidden_size).to(dtype)
        for title, variant in VARIANTS.items():
            runs = steps(base, variant, embeddings)
            timings = measure(runs, rounds=rounds, device=torch.device("cpu"))
            most, ratios = MOST[name][title], {
                "fused_over_stock": timings.ratio("lora_fast", "stock PEFT"),
                "stock_over_floor": timings.ratio("stock PEFT", "frozen floor"),
                "fused_over_floor": timings.ratio("lora_fast", "frozen floor"),
            }  # fmt: skip
            within = "≤" if ratios["fused_over_stock"].median <= most else "NOT ≤"
            first, *others = (f"{r!s:>19}" for r in ratios.values())
            print(
                f"{title + ', ' + name:32}{first} {within} {most:.2f}{''.join(others)}", flush=True
            )
            record = {"variant": title, "dtype": name, "threads": torch.get_num_threads()}
            results.append(record | {key: asdict(r) for key, r in ratios.items()})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = table(options.rounds, options.dtype)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
