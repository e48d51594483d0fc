"""Launch plans whose every launch is compared with what Triton chooses for the same arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor


def checked_runner(kernel: Any, compiled: Any, constants: dict[str, Any]) -> Callable[..., None]:
    """In place of a plan's launcher: launches through the binder, which must find the kernel that
    the plan holds."""
    options = {k: v for k, v in constants.items() if k not in kernel.arg_names}

    def run(x: int, y: int, z: int, stream: Any, function: Any, *rest: Any) -> None:
        arguments = dict(zip(kernel.arg_names, rest[4:], strict=True))
        found = kernel[x, y, z](**arguments, **options)
        assert found is compiled, f"Triton launches another {kernel.__name__} than the plan"
        assert function is compiled.function

    return run


def address_as_tensor(
    tensor: Tensor, start: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Tensor:
    """In place of an address in a plan: the tensor there, which the binder needs."""
    first = tensor.storage_offset() + start // tensor.element_size()
    return tensor.as_strided(shape, strides, first)


def leave_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans as users run them, for tests that count calls or measure time."""
    from lora_fast.kernels import launch_plans, plan_memory

    monkeypatch.setattr(launch_plans, "runner_of", launcher_of)
    monkeypatch.setattr(launch_plans, "address", plan_memory.address)


def bound_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels whose launches go through Triton's binder from now on; plans are unchecked."""
    from triton.runtime.jit import JITFunction

    found: list[str] = []
    bind = JITFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(self.__name__)
        return bind(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", recorded)
    leave_unchecked(monkeypatch)
    return found


def launcher_of(kernel: Any, compiled: Any, constants: dict[str, Any]) -> Callable[..., None]:
    """The launcher itself."""
    launcher: Callable[..., None] = compiled.run
    return launcher
