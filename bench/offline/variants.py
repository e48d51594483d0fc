"""The steps whose kernels are listed, so that every shipped configuration is among them.

Each is recorded from the library's own launchers: accelerated PEFT layers, or the Triton backend
where a plan of the tuner or a factor that no layer of PEFT has is wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.instruments import stub_driver

from . import contestants, layers
from .contestants import Case

LINEAR, LAYER = layers.SHAPES[:2]
WIDTH = LINEAR.hidden
# One number for every device: NF4 weights are decoded in the GEMM, by the tiles of many rows.
IN_GEMM_ROWS = 128
FEW_ROWS = (16, 64)


@dataclass(frozen=True)
class Variant:
    """The launches of one step. ``note`` is what the names of its kernels say beside their pass,
    rank and dropout; ``step`` its counts, where a whole one was counted."""

    log: stub_driver.Log
    R: int
    dropout_p: float = 0.0
    note: str = ""
    case: Case | None = None
    step: contestants.LoraFastStep | None = None


Make = Callable[[int, tuple[int, ...], tuple[float, ...]], Iterator[Variant]]


def record(
    names: Sequence[str], arch: int, ranks: tuple[int, ...], dropouts: tuple[float, ...]
) -> Iterator[Variant]:
    """The variants of the kinds ``names`` (keys of KINDS) on a device."""
    for name in names:
        yield from KINDS[name](arch, ranks, dropouts)


def _many_rows(arch: int, ranks: tuple[int, ...], dropouts: tuple[float, ...]) -> Iterator[Variant]:
    """A dense layer; its weight is NF4 and decoded first, for the kernel that does it."""
    for R, p in itertools.product(ranks, dropouts):
        yield _counted(Case(LINEAR, 8192, R, "nf4", p), arch)


def _in_gemm(arch: int, ranks: tuple[int, ...], dropouts: tuple[float, ...]) -> Iterator[Variant]:
    # Ranks beyond 64 run in chunks of 64.
    for R, p in itertools.product([R for R in ranks if R <= 64], dropouts):
        yield _counted(Case(LINEAR, IN_GEMM_ROWS, R, "nf4", p), arch)


def _few_rows(arch: int, ranks: tuple[int, ...], _: tuple[float, ...]) -> Iterator[Variant]:
    for weight in ("dense", "nf4"):
        yield _generation(Case(LINEAR, 1, ranks[0], weight, 0.0), arch)
        for M in FEW_ROWS:
            yield _counted(Case(LINEAR, M, ranks[0], weight, 0.0), arch, f"up to {M} rows")


def _groups(arch: int, ranks: tuple[int, ...], dropouts: tuple[float, ...]) -> Iterator[Variant]:
    """The layers of a decoder layer: q, k, v and gate, up read the same x."""
    for p in dropouts:
        yield _counted(Case(LAYER, 8192, ranks[0], "dense", p), arch)
    yield _counted(Case(LAYER, IN_GEMM_ROWS, ranks[0], "nf4", 0.0), arch)


def _float32_adapters(
    arch: int, ranks: tuple[int, ...], dropouts: tuple[float, ...]
) -> Iterator[Variant]:
    """PEFT keeps the adapters of a 16-bit model in float32."""
    for R in (R for R in ranks if R <= 64):
        case = Case(LINEAR, 8192, R, "dense", dropouts[0])
        yield _counted(case, arch, "fp32 A, B", adapter_dtype=torch.float32)


def _candidates(arch: int, ranks: tuple[int, ...], _: tuple[float, ...]) -> Iterator[Variant]:
    """What the tuner may time beside the configuration that is picked."""
    from lora_fast.kernels import launch_policy

    for config in launch_policy.other_gemms(8192, WIDTH, layers.DTYPE, arch):
        yield of_tile(config, arch, ranks[0])


def _routes(arch: int, ranks: tuple[int, ...], dropouts: tuple[float, ...]) -> Iterator[Variant]:
    """The kernels beside cuBLAS: of many rows on the routes that are taken by default."""
    for p, weight in itertools.product(dropouts, ("dense", "nf4")):
        yield of_routes(Case(LINEAR, 8192, ranks[0], weight, p), arch)


_OF_ROUTES = ("shrink", "expand", "nf4_decode_augmented")


def _others(arch: int, ranks: tuple[int, ...], _: tuple[float, ...]) -> Iterator[Variant]:
    """float32 models, DoRA's gain, ranks off 16, the norms of DoRA and merging."""
    R = ranks[0]
    yield Variant(_layer(arch, R, dtype=torch.float32), R, note="fp32 x")
    yield Variant(_layer(arch, R, gains="g"), R, note="g")
    yield Variant(_layer(arch, 100), 100)
    yield of_weights(arch, R)


