"""The machines of tests: those that run kernels (interpreter, PTX executor, GPU), and CPUs by the
16-bit dtypes that they multiply."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import lora_fast
from lora_fast.backends import torch_products
from tests import ptx_executor

# What a CPU multiplies as it is: nothing, bfloat16 (AVX512-BF16, AMX), or what cuBLAS does, whose
# products these are on a GPU.
NATIVE_DTYPES = {
    "as float32": (),
    "bfloat16": (torch.bfloat16,),
    "as cuBLAS": (torch.bfloat16, torch.float16),
}


@contextlib.contextmanager
def multiplying(dtypes: tuple[torch.dtype, ...]) -> Iterator[None]:
    """The torch backend as on a CPU that multiplies these 16-bit dtypes and no others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_products, "native_dtypes", lambda: dtypes)
        yield


@dataclass(frozen=True)
class Executor:
    """A machine that runs Triton kernels: Triton's interpreter, the PTX executor, or a GPU.

    Tensors of a test belong on ``device``. ``arch`` is the compute capability (90) of compiled
    code, None in the interpreter.
    """

    name: str
    device: torch.device
    arch: int | None
    options: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Make this the machine that kernels run on."""
        if self.name.startswith("sm_"):
            with ptx_executor.installed(self.arch, **self.options):
                yield
        else:
            yield

    @contextlib.contextmanager
    def with_options(self, **options: Any) -> Iterator[None]:
        """Other options of the PTX executor for a block: ``schedule="reverse"``, ``resident=1``."""
        ptx_executor.install(self.arch, **{**self.options, **options})
        try:
            yield
        finally:
            ptx_executor.install(self.arch, **self.options)

    @contextlib.contextmanager
    def counting_launches(self) -> Iterator[list[str]]:
        """The names of the kernels that are launched inside the block, in order."""
        from triton.runtime.interpreter import GridExecutor
        from triton.runtime.jit import JITFunction

        names: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", _recording(GridExecutor.__call__, names))
            patch.setattr(JITFunction, "run", _recording(JITFunction.run, names))
            yield names


def _recording(run: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("warmup"):
            names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    return recorded


def interpreter() -> Executor:
    return Executor("interpreter", torch.device("cpu"), None)


def ptx(arch: int) -> Executor:
    return Executor(f"sm_{arch}", torch.device("cpu"), arch, {"check_global_race": True})


def gpu() -> Executor:
    major, minor = torch.cuda.get_device_capability()
    return Executor("gpu", torch.device("cuda"), 10 * major + minor)


# name, how to make it, the marks of tests that run on it
MACHINES: list[tuple[str, Callable[[], Executor], list[pytest.MarkDecorator]]] = [
    ("interpreter", interpreter, [pytest.mark.interpreter]),
    *(
        (f"sm_{arch}", functools.partial(ptx, arch), [pytest.mark.compiled])
        for arch in (80, 90, 100)
    ),
    ("gpu", gpu, [pytest.mark.gpu, pytest.mark.compiled]),
]


@contextlib.contextmanager
def started(machine: Executor) -> Iterator[Executor]:
    """`machine`, with Triton as the backend."""
    from lora_fast.kernels import workspace

    try:
        with machine.running(), lora_fast.set_backend("triton"):
            yield machine
    finally:
        # A launch that was aborted on purpose leaves tickets behind, which the next would take up.
        workspace.forget()
