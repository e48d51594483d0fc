"""A whole decoder layer, all seven linears adapted: time over the frozen layer.

    python -m bench.decoder_layer [--device cuda] [--rounds 15] [--json FILE]

Llama-3-8B's shape on a GPU; on a CPU a Llama layer of width 512 in float32 and bfloat16, for 2048,
64 and 1 tokens, then all-MiniLM-L6-v2 whole, each beside the most time that it may take. Weights
are random: they do not change the speed. Contestants:

    frozen          nothing to train: in NF4 bitsandbytes' Linear4bit
    peft            stock PEFT, adapters in the dtype of the layer; peft fp32: PEFT's default ones
    peft compiled   the first of them through torch.compile
    lora_fast       PEFT's layers after lora_fast.accelerate, with the adapters of peft;
                    lora_fast fp32: with those of peft fp32
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import builtin_model
from .instruments.device_label import default_device, label, steady
from .instruments.paired import Step, measure
from .linear_cases import linear4bit

CONTESTANTS = ("frozen", "peft", "peft fp32", "lora_fast", "lora_fast fp32")


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder layer. ``family``: llama or qwen3, classes of transformers."""

    name: str
    family: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(N, K) of the seven adapted linears."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, i = self.hidden, self.intermediate
        return [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)]


# Sizes: config.json of meta-llama/Meta-Llama-3-8B and Qwen/Qwen3-8B.
LLAMA_3_8B = Shape("Llama-3-8B", "llama", 4096, 14336, 32, 8, 128)
QWEN3_8B = Shape("Qwen3-8B", "qwen3", 4096, 12288, 32, 8, 128)
LLAMA_512 = Shape("Llama-512", "llama", 512, 1408, 8, 8, 64)
SMALL = (
    Shape("small Llama", "llama", 128, 256, 4, 2, 32),
    Shape("small Qwen3", "qwen3", 128, 256, 4, 2, 32),
)


