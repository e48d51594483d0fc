"""One forward and backward pass of an adapted linear, for tools that look at kernels.

    python -m bench.gpu_day.one_step --weight nf4 --rows 8192 --width 4096 [--rehearse]

A first pass compiles; the second runs between cudaProfilerStart and cudaProfilerStop.
"""

from __future__ import annotations

import argparse

import torch

import lora_fast
from bench.linear_cases import Case, build, fused_calls

from .day import day


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weight", choices=["dense", "nf4"], default="dense")
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    with day(rehearse=options.rehearse) as today, lora_fast.set_backend(today.fused):
        bfloat16 = torch.bfloat16
        case = Case(
            *(options.rows, options.width, options.width, 16, bfloat16, options.weight),
            adapter_dtype=bfloat16,
        )
        layer = build(case, today.device)["lora_fast"]
        layer.forward_backward()
        torch.cuda.synchronize(today.device)
        torch.cuda.profiler.start()
        layer.forward_backward()
        torch.cuda.synchronize(today.device)
        torch.cuda.profiler.stop()
        if fused_calls(layer) != 2:
            raise RuntimeError("the fused path did not run")


if __name__ == "__main__":
    main()
