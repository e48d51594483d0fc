"""Errors of the fused layer against float64, beside those of eager PyTorch in the same dtypes.

    python -m bench.accuracy_table [--device cuda] [--json FILE]

Every output and gradient must obey the rule of the test suite (bench/instruments/accuracy.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.instruments.accuracy import assert_accurate, orders

from .instruments.device_label import default_device, label
from .linear_cases import Case, Layer, build, cases

# Float64 products are slow on most GPUs, and more rows would show nothing new.
MAX_ROWS = 1024


def run_case(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """One row per output and gradient: errors of both relative to max|ref|, and the verdict."""
    case = dataclasses.replace(case, M=min(case.M, MAX_ROWS))
    layers = build(case, device)
    fused = _results(layers["lora_fast"])
    with torch.autocast(device.type, case.dtype, enabled=case.dtype != torch.float32):
        eager = orders(lambda: _results(layers["peft"]))
    ref = _reference(layers["lora_fast"])
    rows = []
    for name, exact in ref.items():
        try:
            assert_accurate(fused[name], exact, eager[name], name=name, compute_dtype=case.dtype)
            broken = None
        except AssertionError as error:
            broken = str(error)
        rows.append(
            {
                "case": str(case),
                "result": name,
                "lora_fast": _relative_error(fused[name], exact),
                "eager": max(_relative_error(sample, exact) for sample in eager[name]),
                "broken": broken,
            }
        )
    return rows


def _results(layer: Layer) -> dict[str, Tensor]:
    y = layer.forward()
    A, B = _factors(layer)
    dX, dA, dB = torch.autograd.grad(y, [layer.x, A, B], layer.dY.to(y.dtype))
    return {"y": y.detach(), "dX": dX, "dA": dA, "dB": dB}


def _reference(layer: Layer) -> dict[str, Tensor]:
    from lora_fast import NF4Weight, reference

    base: Any = layer.module.base_layer
    weight = base.weight
    if hasattr(weight, "quant_state"):
        weight = NF4Weight.from_params4bit(weight).dequantize(layer.x.dtype)
    leaves = [t.detach().double().requires_grad_() for t in (layer.x, *_factors(layer))]
    x, A, B = leaves
    scaling = layer.module.scaling["default"]  # type: ignore[index]
    y = reference.adapted_linear(x, weight.double(), A=A, B=B, scaling=scaling)
    dX, dA, dB = torch.autograd.grad(y, leaves, layer.dY.double())
    return {"y": y.detach(), "dX": dX, "dA": dA, "dB": dB}


def _factors(layer: Layer) -> tuple[Tensor, Tensor]:
    module: Any = layer.module
    return module.lora_A["default"].weight, module.lora_B["default"].weight


def _relative_error(actual: Tensor, ref: Tensor) -> float:
    return ((actual.double() - ref).abs().max() / ref.abs().max()).item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=default_device())
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    print(f"{label(options.device)}, max|error| / max|float64|", flush=True)
    rows = [row for case in cases(options.device) for row in run_case(case, options.device)]
    width = max(len(row["case"]) for row in rows)
    for row in rows:
        print(
            f"{row['case']:{width}}  {row['result']:3}  lora_fast {row['lora_fast']:.1e}  "
            f"eager {row['eager']:.1e}  {row['broken'] or 'within the rule'}"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 1 if any(row["broken"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
