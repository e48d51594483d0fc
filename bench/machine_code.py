"""The code that the compiler generates for one kernel, for a GPU that need not be present.

    python -m bench.machine_code ticketed_gemm                        registers, loops, instructions
    python -m bench.machine_code dX --arch 100 --show ttgir           Triton's IR, or ttir, llir
    python -m bench.machine_code strips --r 64 --dropout 0.1 --show ptx
    python -m bench.machine_code nf4_decode --show sass
    python -m bench.machine_code forward --tile BLOCK_N=64,num_warps=4    a tile that is not shipped

KERNEL is a kernel's name, or what it does in a step: forward, dX, "dB, dS", dA, or beside cuBLAS
"S Q" and "dS A". It is compiled as the library launches it for one 4096 × 4096 layer; each
specialisation is printed once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from .instruments import resources, stub_driver

KERNELS = (
    *("ticketed_gemm", "strips", "nf4_decode", "shrink", "expand", "nf4_decode_augmented"),
    *("row_norms", "weight_update"),
)
ROLES = ("forward", "dX", "dB, dS", "dA", "S Q", "dS A")
# Of the routes that leave the product with W to cuBLAS.
OF_ROUTES = ("shrink", "expand", "nf4_decode_augmented", "S Q", "dS A")
OF_WEIGHTS = ("row_norms", "weight_update")
STAGES = ("ttir", "ttgir", "llir", "ptx")
ARCHS = (80, 89, 90, 100, 120)
SHOWN = ("counts", *STAGES, "sass")


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    found = list(kernels(options))
    if not found:
        print(f"no {options.kernel} is launched for this case: {_why(options)}", file=sys.stderr)
        return 1
    for row, kernel in found:
        print(f"# {row['kernel']}: {row['config']}")
        print(_counts(row) if options.show == "counts" else shown(kernel, options.show))
    return 0


def kernels(options: Any) -> Iterator[tuple[dict[str, Any], stub_driver.CompiledKernel]]:
    """The kernels of a case that are called ``options.kernel``, each with its row of counts."""
    from .offline import machine_code, variants
    from .offline.contestants import Case

    if options.kernel in OF_WEIGHTS:
        variant = variants.of_weights(options.arch, options.r)
    elif options.tile is not None:
        variant = variants.of_tile(tile(options.tile, options.arch), options.arch, options.r)
    else:
        case = Case(variants.LINEAR, options.rows, options.r, options.weight, options.dropout)
        beside_cublas = options.kernel in OF_ROUTES
        variant = (variants.of_routes if beside_cublas else variants.of_case)(case, options.arch)
    rows = machine_code.rows([variant], options.arch)
    launches = {id(launch.kernel): launch for launch in variant.log.launches}.values()
    for row, launch in zip(rows, launches, strict=True):
        if options.kernel in (launch.name, machine_code.role(launch)):
            yield row, launch.kernel


def tile(text: str, arch: int) -> Any:
    """The configuration of ticketed_gemm for many rows, with fields of `text`, ``NAME=N,NAME=N``.

    ValueError: it has no such field, or one is no integer.
    """
    import torch
    from lora_fast.kernels import launch_policy

    picked = launch_policy.pick_gemm(8192, torch.bfloat16, arch)
    known = {field.name for field in fields(picked)}
    changed = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in known or not value.isdecimal():
            raise ValueError(f"tile must be NAME=N with names of {sorted(known)}, got {part!r}")
        changed[name] = type(getattr(picked, name))(int(value))
    return replace(picked, **changed)


def shown(kernel: stub_driver.CompiledKernel, stage: str) -> str:
    """The text of one stage of the compiler, or the machine code as cuobjdump prints it."""
    return resources.sass_of(kernel.binary) if stage == "sass" else kernel.text(stage)


def _counts(row: dict[str, Any]) -> str:
    plain = {
        name: value for name, value in row.items() if name not in ("kernel", "config", "loops")
    }
    lines = [f"{name.replace('_', ' '):24}{_words(value)}" for name, value in plain.items()]
    for number, loop in enumerate(row["loops"]):
        name = f"loop {number}" + (" (main)" if number == row["main_loop"] else "")
        classes = ", ".join(f"{count} {kind}" for kind, count in loop.items())
        lines.append(f"{name:24}{sum(loop.values())} instructions: {classes}")
    return "\n".join(lines) + "\n"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _why(options: Any) -> str:
    if options.kernel in ("nf4_decode", "nf4_decode_augmented"):
        return "W is decoded first with --weight nf4 and many --rows"
    return "--rows and --weight decide which kernels a step has"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m bench.machine_code",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = (*KERNELS, *ROLES)
    parser.add_argument("kernel", metavar="KERNEL", choices=names, help=", ".join(names))
    parser.add_argument("--arch", type=int, default=90, choices=ARCHS, help="90: sm_90 (default)")
    parser.add_argument("--show", default="counts", choices=SHOWN, help="default counts")
    parser.add_argument("--r", type=int, default=16, help="rank (default 16)")
    parser.add_argument("--rows", type=int, default=8192, help="rows of x (default 8192)")
    parser.add_argument(
        "--weight", choices=("dense", "nf4"), help="default dense; of what decodes, nf4"
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="default 0")
    parser.add_argument("--tile", metavar="NAME=N,…", help="fields of GemmConfig to change")
    options = parser.parse_args(arguments)
    if options.tile is not None:
        try:
            tile(options.tile, options.arch)
        except ValueError as error:
            parser.error(str(error))
    decodes = options.kernel in ("nf4_decode", "nf4_decode_augmented")
    options.weight = options.weight or ("nf4" if decodes else "dense")
    return options


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
