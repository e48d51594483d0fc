"""Runs the PTX that Triton compiles, on the CPU, and checks it while it runs.

    import ptx_executor

    with ptx_executor.installed(arch=90, check_global_race=True):
        kernel[grid](x_cpu, y_cpu, n, BLOCK=128)  # every @triton.jit launch executes its PTX
        print(ptx_executor.report())

README.md beside this file says what is executed, checked and counted.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .counts import LaunchCounts, Report, of_all
from .errors import (
    Deadlock,
    DeviceAssert,
    Divergence,
    GlobalRace,
    Misaligned,
    MissingFence,
    OutOfBounds,
    PTXError,
    SharedRace,
    UninitialisedShared,
)
from .options import Options

if TYPE_CHECKING:
    import torch

    from .launching.driver import PTXDriver

__all__ = [
    "Deadlock",
    "DeviceAssert",
    "Divergence",
    "GlobalRace",
    "LaunchCounts",
    "Misaligned",
    "MissingFence",
    "Options",
    "OutOfBounds",
    "PTXError",
    "Report",
    "SharedRace",
    "UninitialisedShared",
    "install",
    "installed",
    "launches",
    "register",
    "report",
    "reset",
    "uninstall",
]

_driver: PTXDriver | None = None


def install(arch: int = 80, **options: Any) -> None:
    """Make Triton compile for sm_`arch` (80 to 90, or 100) and execute the PTX on CPU tensors.

    The other arguments are those of Options. Calling it again replaces all of them. ValueError,
    TypeError and NotImplementedError for what is not there.
    """
    global _driver
    from .launching import driver

    _driver = driver.PTXDriver(arch, Options(**options))
    driver.activate(_driver)


def uninstall() -> None:
    """Give Triton its own driver back."""
    global _driver
    if _driver is not None:
        from .launching import driver

        driver.deactivate()
        _driver = None


@contextlib.contextmanager
def installed(arch: int = 80, **options: Any) -> Iterator[ModuleType]:
    """`install` for a block; gives this module."""
    install(arch, **options)
    try:
        yield sys.modules[__name__]
    finally:
        uninstall()


def _active() -> PTXDriver:
    if _driver is None:
        raise RuntimeError("the PTX executor is not installed")
    return _driver


def launches() -> list[LaunchCounts]:
    """The launches since `install` or `reset`."""
    return _active().launches


def reset() -> None:
    """Forget the launches so far."""
    _active().launches.clear()


def register(tensor: torch.Tensor) -> None:
    """Let kernels reach a CPU tensor that is no argument: pointers in memory, integer addresses."""
    _active().registered.append(tensor)


def report() -> Report:
    """Totals over the launches."""
    return of_all(launches())
