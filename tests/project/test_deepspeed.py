"""DeepSpeed around fused layers: ZeRO-2 trains fused, ZeRO-3 runs PEFT's code and says why.

DeepSpeed is none of the suite's dependencies: the row `deepspeed` of tests/matrix.py installs it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from bench.instruments.accuracy import ORDER_DIFFERENCE, RUN_DIFFERENCE, assert_agree

PROGRAM = """
import json, sys
import deepspeed, torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, set_z3_leaf_modules
import gated_models, lora_models
import lora_fast

def mlp():
    return gated_models.stock_model().train()

def leaf():
    model = mlp()
    set_z3_leaf_modules(model, [gated_models.GatedMLP])
    return model

MODELS = {
    "layer": (lora_models.peft_model, lora_models.K),
    "gated MLP": (mlp, gated_models.H),
    "leaf": (leaf, gated_models.H),
}

def trained(stage, accelerated, kind):
    torch.manual_seed(0)
    make, width = MODELS[kind]
    model = make()
    if accelerated:
        lora_fast.accelerate(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(parameters, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    generator = torch.Generator().manual_seed(1)
    losses, gradients = [], []
    for step in range(6):
        x = torch.randn(4, width, generator=generator)[torch.distributed.get_rank() :: 2]
        # A leaf whose input needs no gradient is partitioned again before its backward.
        loss = engine(x.requires_grad_()).square().mean()
        engine.backward(loss)
        losses.append(loss.item())
        if step == 1:
            gradients = [safe_get_full_grad(p).flatten().tolist() for p in parameters]
        engine.step()
    values = [safe_get_full_fp32_param(p) if stage == 3 else p for p in parameters]
    report = lora_fast.report(model)
    mlps = [(mlp.fused_calls, mlp.fallback_calls) for mlp in report.mlps]
    return {
        "values": [v.flatten().tolist() for v in values], "gradients": gradients, "losses": losses,
        "fused": report.fused_calls, "fallbacks": report.fallback_calls, "mlps": mlps,
    }

found = {f"{stage} {accelerated} {kind}": trained(stage, accelerated, kind)
         for stage in (2, 3) for accelerated in (False, True) for kind in MODELS}
if torch.distributed.get_rank() == 0:
    json.dump(found, open(sys.argv[1], "w"))
"""
# A leaf is a module whose parameters DeepSpeed gathers at once, so that its layers have no hooks.
LAYERS = {"layer": 1, "gated MLP": 3, "leaf": 3}
KINDS = tuple(LAYERS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of ZeRO stage, whether accelerated, and model: what three steps gave, and ran as."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "program.py").write_text(PROGRAM)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    path = [str(Path(__file__).parents[2]), *sys.path]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, str(folder / "program.py"), str(folder / "found.json")]
    processes = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_what_it_trains_without(stage: int, kind: str, runs: dict[str, Any]) -> None:
    stock, found = runs[f"{stage} False {kind}"], runs[f"{stage} True {kind}"]
    assert len(found["values"]) == len(found["gradients"]) == 2 * LAYERS[kind]
    assert_agree(found["losses"], stock["losses"], within=RUN_DIFFERENCE, name="losses")
    for what, within in (("gradients", ORDER_DIFFERENCE), ("values", RUN_DIFFERENCE)):
        for one, other in zip(found[what], stock[what], strict=True):
            assert any(other)
            assert_agree(one, other, within=within, name=what)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_2_runs_fused(kind: str, runs: dict[str, Any]) -> None:
    found = runs[f"2 True {kind}"]
    assert found["fused"] == 6 * LAYERS[kind] and found["fallbacks"] == {}
    assert found["mlps"] == ([] if kind == "layer" else [[6, {}]])


@pytest.mark.parametrize("kind", KINDS)
def test_zero_3_runs_the_code_of_peft_and_says_why(kind: str, runs: dict[str, Any]) -> None:
    """Weights are whole only while DeepSpeed's hooks around a layer, or a leaf, say so. Around the
    layers of a leaf, the activation of its MLP is one operation all the same."""
    found, reason = runs[f"3 True {kind}"], "lora_A is partitioned by DeepSpeed ZeRO-3"
    assert found["fused"] == 0
    assert found["fallbacks"] == {reason: 6 * LAYERS[kind]}
    of_mlp = {"layer": [], "gated MLP": [[0, {"gate_proj: hooks": 6}]], "leaf": [[6, {}]]}
    assert found["mlps"] == of_mlp[kind]
