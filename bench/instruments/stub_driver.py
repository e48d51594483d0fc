"""A Triton driver for an absent GPU: it compiles every launch and records it.

``with recording(90) as log:`` makes Triton believe in an sm_90 device. Launches pass the real JIT
binder (argument specialisation, heuristics, configuration choice, grid), the real compiler and
ptxas, and end in ``log.launches`` instead of on a device. Nothing is computed.

Tensors are best made on the ``meta`` device: they have shapes, dtypes, strides and aligned
addresses but no memory, so real model shapes cost nothing. A kernel that asks for more shared
memory than the device has raises triton's OutOfResources, as it would on the device.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver as triton_driver

from lora_fast.doctor.compile_check import AbsentDevice, standing_in

from . import resources

_DEVICE_INDEX_BASE = 1000
"""Triton caches kernels per device index; no real device may have the index of a stub."""


@dataclass(frozen=True)
class TensorArgument:
    """A pointer argument of a launch: the geometry of the tensor, not its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    divisible_by_16: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its elements; an element that several indices share counts once per index."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class CompiledKernel:
    """One specialisation of a kernel for one target, with all stages of the compiler.

    ``function`` is the name of its Python function, ``name`` the one that a profiler shows.
    """

    function: str
    name: str
    target: GPUTarget
    metadata: Any
    binary: bytes = field(repr=False)

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one CTA."""
        return int(self.metadata.shared)

    @property
    def num_warps(self) -> int:
        return int(self.metadata.num_warps)

    @property
    def num_stages(self) -> int:
        return int(self.metadata.num_stages)

    def text(self, stage: str) -> str:
        """One of the compiler's stages: ttir, ttgir, llir, ptx (NVIDIA) or amdgcn (AMD)."""
        file = self.function[:150]
        group = get_cache_manager(self.metadata.hash).get_group(f"{file}.json") or {}
        path = group.get(f"{file}.{stage}")
        if path is None:
            raise ValueError(f"stage must be one of {sorted(group)}, got {stage!r}")
        with open(path) as file:
            return file.read()

    @functools.cached_property
    def resources(self) -> resources.Resources:
        """Registers, local memory, shared memory, occupancy and the loops with matrix products."""
        threads = self.num_warps * self.target.warp_size
        if self.target.backend == "hip":
            text = self.text("amdgcn")
            return resources.of_amdgcn(text, threads, self.shared_bytes, self.target.arch)
        return resources.of_cubin(self.binary, self.target.arch, threads, self.shared_bytes)


@dataclass(frozen=True)
class Launch:
    """One recorded launch; ``arguments`` holds a TensorArgument for each pointer."""

    name: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    kernel: CompiledKernel

    @property
    def num_programs(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass
class Log:
    """The launches of one ``recording`` block, in order."""

    target: GPUTarget
    launches: list[Launch] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [launch.name for launch in self.launches]

    @property
    def kernels(self) -> list[CompiledKernel]:
        """The distinct compiled kernels, in the order of their first launch."""
        return list({id(launch.kernel): launch.kernel for launch in self.launches}.values())


def target_of(arch: int | str) -> GPUTarget:
    """90 → sm_90; "gfx942" → an AMD target. ValueError for a device without a table of limits."""
    resources.limits_of(arch)
    return GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)


@contextlib.contextmanager
def recording(arch: int | str) -> Iterator[Log]:
    """Make the stub for ``arch`` Triton's active driver for a block, and yield its log."""
    log = Log(target_of(arch))
    with standing_in(StubDriver(log)):
        yield log


class StubDriver(AbsentDevice):
    """A device whose every launch goes to ``log``, and whose tensors are on the meta device."""

    def __init__(self, log: Log) -> None:
        arch = log.target.arch
        limits = resources.limits_of(arch)
        properties = {
            "max_shared_mem": limits.shared_per_block,
            "multiprocessor_count": limits.multiprocessors,
            "max_num_regs": limits.registers_per_sm,
        }
        index = _DEVICE_INDEX_BASE + list(resources.LIMITS).index(arch)
        super().__init__(log.target, properties, index)
        self.log = log
        self.launcher_cls = _Launcher

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        """All configurations of an autotuner cost the same, so that the first one wins."""

        def bench(fn: Any, *args: Any, quantiles: Any = None, **kwargs: Any) -> float | list[float]:
            return [1.0] * len(quantiles) if quantiles else 1.0

        return bench


class _Launcher:
    """Takes the place of Triton's compiled C launcher of one kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self._src = src
        self._metadata = metadata
        self._kernel: CompiledKernel | None = None

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        binary: bytes,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *args: Any,
    ) -> None:
        log = triton_driver.active.log
        if self._kernel is None:
            name, target = self._metadata.name, self._metadata.target
            function = self._src.fn.__name__
            self._kernel = CompiledKernel(function, name, target, self._metadata, binary)
        if enter_hook is not None:
            enter_hook(launch_metadata)
        if grid_x * grid_y * grid_z == 0:
            return
        log.launches.append(
            Launch(
                self._kernel.function,
                (int(grid_x), int(grid_y), int(grid_z)),
                self._arguments(args),
                self._constexprs(),
                self._kernel,
            )
        )

    def _arguments(self, args: tuple[Any, ...]) -> dict[str, Any]:
        signature = self._src.signature
        return {
            name: self._described((index,), arg)
            for index, (name, arg) in enumerate(zip(signature, args, strict=True))
            if signature[name] != "constexpr"
        }

    def _described(self, path: tuple[int, ...], arg: Any) -> Any:
        if isinstance(arg, tuple):
            parts = [self._described((*path, index), part) for index, part in enumerate(arg)]
            return type(arg)(*parts) if hasattr(arg, "_fields") else tuple(parts)
        if not isinstance(arg, torch.Tensor):
            return arg
        attributes = [key for key, value in self._src.attrs.get(path, []) if value == 16]
        return TensorArgument(
            tuple(arg.shape), arg.stride(), arg.dtype, "tt.divisibility" in attributes
        )

    def _constexprs(self) -> dict[str, Any]:
        """By name, those of a tuple (the tile sizes of a launch) one by one."""
        names, found = list(self._src.signature), {}
        for path, value in self._src.constants.items():
            if len(path) == 1:
                is_tuple = hasattr(value, "_asdict")
                found |= value._asdict() if is_tuple else {names[path[0]]: value}
        return found
