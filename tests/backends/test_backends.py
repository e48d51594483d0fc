"""The devices that backends run on, and the errors where one cannot."""

from __future__ import annotations

import gc
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import library_logging, run_cli

from lora_fast import features, set_backend
from lora_fast.backends import choice, selection
from lora_fast.backends.choice import uses_triton
from lora_fast.backends.selection import backend_for
from lora_fast.backends.torch_ops import TORCH
from lora_fast.doctor.diagnosis import diagnose
from lora_fast.factors import Factors, Needs
from lora_fast.functional import adapted_linear


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((8, 0), None, True), ((12, 0), None, True), ((7, 5), None, False), ((9, 4), "6.4", False)],
)
def test_auto_takes_triton_where_it_is_proven(monkeypatch, capability, hip, expected):
    choice._kernels_run_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with set_backend("auto"):
        assert uses_triton(torch.device("cuda", 0)) is expected
        assert not uses_triton(torch.device("cpu"))
    choice._kernels_run_on.cache_clear()


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [("3.9.0", (10, 0), False), ("3.10.1", (10, 3), False), ("3.9.0", (12, 0), True),
     ("3.9.0", (9, 0), True), ("3.8.0", (10, 0), True)],
)  # fmt: skip
def test_what_triton_miscompiles_is_not_run(monkeypatch, version, capability, expected):
    choice._kernels_run_on.cache_clear()
    monkeypatch.setattr(features, "_version", lambda name: version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    with set_backend("auto"):
        assert uses_triton(torch.device("cuda", 0)) is expected
    choice._kernels_run_on.cache_clear()


def test_what_triton_miscompiles_is_refused_where_it_was_chosen(monkeypatch):
    stub_driver = pytest.importorskip("bench.instruments.stub_driver")
    monkeypatch.setattr(features, "_version", lambda name: "3.9.0")
    with set_backend("triton"):
        for arch in (90, 120):
            with stub_driver.recording(arch):
                choice.check_driver()
        with (
            stub_driver.recording(100),
            pytest.raises(ValueError, match=r"must choose torch.* 3\.9"),
        ):
            choice.check_driver()


def test_the_choice_decides():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with set_backend("triton"):
        assert uses_triton(cpu)
    with set_backend("torch"):
        assert not uses_triton(cuda)
        assert backend_for(cuda) is TORCH


def test_triton_refuses_float64():
    triton_ops = pytest.importorskip("lora_fast.backends.triton_ops")
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="x must be float32"):
        triton_ops.TritonBackend(cublas=False).forward(x, [Factors(x)], [Needs()])


@pytest.fixture
def no_driver(monkeypatch):
    """A machine without a GPU, which nothing has launched on."""
    pytest.importorskip("triton")
    module = sys.modules["triton.runtime.driver"]

    def absent():
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(module, "_create_driver", absent)
    for name in ("_default", "_active"):
        monkeypatch.setattr(module.driver, name, None)
    selection._triton.cache_clear()
    yield
    selection._triton.cache_clear()


NO_DRIVER = (
    r"LORA_FAST_BACKEND or set_backend must choose auto or torch on this machine, got triton: "
    r"Triton has no driver for it \(0 active drivers"
)


def test_triton_without_a_driver_says_what_to_choose(no_driver):
    x, W, A, B = (torch.zeros(4, 4) for _ in range(4))
    with set_backend("triton"):
        for call in (lambda: adapted_linear(x, W, A=A, B=B), lambda: adapted_linear(x, W)):
            with pytest.raises(ValueError, match=NO_DRIVER):
                call()
    with set_backend("auto"):
        assert torch.equal(adapted_linear(x, W), x)


def test_a_driver_that_comes_later_is_found(no_driver, monkeypatch):
    with pytest.raises(ValueError, match=NO_DRIVER):
        selection._triton("triton")
    target = SimpleNamespace(arch=90)
    active = SimpleNamespace(get_current_target=lambda: target)
    monkeypatch.setattr(sys.modules["triton.runtime.driver"].driver, "_active", active)
    assert type(selection._triton("triton")).__module__ == "lora_fast.backends.triton_plans"


def test_the_interpreter_needs_no_driver(no_driver, monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    choice.check_driver()


def test_a_driver_that_does_not_start_says_why(no_driver, monkeypatch):
    """As on a machine with a GPU and without a compiler, where auto has chosen Triton."""

    def broken():
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "_create_driver", broken)
    with set_backend("auto"), pytest.raises(ValueError) as caught:
        choice.check_driver()
    assert str(caught.value) == (
        "LORA_FAST_BACKEND or set_backend must choose torch on this machine, got auto: "
        "Triton has no driver for it (Failed to find C compiler.)"
    )


def test_doctor_and_train_say_so_before_anything_is_read(no_driver, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with library_logging(), set_backend("triton"):
        problems = diagnose(kernels=False).problems
        assert [bool(re.match(NO_DRIVER, problem)) for problem in problems] == [True]
        for command in ("train", "compare"):
            assert run_cli(command, "--data", "absent.jsonl") == 2
            assert re.fullmatch(f"error: {NO_DRIVER}.*\n", capsys.readouterr().err)
    assert diagnose(kernels=False).problems == ()


def test_what_torch_keeps_for_a_thread_lives_as_long_as_it_is_used():
    """torch before 2.12 releases a reference that it never took, once per block."""
    with set_backend("torch"):
        kept = torch._C._get_obj_in_tls(choice._KEY)
        for _ in range(3):
            with set_backend("triton"):
                pass
            gc.collect()
        # This frame's, and that of the argument.
        assert sys.getrefcount(kept) >= 2
        assert kept[1] == "torch"
