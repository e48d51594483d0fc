"""Compiles the kernels of typical layers for a GPU that need not be present.

A driver that stands in for the device goes through Triton's real launch path: argument
specialisation, configuration, compiler and assembler. Nothing is run, and no tensor's memory is
touched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

KIB = 1024
# Opt-in shared memory of a block and multiprocessors, by compute capability (CUDA C++ Programming
# Guide, "Technical Specifications per Compute Capability").
DEVICES = {
    80: (163, 108),
    86: (99, 84),
    89: (99, 128),
    90: (227, 132),
    100: (227, 148),
    120: (99, 170),
}
# Triton caches compiled kernels by device index; no real device has these.
_FIRST_INDEX = 2000
_WARP = 32


@dataclass(frozen=True)
class KernelCheck:
    """One kernel of one layer: whether it compiles, how long that takes, resources of a block."""

    layer: str
    kernel: str
    error: str | None
    seconds: float
    shared_bytes: int = 0
    warps: int = 0


def parse_arch(text: str) -> int:
    """``sm_90``, ``sm_90a``, ``9.0`` or ``90`` → 90. ValueError: it is not one that is known."""
    digits = text.lower().removeprefix("sm_").removesuffix("a").replace(".", "")
    if not digits.isdecimal() or int(digits) not in DEVICES:
        names = ", ".join(f"sm_{arch}" for arch in DEVICES)
        raise ValueError(f"arch must be one of {names}, got {text!r}")
    return int(digits)


def compile_kernels(
    arch: int, told: Callable[[str], None] = lambda layer: None
) -> list[KernelCheck]:
    """Compile what a training step of each kind of layer launches on `arch`.

    ``told(layer)`` is called before each. Errors are in the result and are not raised.
    """
    from ..backends.choice import set_backend

    found: list[KernelCheck] = []
    for layer, step in _layers().items():
        told(layer)
        start = time.perf_counter()
        try:
            device = _Compiling(arch)
            with standing_in(device), set_backend("triton"):
                step()
        except Exception as error:  # Triton, the assembler or the file system
            first = (str(error).strip().splitlines() or [""])[0]
            seconds = time.perf_counter() - start
            problem = f"{type(error).__name__}: {first}"
            found.append(KernelCheck(layer, "", problem, seconds))
            continue
        seconds = time.perf_counter() - start
        found += [
            KernelCheck(layer, name, None, seconds, *size) for name, size in device.compiled.items()
        ]
    return found


def _layers() -> dict[str, Callable[[], None]]:
    from ..nf4 import NF4Weight

    def dense(N: int, K: int) -> torch.Tensor:
        return torch.empty(N, K, dtype=torch.bfloat16)

    packed = NF4Weight.from_dense(torch.zeros(1024, 1024, dtype=torch.bfloat16))
    return {
        "LoRA, bfloat16": lambda: _step(dense(4096, 4096), 2048, 16),
        "LoRA, dropout, gains": lambda: _step(dense(4096, 4096), 2048, 16, gains=True, p=0.1),
        "LoRA, float32": lambda: _step(torch.empty(1024, 1024), 2048, 16),
        "QLoRA, many rows": lambda: _step(packed, 4096, 16),
        "QLoRA, few rows": lambda: _step(packed, 16, 16),
        "DoRA's norms": lambda: _norms(dense(4096, 4096)),
        "merging": lambda: _merge(dense(4096, 4096)),
    }


def _step(weight: Any, M: int, R: int, *, gains: bool = False, p: float = 0.0) -> None:
    from ..functional import adapted_linear

    N, K = weight.shape
    x = torch.empty(M, K, dtype=weight.dtype, requires_grad=True)
    A, B = torch.empty(R, K, requires_grad=True), torch.empty(N, R, requires_grad=True)
    shapes = {"b": N, "d": R, "g": N} if gains else {}
    vectors = {name: torch.empty(size, requires_grad=True) for name, size in shapes.items()}
    y = adapted_linear(x, weight, A=A, B=B, dropout_p=p, dropout_seed=0, **vectors)
    y.backward(torch.empty_like(y))


def _norms(weight: torch.Tensor) -> None:
    from ..base_layer.row_norms import row_norms

    row_norms(weight, torch.empty(16, weight.shape[1]), torch.empty(weight.shape[0], 16), 1.0)


def _merge(weight: torch.Tensor) -> None:
    from ..base_layer.merging import LowRank, add_low_rank

    N, K = weight.shape
    add_low_rank(weight, [LowRank(torch.empty(16, K), torch.empty(N, 16))])


@contextlib.contextmanager
def standing_in(device: AbsentDevice) -> Iterator[None]:
    """Make Triton believe in `device` for a block."""
    from triton.runtime.driver import driver

    previous = driver._active
    driver.set_active(device)
    try:
        yield
    finally:
        driver._active = previous


class AbsentDevice:
    """The interface that triton.runtime asks of a driver, for a device that is not there.

    `properties` are those that Triton reads of a device, `index` is nobody else's: Triton keeps
    compiled kernels by it. ``launcher_cls``, of a subclass, stands where Triton puts the compiled
    launcher of a kernel.
    """

    def __init__(self, target: Any, properties: dict[str, int], index: int) -> None:
        self.target = target
        self.properties = {"max_num_regs": 65536, "warpSize": target.warp_size, **properties}
        self.index = index
        self.utils = self

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spills, most threads): the binary stands for all of it."""
        return binary, binary, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def set_current_device(self, device: int) -> None:
        """There is one device."""

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(int(self.target.arch), 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    @staticmethod
    def is_active() -> bool:
        return True


class _Compiling(AbsentDevice):
    """A launch leaves its kernel's name, shared bytes and warps."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        shared, multiprocessors = DEVICES[arch]
        properties = {"max_shared_mem": shared * KIB, "multiprocessor_count": multiprocessors}
        super().__init__(GPUTarget("cuda", arch, _WARP), properties, _FIRST_INDEX + arch)
        self.compiled: dict[str, tuple[int, int]] = {}
        self.launcher_cls = self._launcher

    def _launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        from triton.runtime.driver import driver

        def launch(*arguments: Any) -> None:
            # Kept with the kernel, and called again under later drivers.
            size = int(metadata.shared), int(metadata.num_warps)
            driver.active.compiled[source.fn.__name__] = size

        return launch
