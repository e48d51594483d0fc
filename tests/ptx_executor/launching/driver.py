"""A Triton driver that executes the compiled PTX instead of launching it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import triton.backends.nvidia.driver as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver as triton_driver

from .. import counts
from ..machine.grid import run_grid
from ..machine.state import Dim3, Launch
from ..memory.global_memory import GlobalMemory
from ..options import Options
from ..ptx.parser import parse
from ..translation.program import Program
from .device import DeviceInterface, Utils
from .parameters import Binder, Parameters

# The kernels whose launcher is being made: a launcher is not told which PTX it is for.
_loading = threading.local()
_init_handles = CompiledKernel._init_handles


def _noting_kernel(kernel: CompiledKernel) -> Any:
    stack = _loading.__dict__.setdefault("stack", [])
    stack.append(kernel)
    try:
        return _init_handles(kernel)
    finally:
        stack.pop()


class Launcher:
    """Takes the place of the compiled C launcher of one kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata
        stack = getattr(_loading, "stack", None)
        if stack:
            self._ptx = stack[-1].asm["ptx"]
        else:
            path = get_cache_manager(metadata.hash).get_file(f"{source.name[:150]}.ptx")
            assert path, f"no PTX of {source.name} in Triton's cache"
            with open(path) as file:
                self._ptx = file.read()
        self._programs: dict[Callable[[str], str] | None, Program] = {}

    def program(self, transform: Callable[[str], str] | None = None) -> Program:
        """The decoded kernel, of PTX that was transformed."""
        if transform not in self._programs:
            module = parse(self._ptx if transform is None else transform(self._ptx))
            kernel = module.kernels[self.metadata.name]
            self._programs[transform] = Program(kernel, self.metadata.shared)
        return self._programs[transform]

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: Any,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *args: Any,
    ) -> None:
        if enter_hook is not None:
            enter_hook(launch_metadata)
        triton_driver.active.execute(self, (x, y, z), args)
        if exit_hook is not None:
            exit_hook(launch_metadata)


def _cost(
    function: Callable[[], Any], *args: Any, quantiles: list[float] | None = None, **kwargs: Any
) -> float | list[float]:
    """What an autotuner takes for a time: 1, or the millions of warp instructions executed.

    Autotuners keep this function, so it must not depend on one driver.
    """
    driver = triton_driver.active
    cost = 1.0
    if driver.opts.autotune == "run":
        before = len(driver.launches)
        function()
        cost = sum(launch["warp_instructions"] for launch in driver.launches[before:]) / 1e6
    return [cost] * len(quantiles) if quantiles else cost


class PTXDriver:
    """Pretends to be a CUDA device of a compute capability. NotImplementedError for others."""

    launcher_cls = Launcher

    def __init__(self, arch: int, opts: Options) -> None:
        if arch // 10 not in (8, 9) and arch != 100:
            raise NotImplementedError(f"`arch` must be 80 to 90 or 100, got {arch}")
        self.arch, self.opts = arch, opts
        self.utils = Utils(arch)
        self.launches: list[counts.LaunchCounts] = []
        self.registered: list[torch.Tensor] = []
        self._interface = DeviceInterface(arch, self.utils)

    # -- what Triton asks ----------------------------------------------------------------------
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps kernels by device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> DeviceInterface:
        return self._interface

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1, dtype=torch.int32)

    def clear_cache(self, cache: torch.Tensor) -> None:
        cache.zero_()

    def get_benchmarker(self) -> Callable[..., Any]:
        return _cost

    # -- execution -----------------------------------------------------------------------------
    def execute(self, launcher: Launcher, grid: Dim3, args: tuple[Any, ...]) -> None:
        """Run a launch, and count it."""
        started = time.perf_counter()
        program, metadata = launcher.program(self.opts.transform), launcher.metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise NotImplementedError("clusters (num_ctas > 1)")
        memory = GlobalMemory(
            self.opts.unique_bytes, self.opts.check_global_race, program.global_granule
        )
        binder = Binder(memory, self.opts.bounds, self.opts.devices)
        layouts = list(getattr(metadata, "tensordesc_meta", None) or [])
        binder.add_arguments(launcher.source.signature, args, layouts)
        for tensor in self.registered:
            binder.add_tensor(tensor, "registered tensor")
        ctas = grid[0] * grid[1] * grid[2]
        for kind in ("global", "profile"):
            size = getattr(metadata, f"{kind}_scratch_size", 0) * ctas
            align = getattr(metadata, f"{kind}_scratch_align", 1)
            binder.add_scratch(f"{kind} scratch", size, align)
        values = binder.values[: len(program.kernel.params)]
        params = Parameters(program, values, memory)
        threads = program.kernel.threads or metadata.num_warps * 32
        counters = counts.Counts()
        launch = Launch(program, grid, threads, memory, params, self.opts, counters)
        if ctas:
            run_grid(launch)
        seconds = time.perf_counter() - started
        self.launches.append(counts.of_launch(launch, self.arch, seconds))


_previous: Any = None  # Triton's driver before ours, while ours is active


def activate(driver: PTXDriver) -> None:
    """Make Triton compile for this driver and launch on it."""
    global _previous
    if _previous is None:
        _previous = triton_driver._active
        CompiledKernel._init_handles = _noting_kernel
    triton_driver.set_active(driver)


def deactivate() -> None:
    """Give Triton its own driver back."""
    global _previous
    if _previous is not None:
        CompiledKernel._init_handles = _init_handles
        triton_driver._active = _previous
        _previous = None
