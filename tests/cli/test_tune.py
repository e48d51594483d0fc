"""``lora-fast tune``: output, with a GPU and without."""

from __future__ import annotations

import pytest
import torch
from lora_models import quantised
from peft import LoraConfig, get_peft_model
from tiny_runs import LLAMA, run_cli
from transformers import LlamaForCausalLM

pytest.importorskip("triton")
import lora_fast
from lora_fast.backends import selection, triton_ops
from lora_fast.backends.torch_ops import TORCH
from lora_fast.cli import tune
from lora_fast.tuning import tuner
from lora_fast.tuning.plans import (
    BACKWARD,
    BACKWARD_GROUP,
    FORWARD,
    FORWARD_GROUP,
    HYBRID,
)

pytestmark = pytest.mark.usefixtures("libraries_as_before")

OPERATIONS = (FORWARD, BACKWARD, FORWARD_GROUP, BACKWARD_GROUP)


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
    for text in ("forward and backward for 16 and 2048 rows", "self_attn.q_proj", "no GPU"):
        assert text in flat, text
    (row,) = (line for line in shown.splitlines() if "mlp.down_proj" in line)
    assert row.split()[1:] == ["144", "64", "3"]
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_is_no_failure(capsys, llama, monkeypatch):
    monkeypatch.setattr(tune, "gpu", lambda: pytest.fail("asked for a GPU"))
    assert run_cli("tune", llama, "--dry-run", "--quantize", "nf4") == 0
    assert "mlp.gate_proj" in capsys.readouterr().out


def test_on_a_gpu_every_kind_of_layer_is_run(capsys, llama, monkeypatch):
    """On the CPU instead, where the torch backend has a single plan and nothing is timed."""
    monkeypatch.setattr(tune, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuner, "tuner", tuner.Tuner(times=False))
    assert run_cli("tune", llama, "--tokens", "8", "--r", "4") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert tuner.tuner.times
    assert "1/3 model.layers.0.self_attn.q_proj, k_proj, v_proj, 8 rows" in shown
    assert "3/3 model.layers.0.mlp, 8 rows" in shown


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The keys that operations ask the tuner for; the operations themselves are PyTorch's."""
    keys: list[str] = []

    def plan(query, device, run):
        keys.append(query.key)
        return HYBRID

    def forward(rows, fs, need):
        ys, saved = TORCH.forward(rows, fs, [need] * len(fs))
        return ys, saved.S, saved.V

    ops = triton_ops.TritonBackend(cublas=True)
    monkeypatch.setattr(selection, "_triton", lambda name: ops)  # without the driver it asks for
    monkeypatch.setattr(triton_ops.tuner, "plan", plan)
    monkeypatch.setattr(triton_ops.triton_routes, "hybrid", forward)
    monkeypatch.setattr(triton_ops, "_gradients", lambda *args: TORCH.backward(*args[:-1]))
    return keys


def training_step(quantize: str, p: float) -> None:
    """Forward and backward on 16 tokens, as lora-fast train would build the model."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LLAMA).to(torch.bfloat16)
    if quantize == "nf4":
        for block in base.model.layers:
            quantised(block.self_attn, torch.bfloat16)
            quantised(block.mlp, torch.bfloat16)
        base.is_loaded_in_4bit = True
    config = LoraConfig(r=4, lora_dropout=p, target_modules="all-linear", init_lora_weights=False)
    model = lora_fast.accelerate(get_peft_model(base, config)).train()
    ids = torch.randint(96, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_training_step_asks_for_what_was_timed(llama, monkeypatch, asked, quantize, p):
    monkeypatch.setattr(tune, "gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(tuner, "tuner", tuner.Tuner(times=False))
    options = ["--tokens", "16", "--r", "4", "--quantize", quantize, "--dropout", str(p)]
    with lora_fast.set_backend("triton"):
        assert run_cli("tune", llama, *options) == 0
        timed = set(asked)
        asked.clear()
        training_step(quantize, p)
    assert {key.split()[0] for key in asked} == set(OPERATIONS)
    assert all(("dropout" in key) == (p > 0) for key in asked)
    assert set(asked) <= timed
    # Beside them: evaluation, which drops nothing, and layers whose input needs no gradient.
    for key in timed - set(asked):
        evaluates = key.startswith("forward") and "dropout" not in key
        assert evaluates or "needs:x" not in key


@pytest.mark.parametrize("tokens", [",", "0", "a", "1,,2", "-3", "1.5"])
def test_tokens_are_checked(capsys, llama, tokens):
    assert run_cli("tune", llama, "--tokens", tokens) == 2
    assert "--tokens must be positive integers with commas" in capsys.readouterr().err


def test_other_mistakes_are_one_line(capsys, llama, tmp_path):
    assert run_cli("tune", llama, "--method", "bitfit") == 2
    assert "method must be one with fused layers" in capsys.readouterr().err
    for option, message in (("1.5", "dropout must"), ("nan", "dropout must")):
        assert run_cli("tune", llama, "--dropout", option) == 2
        assert message in capsys.readouterr().err
    assert run_cli("tune", str(tmp_path / "nowhere")) == 2
    assert capsys.readouterr().err.count("\n") == 1
