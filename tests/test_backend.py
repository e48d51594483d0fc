"""The choice of the backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_fast import backend, dispatch, set_backend, torch_ops
from lora_fast.backend import get_backend, uses_triton


def test_a_block_restores_the_choice():
    before = get_backend()
    with set_backend("triton"):
        assert get_backend() == "triton"
        with set_backend("torch"):
            assert get_backend() == "torch"
        assert get_backend() == "triton"
    assert get_backend() == before


def test_a_call_sets_the_choice():
    before = get_backend()
    try:
        set_backend("torch")
        assert get_backend() == "torch"
    finally:
        set_backend(before)


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((8, 0), None, True), ((12, 0), None, True), ((7, 5), None, False), ((9, 4), "6.4", False)],
)
def test_auto_takes_triton_where_it_is_proven(monkeypatch, capability, hip, expected):
    backend._kernels_run_on.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    with set_backend("auto"):
        assert uses_triton(torch.device("cuda", 0)) is expected
        assert not uses_triton(torch.device("cpu"))
    backend._kernels_run_on.cache_clear()


def test_the_choice_decides():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with set_backend("triton"):
        assert uses_triton(cpu)
    with set_backend("torch"):
        assert not uses_triton(cuda)
        assert dispatch._select(cuda) is torch_ops


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="name must be one of auto, triton, torch, got 'cuda'"):
        set_backend("cuda")


def test_the_environment_is_read_and_checked():
    code = "from lora_fast.backend import get_backend; print(get_backend())"
    root = str(Path(__file__).resolve().parents[1])

    def run(value: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "LORA_FAST_BACKEND": value, "PYTHONPATH": root}
        return subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
        )

    assert run("triton").stdout.strip() == "triton"
    bad = run("gpu")
    assert bad.returncode != 0
    assert "LORA_FAST_BACKEND must be one of auto, triton, torch, got 'gpu'" in bad.stderr


def test_triton_refuses_float64():
    x = torch.randn(2, 4, dtype=torch.float64)
    with set_backend("triton"), pytest.raises(NotImplementedError, match="x must be float32"):
        dispatch.forward(x, dispatch.Factors(x), dispatch.Needs())
