"""How much of Delta-LoRA's updates arrives in a low-precision weight.

W ~ N(0, 0.02²) [256, 256], R = 16, s = 2, c = 0.5, 300 steps of AdamW on gradients that drift by
half their noise. For each dtype, with the initial weight kept and in place, it prints the
projection of the update on the exact c · s · (B A − B₀ A₀), and the relative error, in float64.

    python -m bench.delta_lora_rounding
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_fast
from lora_fast.optim import DeltaLoRA

SIZE, R, C, STEPS = 256, 16, 0.5, 300
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def update_of(kind: str, lr: float, *, keep_start: bool, steps: int = STEPS) -> tuple[float, float]:
    """(projection, relative error) of the change of W after `steps`."""
    torch.manual_seed(0)
    linear = nn.Linear(SIZE, SIZE, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    model = nn.Sequential(linear.to(DTYPES.get(kind, torch.bfloat16)))
    lora_fast.convert(
        model, ["0"], r=R, lora_alpha=2 * R, quantize="nf4" if kind == "nf4" else None
    )
    layer = model[0]
    factors = (layer.lora_A, layer.lora_B)
    optimizer = DeltaLoRA(torch.optim.AdamW(factors, lr=lr), model, c=C, keep_start=keep_start)
    start, product = _weight(layer), _product(layer)
    drifts = [torch.randn_like(factor) / 2 for factor in factors]
    for _ in range(steps):
        for factor, drift in zip(factors, drifts, strict=True):
            factor.grad = drift + torch.randn_like(factor)
        optimizer.step()
    exact, actual = C * (_product(layer) - product), _weight(layer) - start
    projection = (actual * exact).sum() / exact.square().sum()
    return projection.item(), ((actual - exact).norm() / exact.norm()).item()


def _weight(layer: lora_fast.LoRALinear) -> Tensor:
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        return lora_fast.NF4Weight.from_params4bit(weight).dequantize(torch.float64)
    return weight.detach().double()


def _product(layer: lora_fast.LoRALinear) -> Tensor:
    return layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())


def main() -> None:
    print(f"{'weight':10} {'source':9} {'lr':>7} {'arrived':>8} {'error':>8}")
    for kind in (*DTYPES, "nf4"):
        for keep_start in (True, False):
            for lr in (1e-4, 1e-3):
                arrived, error = update_of(kind, lr, keep_start=keep_start)
                source = "kept" if keep_start else "in place"
                print(f"{kind:10} {source:9} {lr:7.0e} {arrived:8.3f} {error:8.2g}")


if __name__ == "__main__":
    main()