@dataclass(frozen=True)
class Case:
    """A layer, how its weights are stored (dense or nf4), its adapters and its input."""

    shape: Shape
    weight: str
    R: int
    dropout_p: float
    batch: int
    length: int
    dtype: torch.dtype = torch.bfloat16
    dora: bool = False

    @property
    def M(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        method = " DoRA" if self.dora else ""
        return f"{self.shape.name} {self.weight}{method} M{self.M} R{self.R} p{self.dropout_p:g}"


def build(case: Case, contestant: str, device: torch.device) -> nn.Module:
    """One of CONTESTANTS: a model of one layer that takes embeddings, with fixed weights."""
    model = base(case, device)
    if contestant.startswith("peft"):
        return adapted(model, case, float32="fp32" in contestant)
    if contestant.startswith("lora_fast"):
        import lora_fast

        return lora_fast.accelerate(adapted(model, case, float32="fp32" in contestant))
    if contestant != "frozen":
        raise ValueError(f"contestant must be one of {CONTESTANTS}, got {contestant!r}")
    return model


def base(case: Case, device: torch.device) -> Any:
    """The frozen layer."""
    import transformers

    family = {"llama": "Llama", "qwen3": "Qwen3"}[case.shape.family]
    config = getattr(transformers, f"{family}Config")(
        hidden_size=case.shape.hidden,
        intermediate_size=case.shape.intermediate,
        num_attention_heads=case.shape.heads,
        num_key_value_heads=case.shape.kv_heads,
        head_dim=case.shape.head_dim,
        num_hidden_layers=1,
        vocab_size=32,
    )
    torch.manual_seed(0)
    with device:
        model: Any = getattr(transformers, f"{family}Model")(config)
    model = model.to(case.dtype).requires_grad_(False)
    if case.weight == "nf4":
        _quantize(model)
        model.is_loaded_in_4bit = True
    return model.train()


def adapted(model: Any, case: Case, *, float32: bool) -> Any:
    """PEFT's LoRA around all seven linears. B is random, since zeros multiply faster."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=case.R, lora_alpha=2 * case.R, lora_dropout=case.dropout_p, use_dora=case.dora,
        target_modules="all-linear",
    )  # fmt: skip
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if float32 else case.dtype)
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return peft_model.train()


def step_of(
    model: Any,
    case: Case,
    device: torch.device,
    *,
    trained: list[nn.Parameter] | None = None,
    transform: Callable[[nn.Module], Any] = lambda layer: layer,
) -> Step:
    """A forward and a backward pass with the gradients of the input and of all adapters.

    Only the layer is called, without a mask, so that attention is causal by itself: the model
    around it would choose by the values of positions, and a captured graph would run other kernels.
    ``transform``: what to call instead of the layer; ``trained``: instead of what requires_grad.
    """
    generator = torch.Generator(device).manual_seed(2)
    shape = (case.batch, case.length, case.shape.hidden)
    x, dY = (
        torch.randn(shape, generator=generator, device=device, dtype=case.dtype) for _ in range(2)
    )
    if trained is None:
        trained = [p for p in model.parameters() if p.requires_grad]
    wanted: list[Tensor] = [x.requires_grad_(), *trained]
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    layer = transform(plain.layers[0])
    positions = torch.arange(case.length, device=device)[None]
    with torch.no_grad():
        rotations = plain.rotary_emb(x, positions)

    def step() -> object:
        y = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotations)
        return torch.autograd.grad(y, wanted, dY)

    return step


def makers(
    case: Case, device: torch.device, contestants: tuple[str, ...] = CONTESTANTS
) -> dict[str, Callable[[], Step]]:
    """A function for each contestant that builds its step and proves that it runs fused."""

    def make(contestant: str) -> Step:
        model = build(case, contestant, device)
        step = step_of(model, case, device)
        if contestant.startswith("lora_fast"):
            step()
            check_fused(model)
        return step

    return {name: lambda name=name: make(name) for name in contestants}  # type: ignore[misc]


def check_fused(model: nn.Module) -> None:
    """RuntimeError unless all adapted linears ran fused: nothing else is timed."""
    import lora_fast

    found = lora_fast.report(model)
    if not found.all_fused or found.fused_calls == 0:
        raise RuntimeError(f"not every adapted linear ran fused:\n{found}")


def _quantize(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, linear4bit(child))


def cases(device: torch.device) -> list[Case]:
    """What the command below measures."""
    if device.type == "cuda":
        return [Case(LLAMA_3_8B, weight, 16, 0.0, 4, 2048) for weight in ("dense", "nf4")]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        plain = Case(LLAMA_512, "dense", 16, 0.0, 8, 256, dtype)
        found += [plain, replace(plain, dropout_p=0.1), replace(plain, dora=True)]
        found += [replace(plain, batch=1, length=length) for length in (64, 1)]
    return found


def most(case: Case) -> tuple[float | None, float]:
    """The most time that lora_fast may take on a CPU: over the frozen layer, and over PEFT."""
    if case.M < 2048:
        return None, 1.15 if case.M == 1 else 1.05
    if case.dora or case.dropout_p > 0.0:
        return None, 0.80
    return 1.18 if case.dtype == torch.float32 else 1.22, 0.95


def run(case: Case, device: torch.device, rounds: int, sample_seconds: float) -> dict[str, Any]:
    """Times of the contestants, as ratios to the frozen layer's and of ours to PEFT's."""
    steps = {name: make() for name, make in makers(case, device).items()}
    timings = measure(steps, rounds=rounds, device=device, sample_seconds=sample_seconds)
    return {
        "layer": str(case),
        "dtype": str(case.dtype).removeprefix("torch."),
        "over_frozen": {v: asdict(timings.ratio(v, "frozen")) for v in CONTESTANTS[1:]},
        "lora_fast_over_peft": asdict(timings.ratio("lora_fast", "peft")),
        "fp32_over_fp32": asdict(timings.ratio("lora_fast fp32", "peft fp32")),
        "median_seconds": {v: timings.median(v) for v in CONTESTANTS},
    }


def _line(row: dict[str, Any], most: tuple[float | None, float | None]) -> str:
    times = ", ".join(f"{name} {r['median']:.2f}" for name, r in row["over_frozen"].items())
    ratios = {
        "lora_fast/frozen": (row["over_frozen"]["lora_fast"], most[0]),
        "lora_fast/peft": (row["lora_fast_over_peft"], most[1]),
        "both fp32": (row["fp32_over_fp32"], most[1]),
    }
    found = ", ".join(
        f"{name} {r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f}){_within(r, limit)}"
        for name, (r, limit) in ratios.items()
    )
    return f"{row['dtype']} {row['layer']}: time over frozen: {times}; {found}"


def _within(ratio: dict[str, float], limit: float | None) -> str:
    if limit is None:
        return ""
    return f" {'≤' if ratio['median'] <= limit else 'NOT ≤'} {limit:.2f}"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    device = steady(options.device)
    print(f"{label(device)}, forward+backward, median of {options.rounds} interleaved rounds")
    rows = []
    for case in cases(device):
        row = run(case, device, options.rounds, 0.05)
        print(_line(row, most(case) if device.type == "cpu" else (None, None)), flush=True)
        rows.append(row)
    if device.type == "cpu":
        rows += builtin_model.table(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
