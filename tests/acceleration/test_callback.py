"""LoraFastCallback in transformers' Trainer: the same training as without it, but fused."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
from gated_models import liger_forward
from lora_models import counted
from peft import LoraConfig, PromptTuningConfig, TaskType
from torch import nn
from trainer_runs import (
    LAYERS,
    LINEARS,
    MORE_CALLS,
    SETTINGS,
    STEPS,
    Run,
    assert_alike,
    stock_runs,
    tiny_model,
    train,
    two_processes,
)

import lora_fast
from bench.instruments.accuracy import assert_all_accurate
from lora_fast import LoraFastCallback


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, Run]]:
    """(float64, stock) runs of the same computation, each trained once."""
    return functools.cache(lambda same_as: stock_runs(tmp_path_factory.mktemp("without"), same_as))


@pytest.mark.parametrize("setting", SETTINGS)
def test_trains_as_the_trainer_does_without_it(
    setting: str, without: Callable[[str], tuple[Run, Run]], tmp_path: Path
) -> None:
    fused = train(tmp_path, fused=True, **SETTINGS[setting])
    assert counted(fused.model) == (LINEARS * STEPS + MORE_CALLS.get(setting, 0), {})
    # Checkpoints, of activations or on disk, change no number.
    same_as = setting if setting in ("bf16", "group_by_length") else "plain"
    assert_alike(fused, without(same_as), bf16=setting == "bf16")


def test_a_model_that_the_trainer_patches_with_liger(
    without: Callable[[str], tuple[Run, Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger's kernels need a GPU; what the Trainer and lora_fast see of it does not."""
    # transformers below 5 has no such module.
    liger = pytest.importorskip("transformers.integrations.liger")
    package, transformers = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    forward = liger_forward()

    def patch(model: Any, **_: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.forward = MethodType(forward, layer.mlp)

    transformers._apply_liger_kernel_to_instance = patch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    fused = train(tmp_path, fused=True, use_liger_kernel=True)
    assert_alike(fused, without("plain"))
    mlps = lora_fast.report(fused.model).mlps
    assert [(mlp.fused_calls, mlp.fallback_calls) for mlp in mlps] == [(STEPS, {})] * LAYERS
    assert counted(fused.model) == (LINEARS * STEPS, {})
    lora_fast.decelerate(fused.model)
    layers = fused.model.get_base_model().model.layers
    assert all(layer.mlp.forward.__func__ is forward for layer in layers)


def test_mlps_are_left_alone(tmp_path: Path) -> None:
    model = tiny_model()
    callback = LoraFastCallback(fuse_mlp=False)
    train(tmp_path, model=model, callbacks=[callback])
    assert {mlp.obstacle for mlp in lora_fast.report(model).mlps} == {"not accelerated"}
    assert counted(model) == (LINEARS * STEPS, {})
    with pytest.raises(TypeError, match="fuse_mlp must be a bool, got int"):
        LoraFastCallback(fuse_mlp=0)


def test_the_best_model_is_loaded(tmp_path: Path) -> None:
    """Where more loss counts as better, the best model is the first that was saved."""
    options = {**SETTINGS["load_best_model_at_end"], "greater_is_better": True}
    trainer = train(tmp_path, fused=True, **options).trainer
    assert trainer.state.best_global_step == 2
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert lora_fast.report(trainer.model).all_fused


def test_a_stock_checkpoint_is_resumed_fused(
    without: Callable[[str], tuple[Run, Run]], tmp_path: Path
) -> None:
    train(tmp_path / "stock", save_strategy="steps", save_steps=3)
    fused = train(tmp_path / "fused", fused=True, resume=tmp_path / "stock" / "checkpoint-3")
    assert_alike(fused, without("plain"))
    assert counted(fused.model) == (LINEARS * (STEPS - 3), {})


def test_the_report_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lora_fast.callback"):
        train(tmp_path, fused=True)
    before, after = (r for r in caplog.records if r.name == "lora_fast.callback")
    assert {before.levelno, after.levelno} == {logging.INFO}
    assert f"{LINEARS} of {LINEARS} adapted layers fused; 0 fused calls" in before.getMessage()
    assert f"{LINEARS * STEPS} fused calls, 0 fallback calls" in after.getMessage()


def test_a_plain_script_sees_that_it_runs_fused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    line = f"lora_fast: {LINEARS} adapted layers run fused\n"
    train(tmp_path / "plain", fused=True)
    assert capsys.readouterr().out.count(line) == 1
    with caplog.at_level(logging.INFO, logger="lora_fast.callback"):
        train(tmp_path / "logged", fused=True)
    assert line not in capsys.readouterr().out


def test_layers_that_fall_back_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    model.base_model.model.lm_head.register_forward_hook(lambda *_: None)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    train(tmp_path, fused=True, model=model)
    before, warned, after = (r for r in caplog.records if r.name == "lora_fast.callback")
    assert {before.levelno, warned.levelno, after.levelno} == {logging.WARNING}
    assert "to fuse: remove the hooks while training" in warned.getMessage()
    assert "fallback: hooks on lora_A" in before.getMessage()
    assert f"{STEPS} × hooks on lora_A" in after.getMessage()


def test_what_would_happen_silently_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], lora_dropout=0.1)
    state = type("State", (), {"is_world_process_zero": True})
    args = type("Arguments", (), {"bf16": True, "use_liger_kernel": True})
    LoraFastCallback().on_train_begin(args, state, None, model=tiny_model(config))
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [line.partition(" ")[0] for line in said] == ["lm_head:", "adapters:", "lora_dropout"]
    assert "the fused loss multiplies" in said[0] and "under bfloat16 autocast" in said[1]


def test_other_models_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompt = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    run = train(tmp_path, fused=True, model=tiny_model(prompt))
    messages = [r.getMessage() for r in caplog.records if r.name == "lora_fast.callback"]
    assert messages == ["the model has no adapted layers: nothing to accelerate"]
    assert run.losses.isfinite().all()


def test_groups_are_as_asked() -> None:
    class Sibling(nn.Module):
        """The model that the Trainer passes: a wrapper around the PEFT model."""

        def __init__(self) -> None:
            super().__init__()
            self.module = tiny_model()

    for grouped in (True, False):
        wrapped = Sibling()
        callback = LoraFastCallback(group_shared_inputs=grouped)
        state = type("State", (), {"is_world_process_zero": False})
        callback.on_train_begin(None, state, None, model=wrapped)
        assert lora_fast.report(wrapped).all_fused
        assert any("_lora_fast_group" in vars(m) for m in wrapped.modules()) is grouped
    with pytest.raises(TypeError, match="group_shared_inputs must be a bool, got int"):
        LoraFastCallback(group_shared_inputs=1)


def test_two_processes_of_ddp_train_as_one(
    without: Callable[[str], tuple[Run, Run]], tmp_path: Path
) -> None:
    """The Trainer wraps the model in DistributedDataParallel before training begins."""
    found = two_processes(tmp_path)[0]
    assert found["wrapped"] == "DistributedDataParallel"
    assert found["calls"] == (LINEARS * STEPS, {})
    assert_all_accurate(found["result"], *(run.result() for run in without("plain")))
