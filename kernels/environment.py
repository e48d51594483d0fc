"""The environment of a launch: the device, and whether the user allows TF32."""

import functools
from typing import Any

import torch
import triton
from triton.runtime import driver

from . import triton_version  # noqa: F401


def current_arch() -> int | None:
    """Compute capability of Triton's device; None in the interpreter and on other vendors."""
    if triton.knobs.runtime.interpret:
        return None
    active = driver.active
    return _arch_of(active, active.get_current_device())


@functools.lru_cache(maxsize=8)
def _arch_of(active: Any, device: int) -> int | None:
    """Cached, since it is needed before every launch and drivers answer slowly."""
    target = active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else None


def precision_of(dtype: torch.dtype) -> str:
    """tl.dot's input_precision: IEEE products for float32 unless torch's user allowed TF32."""
    return "tf32" if multiplies_in_tf32(dtype) else "ieee"


def multiplies_in_tf32(dtype: torch.dtype) -> bool:
    """Whether products of `dtype` are TF32's, ours and those of cuBLAS."""
    return dtype == torch.float32 and tf32_setting() in ("tf32", True)


def tf32_setting() -> str | bool:
    """What :func:`multiplies_in_tf32` depends on, not by torch.backends, which takes µs."""
    if _FP32_PRECISION is not None:
        return _FP32_PRECISION("cuda", "matmul")
    return torch.backends.cuda.matmul.allow_tf32


_FP32_PRECISION = getattr(torch._C, "_get_fp32_precision_getter", None)
