"""``lora-fast tune``: what is shown, with a GPU and without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from test_tuning_replica import LLAMA
from tiny_runs import library_logging, run_cli

pytest.importorskip("triton")
from lora_fast.cli import tune
from lora_fast.tuning import tuner


@pytest.fixture(autouse=True)
def _library_logging() -> Iterator[None]:
    with library_logging():
        yield


@pytest.fixture
def llama(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FAST_CACHE_DIR", str(tmp_path / "cache"))
    LLAMA.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_without_a_gpu_it_says_what_it_would_time(capsys, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "gpu", lambda: None)
    assert run_cli("tune", llama, "--tokens", "16,2048") == 1
    shown = capsys.readouterr().out
    flat = " ".join(shown.split())
    for text in ("forward and backward for 16 and 2048 rows", "self_attn/q_proj", "no GPU"):
        assert text in flat, text
    (row,) = (line for line in shown.splitlines() if "mlp/down_proj" in line)
    assert row.split()[1:] == ["144", "64", "3"]
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_is_no_failure(capsys, llama, monkeypatch):
    monkeypatch.setattr(tune, "gpu", lambda: pytest.fail("asked for a GPU"))
    assert run_cli("tune", llama, "--dry-run", "--quantize", "nf4") == 0
    assert "mlp/gate_proj" in capsys.readouterr().out


def test_on_a_gpu_every_kind_of_layer_is_run(capsys, llama, monkeypatch):
    """On the CPU in its place, where the torch backend has one way alone and no clock runs."""
    monkeypatch.setattr(tune, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuner, "tuner", tuner.Tuner(times=False))
    assert run_cli("tune", llama, "--tokens", "8", "--r", "4") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert tuner.tuner.times
    assert "1/4 model/layers/0/self_attn.q_proj, k_proj, v_proj, 8 rows" in shown
    assert "4/4 model/layers/0/mlp.down_proj, 8 rows" in shown


@pytest.mark.parametrize("tokens", ["", "0", "a", "1,,2", "-3", "1.5"])
def test_tokens_are_checked(capsys, llama, tokens):
    assert run_cli("tune", llama, "--tokens", tokens) == 1
    assert "--tokens must be positive integers with commas" in capsys.readouterr().err


def test_other_mistakes_are_one_line(capsys, llama, tmp_path):
    assert run_cli("tune", llama, "--method", "bitfit") == 1
    assert "method must be one with fused layers" in capsys.readouterr().err
    assert run_cli("tune", str(tmp_path / "nowhere")) == 1
    assert capsys.readouterr().err.count("\n") == 1
