"""Every shipped configuration, alone, gives the right answer; and what is picked when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from equation import Case, check
from machines import MACHINES, Executor, started

pytest.importorskip("triton")
from lora_fast.kernels import configs, strips, ticketed_gemm
from lora_fast.kernels.configs import GemmConfig, StripConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHS = [None, 80, 86, 87, 89, 90, 100, 103, 120]

ALL = ("x", "bias", "A", "B", "b", "d", "g")


def _ragged(config: GemmConfig | StripConfig, dtype: torch.dtype) -> Case:
    """One block and a little more of everything that the configuration cuts into blocks."""
    if isinstance(config, GemmConfig):
        M, L = config.BLOCK_M + 5, max(config.BLOCK_N, config.BLOCK_K) + 6
    else:
        M, L = config.BLOCK_M + 5, config.BLOCK_L + 6
    adapter = FP32 if dtype == BF16 else None
    return Case(M=M, K=L, N=L + 8, R=21, dtype=dtype, adapter_dtype=adapter)


def _picked() -> Iterator[tuple[GemmConfig | StripConfig, torch.dtype]]:
    """Everything that a launch may be given by configs.py or the tuner, with a dtype it is for."""
    for dtype in (BF16, FP32):
        for arch in ARCHS:
            for M in (16, 64, 8192):
                for narrow in (False, True):
                    yield configs.pick_gemm(M, dtype, arch, narrow=narrow), dtype
                    for other in configs.other_gemms(M, dtype, arch, narrow=narrow):
                        yield other, dtype
            for R in (16, 64):
                yield configs.pick_strips(dtype, R, arch), dtype


SHIPPED = dict(_picked())


def _forcing(config: GemmConfig | StripConfig) -> pytest.MonkeyPatch:
    patch = pytest.MonkeyPatch()
    is_gemm = isinstance(config, GemmConfig)
    module, name = (ticketed_gemm, "pick_gemm") if is_gemm else (strips, "pick_strips")
    patch.setattr(module, name, lambda *args, **kwargs: config)
    return patch


def _check_alone(config: GemmConfig | StripConfig, executor: Executor, **changes: Any) -> None:
    patch = _forcing(config)
    try:
        check(replace(_ragged(config, SHIPPED[config]), **changes), executor.device)
    finally:
        patch.undo()


def test_all_are_known_to_this_file():
    kinds = (GemmConfig, StripConfig)
    named = {config for config in vars(configs).values() if isinstance(config, kinds)}
    assert named <= set(SHIPPED)
    assert len(SHIPPED) > len(named) >= 10


def _label(config: GemmConfig | StripConfig) -> str:
    return "-".join(str(value) for value in vars(config).values())


# The interpreter knows neither warps nor stages.
TILES = {_label(replace(config, num_warps=1, num_stages=1)): config for config in SHIPPED}


@pytest.mark.interpreter
@pytest.mark.parametrize("config", TILES.values(), ids=_label)
def test_a_configuration_alone_is_right(config):
    with started(MACHINES[0][1]()) as executor:
        _check_alone(config, executor, factors=ALL)


def _compiled() -> Iterator[object]:
    """Those of the tuner, on the architectures they are for; test_kernels.py runs what is picked.

    Multiples of 16 make the loads wide and asynchronous."""
    for name, make, marks in MACHINES[1:]:
        arch = int(name.removeprefix("sm_")) if name.startswith("sm_") else 90
        for config in configs.other_gemms(8192, BF16, arch):
            for even in (False, True):
                slow = [] if (arch, even) == (90, True) else [pytest.mark.exhaustive]
                label = f"{name}-{config.BLOCK_M}x{config.BLOCK_N}-{'even' if even else 'ragged'}"
                yield pytest.param(make, config, even, marks=[*marks, *slow], id=label)


@pytest.mark.parametrize(("make", "config", "even"), [*_compiled()])
def test_a_tuned_configuration_compiles_to_the_right_thing(
    make: Callable[[], Executor], config, even
):
    changes = {"M": 144, "K": 192, "N": 272, "R": 16} if even else {}
    with started(make()) as executor:
        _check_alone(config, executor, **changes)


@pytest.mark.parametrize("arch", ARCHS)
def test_what_is_tuned_is_not_what_is_picked(arch):
    for M in (128, 8192):
        others = configs.other_gemms(M, BF16, arch)
        assert others
        assert configs.pick_gemm(M, BF16, arch) not in others
