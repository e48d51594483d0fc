"""Fixtures of every test: fixed seeds, poisoned memory, and the machine that runs the kernels."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import older_triton
import pytest
import torch
import torch.utils._device
from cpu_kinds import KINDS, VARIABLE, forced
from hypothesis import HealthCheck, settings
from imports import needs
from machines import MACHINES, NATIVE_DTYPES, Executor, multiplying, started
from pins import PINS, is_pinned

from tests import ptx_executor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Tests of the tuner bring a clock of their own; no other test launches what it did not ask for.
os.environ.setdefault("LORA_FAST_AUTOTUNE", "0")

# A shell makes background processes ignore Ctrl-C, which tests press.
signal.signal(signal.SIGINT, signal.default_int_handler)

if INTERPRETED:
    from bench.instruments import triton_interpreter

    triton_interpreter.install()
elif HAS_TRITON:
    older_triton.refuse_returned_nones()

# The same examples every time; `executor` keeps no state between examples.
settings.register_profile(
    "reproducible",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("reproducible")


def _reason_to_skip(item: pytest.Item) -> str | None:
    marks = {mark.name for mark in item.iter_markers()}
    needs_triton = marks & {"interpreter", "compiled", "offline"}
    if needs_triton and not HAS_TRITON:
        return "Triton is not installed"
    if "interpreter" in marks and not INTERPRETED:
        return "needs TRITON_INTERPRET=1 before the process starts"
    if marks & {"compiled", "offline", "gpu"} and INTERPRETED:
        return "TRITON_INTERPRET=1: this process interprets kernels instead of compiling them"
    if "gpu" in marks:
        return None if torch.cuda.is_available() else "needs a CUDA device"
    if "pinned" in marks and not is_pinned("triton"):
        return f"its limits hold for triton {PINS['triton']}"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--without",
        action="append",
        default=[],
        metavar="MODULE",
        help="leave out the test files that need this module: tests/support/imports.py",
    )
    parser.addoption("--cpu-kind", choices=KINDS, help="run everything as on this kind of CPU")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    absent = config.getoption("--without")
    if absent and collection_path.match("test_*.py") and needs(collection_path, absent):
        return True
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that use `cpu_kind` run on both kinds of CPU, or on the one that is forced."""
    if "cpu_kind" in metafunc.fixturenames:
        told = metafunc.config.getoption("cpu_kind")
        metafunc.parametrize("cpu_kind", [told] if told else KINDS, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"exhaustive", "interpreter"} <= {mark.name for mark in item.iter_markers()}:
            raise pytest.UsageError(f"{item.nodeid} is exhaustive and interpreted: no leg runs it")
        reason = _reason_to_skip(item)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Every collection of garbage in a test would go through the modules and tests that stay."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers for a test whether it runs alone, in parallel or last."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(autouse=True)
def _checked_plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch plan of another test, and every repeated launch is what Triton would launch."""
    if INTERPRETED or not HAS_TRITON:
        return
    if any(map(request.node.get_closest_marker, ("compiled", "offline", "gpu"))):
        from checked_plans import address_as_tensor, checked_runner
        from lora_fast.kernels import launch_plans

        from lora_fast.backends import triton_plans

        triton_plans.forget()
        monkeypatch.setattr(launch_plans, "runner_of", checked_runner)
        monkeypatch.setattr(launch_plans, "address", address_as_tensor)


ALLOCATORS: list[tuple[Any, str]] = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
    # Those of launch plans.
    (torch._C._dynamo.guards, "_empty_strided_cpu"),
]


@pytest.fixture(autouse=True, scope="session")
def _poison() -> Iterator[None]:
    """Fill what Python allocates without initialising it: NaN, or 0x5A bytes in integers.

    A patch of the functions, and not torch.utils.deterministic.fill_uninitialized_memory, which
    needs deterministic algorithms and so changes what the tests run.
    """
    # `with torch.device(...)` knows the functions it redirects by a list made at its first use.
    torch.utils._device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


@pytest.fixture
def allocating_as_users_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills new memory would be counted as launches."""
    for owner, name in ALLOCATORS:
        monkeypatch.setattr(owner, name, getattr(owner, name).__wrapped__)


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.device.type != "meta":
            with torch.no_grad():
                tensor.fill_(_poison_of(tensor.dtype))
        return tensor

    return poisoned


def _poison_of(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype == torch.bool:
        return True
    return int.from_bytes(b"\x5a" * dtype.itemsize, "little")


@pytest.fixture(params=list(NATIVE_DTYPES))
def native_dtypes(request: pytest.FixtureRequest) -> Iterator[tuple[torch.dtype, ...]]:
    """The 16-bit dtypes that the CPU multiplies, each kind of CPU one after the other."""
    dtypes = NATIVE_DTYPES[request.param]
    with multiplying(dtypes):
        yield dtypes


@pytest.fixture(autouse=True, scope="session")
def _forced_cpu_kind(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kind of CPU of the whole session, where one is forced, and of its child processes."""
    kind = request.config.getoption("cpu_kind")
    if kind is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch, forced(kind):
        patch.setenv(VARIABLE, kind)
        yield


@pytest.fixture
def cpu_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kind of CPU, one after the other: see cpu_kinds.py."""
    with forced(request.param):
        yield request.param


@pytest.fixture
def released_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No limit of decoded weights, nothing that another test left, and nothing left afterwards."""
    from lora_fast.four_bit import decoded

    gc.collect()
    assert decoded.bytes_saved.saved == 0
    monkeypatch.setattr(decoded.bytes_saved, "told", 1 << 40)
    yield
    gc.collect()
    assert decoded.bytes_saved.saved == 0, "a decoded weight was not released"


@pytest.fixture
def libraries_as_before() -> Iterator[None]:
    """A run silences the libraries; the next test finds them as they were."""
    from tiny_runs import library_logging

    with library_logging():
        yield


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each forward pass of several layers computed, on the torch backend."""
    from lora_fast.backends.torch_ops import TorchBackend

    calls: list[int] = []
    forward = TorchBackend.forward

    def counted(self: TorchBackend, x: Any, fs: Any, needs: Any) -> Any:
        calls.extend([len(fs)] if len(fs) > 1 else [])
        return forward(self, x, fs, needs)

    monkeypatch.setattr(TorchBackend, "forward", counted)
    return calls


PARAMS = [pytest.param(make, id=name, marks=marks) for name, make, marks in MACHINES]


@pytest.fixture(params=PARAMS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """Every machine that can run kernels, one after the other; its backend is Triton."""
    with started(request.param()) as machine:
        yield machine


@pytest.fixture(params=[PARAMS[0], PARAMS[2], PARAMS[4]])
def typical_executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """One architecture for all: for cases that differ little from those that run on each."""
    with started(request.param()) as machine:
        yield machine


@pytest.fixture(params=[PARAMS[0], PARAMS[4]])
def interpreter_or_gpu(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """For what compiling does not change, or other tests show of compiled code: the launches of a
    step (test_offline.py), the same bits from run to run (in several schedules)."""
    with started(request.param()) as machine:
        yield machine


@pytest.fixture(params=[pytest.param(arch, id=f"sm_{arch}") for arch in (80, 90, 100)])
def sm(request: pytest.FixtureRequest) -> Iterator[int]:
    """A compute capability that compiled kernels of a test are executed for."""
    with ptx_executor.installed(request.param):
        yield request.param


@pytest.fixture(name="ptx_executor", params=PARAMS[1:4])
def _ptx_executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """The PTX executor alone, for what only it has: schedules, resident CTAs, planted races."""
    with started(request.param()) as machine:
        yield machine
