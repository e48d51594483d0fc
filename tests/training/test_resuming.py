"""Runs that were interrupted or killed and go on: as if nothing had happened."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from same_runs import assert_same_run
from tiny_runs import AtStep, interrupt, metrics_of, run

from lora_fast.errors import Interrupted
from lora_fast.training.checkpoints import latest_checkpoint
from lora_fast.training.config import TrainConfig
from lora_fast.training.run import Outcome


@pytest.mark.parametrize(("arm", "step"), [("stock", 3), ("lora_fast", 5)])
def test_an_interrupted_run_resumes_as_if_nothing_had_happened(
    bert_config: TrainConfig, compared: Outcome, tmp_path: Path, arm: str, step: int
) -> None:
    config, out = replace(bert_config, compare=True), tmp_path / "out"
    with pytest.raises(Interrupted) as caught:
        run(config, out, AtStep(arm, step, interrupt))
    # The loss of a step is reported after the step, so the run stops after the next one.
    assert caught.value.step == step + 1
    assert not (out / "metrics.json").exists()
    run(TrainConfig(), out, resume=True)
    assert_same_run(out, compared.out)


@pytest.mark.usefixtures("cpu_kind")
def test_a_killed_run_resumes_from_its_last_complete_checkpoint(
    bert_config: TrainConfig, tmp_path: Path
) -> None:
    # Two epochs of 11 batches: the order of the second one must be found again, too.
    config = replace(bert_config, steps=16, save_every=4)
    run(config, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    out = tmp_path / "killed"
    with pytest.raises(Killed):
        run(config, out, AtStep("lora_fast", 14, kill))
    checkpoints = out / "checkpoints" / "lora_fast"
    shutil.copytree(checkpoints / "checkpoint-12", checkpoints / "checkpoint-14")
    (checkpoints / "checkpoint-14" / "trainer_state.json").write_text('{"global_step": 1')
    assert latest_checkpoint(checkpoints) == checkpoints / "checkpoint-12"
    run(TrainConfig(), out, resume=True)
    assert_same_run(out, tmp_path / "whole")


def test_a_run_stopped_behind_its_last_step_trains_no_further(
    compared: Outcome, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    shutil.copytree(compared.out, out)
    (out / "metrics.json").unlink()
    shutil.rmtree(out / "checkpoints" / "lora_fast" / "checkpoint-6")
    run(TrainConfig(), out, resume=True)
    assert_same_run(out, compared.out)
    times = [metrics_of(folder)["results"]["lora_fast"] for folder in (out, compared.out)]
    for name in ("step_seconds", "tokens_per_second"):
        assert times[0][name] == times[1][name], "nothing was timed anew"


def test_early_stopping_resumes_and_does_not_train_on(
    bert_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(bert_config, steps=40, lr=0.05, early_stopping=2, save_every=2)
    whole, cut, again = (tmp_path / name for name in ("whole", "cut", "again"))
    best = run(config, whole).metrics["results"]["lora_fast"]["best_step"]
    with pytest.raises(Interrupted):
        # After one evaluation without progress, before the second.
        run(config, cut, AtStep("lora_fast", best + 2, interrupt))
    run(TrainConfig(), cut, resume=True)
    assert_same_run(cut, whole)
    shutil.copytree(whole, again)
    (again / "metrics.json").unlink()
    run(TrainConfig(), again, resume=True)
    assert_same_run(again, whole)
