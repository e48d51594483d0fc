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

PROGRAM = """
import json, sys
import deepspeed, torch
from deepspeed.utils import safe_get_full_fp32_param
from lora_models import K, peft_model
import lora_fast

def trained(stage, accelerated):
    torch.manual_seed(0)
    model = peft_model()
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
    for _ in range(6):
        x = torch.randn(4, K, generator=generator)[torch.distributed.get_rank() :: 2]
        loss = engine(x).square().mean()
        engine.backward(loss)
        engine.step()
    values = [safe_get_full_fp32_param(p) if stage == 3 else p for p in parameters]
    report = lora_fast.report(model)
    return [v.flatten().tolist() for v in values], report.fused_calls, report.fallback_calls

found = {f"{stage} {accelerated}": trained(stage, accelerated)
         for stage in (2, 3) for accelerated in (False, True)}
if torch.distributed.get_rank() == 0:
    json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of ZeRO stage and whether accelerated: parameters after three steps, fused calls, reasons."""
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
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_what_it_trains_without(stage: int, runs: dict[str, Any]) -> None:
    (expected, *_), (found, fused, fallbacks) = runs[f"{stage} False"], runs[f"{stage} True"]
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1e-6
    if stage == 2:
        assert fused > 0 and fallbacks == {}
    else:
        assert fused == 0
        assert list(fallbacks) == ["lora_A is partitioned by DeepSpeed ZeRO-3"]