KINDS: dict[str, Make] = {
    "many rows": _many_rows,
    "in-GEMM": _in_gemm,
    "few rows": _few_rows,
    "groups": _groups,
    "float32 adapters": _float32_adapters,
    "candidates": _candidates,
    "routes": _routes,
    "others": _others,
}


def of_case(case: Case, arch: int) -> Variant:
    """The step of one case."""
    return _counted(case, arch)


def of_routes(case: Case, arch: int) -> Variant:
    """The kernels beside cuBLAS in the step of a case, on the routes of the default."""
    _, log = contestants.LoraFast(case, adapter_dtype=torch.float32).step(case, arch)
    log.launches[:] = [launch for launch in log.launches if launch.name in _OF_ROUTES]
    return Variant(log, case.R, case.dropout_p, "fp32 A, B" + " beside x" * (case.weight == "nf4"))


def of_tile(config: Any, arch: int, R: int) -> Variant:
    """The step of a dense layer of many rows with a tile of ticketed_gemm that is not the picked
    one."""
    from lora_fast.tuning.plans import Plan

    plan = Plan(gemm=config)
    return Variant(_layer(arch, R, plan=plan), R, note=plan.name.removeprefix("fused "))


def of_weights(arch: int, R: int) -> Variant:
    """The kernels that read W alone: DoRA's norms, and merging."""
    from lora_fast.backends.triton_ops import TritonBackend

    ops = TritonBackend(cublas=False)
    W, A, B = _empty(WIDTH, WIDTH), _empty(R, WIDTH), _empty(WIDTH, R)
    with stub_driver.recording(arch) as log:
        ops.row_norms(W, A, B, 1.0)
        ops.update_weight(W, W, A=A, B=B)
    return Variant(log, R)


def _counted(case: Case, arch: int, note: str = "", **options: Any) -> Variant:
    step, log = contestants.LoraFast(case, **options).step(case, arch, fused=True)
    return Variant(log, case.R, case.dropout_p, note, case, step)


def _generation(case: Case, arch: int) -> Variant:
    """A token of inference: no backward pass."""
    import lora_fast

    model = contestants.LoraFast(case).model
    x = torch.empty(1, case.M, case.shape.hidden, dtype=layers.DTYPE)
    with torch.no_grad(), lora_fast.set_backend("triton"), stub_driver.recording(arch) as log:
        model(x)
    return Variant(log, case.R, note=f"up to {FEW_ROWS[0]} rows")


def _layer(
    arch: int,
    R: int,
    *,
    dtype: torch.dtype = layers.DTYPE,
    gains: str = "",
    plan: Any = None,
) -> stub_driver.Log:
    """Forward and backward pass of a dense layer on the Triton backend."""
    from lora_fast.backends.triton_ops import TritonBackend
    from lora_fast.factors import Constants, Factors, Needs
    from lora_fast.tuning.plans import FUSED

    x, dY, W = (_empty(M, WIDTH, dtype=dtype) for M in (8192, 8192, WIDTH))
    vectors: dict[str, Any] = {name: _empty(R if name == "d" else WIDTH) for name in gains}
    fs = [Factors(W, A=_empty(R, WIDTH), B=_empty(WIDTH, R), **vectors, constants=Constants(2.0))]
    needs = [Needs(x=True, A=True, B=True, **dict.fromkeys(gains, True))]
    ops = TritonBackend(cublas=False)
    with stub_driver.recording(arch) as log:
        _, saved = ops.forward(x, fs, needs, plan or FUSED)
        ops.backward([dY], x, saved, fs, needs, plan or FUSED)
    return log


def _empty(*shape: int, dtype: torch.dtype = layers.DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
