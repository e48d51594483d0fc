"""Clocks, progress, Ctrl-C and divergence, without a Trainer around them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gated_models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerState

import lora_fast
from lora_fast.errors import TrainingError
from lora_fast.training.callbacks import (
    CallCounter,
    Progress,
    StepClock,
    StopRequest,
    stop_on_signals,
)
from lora_fast.training.events import Silent

ARGS = SimpleNamespace(device=torch.device("cpu"))


class Recorder(Silent):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def note(self, text: str) -> None:
        self.calls.append(("note", text))

    def training(self, arm: str, first_step: int, total_steps: int) -> None:
        self.calls.append(("training", arm, first_step, total_steps))

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        self.calls.append(("step", step, loss, learning_rate))

    def trained(self) -> None:
        self.calls.append(("trained",))


def state(step: int = 0, tokens: int = 0) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=9, num_input_tokens_seen=tokens)


def control() -> SimpleNamespace:
    return SimpleNamespace(should_save=False, should_training_stop=False)


def test_the_clock_measures_steps_and_not_what_is_between(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 100.0, 101.0, 200.0, 202.0, 300.0, 306.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = StepClock()
    clock.on_train_begin(ARGS, state(tokens=50), control())
    for step, tokens in enumerate((60, 70, 110, 150), start=1):
        clock.on_step_begin(ARGS, state(step), control())
        clock.on_step_end(ARGS, state(step, tokens), control())
    assert clock.seconds == [1.0, 1.0, 2.0, 6.0]
    assert clock.tokens == [10, 10, 40, 40]
    # The first two steps warm up.
    assert clock.tokens_per_second() == pytest.approx(80 / 8)


def test_a_clock_that_saw_nothing_or_little() -> None:
    clock = StepClock()
    assert clock.tokens_per_second() == 0.0
    clock.seconds, clock.tokens = [2.0], [6]
    assert clock.tokens_per_second() == 3.0


def test_the_clock_of_a_resumed_run_goes_on_and_every_process_warms_up() -> None:
    first = StepClock()
    first.on_train_begin(ARGS, state(), control())
    first.seconds, first.tokens = [9.0, 9.0, 1.0], [10, 10, 10]
    stored = json.loads(json.dumps(first.state()["attributes"]))
    second = StepClock(stored)
    second.on_train_begin(ARGS, state(3, tokens=30), control())
    second.seconds += [9.0, 9.0, 3.0]
    second.tokens += [10, 10, 30]
    assert second.tokens_per_second() == 40 / 4
    assert second.state()["attributes"]["began"] == [0, 3]


def test_the_counts_of_calls_of_a_resumed_run_go_on(tmp_path: Path) -> None:
    def model() -> Any:
        base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        config = LoraConfig(r=2, target_modules=["0", "1"])
        return lora_fast.accelerate(get_peft_model(base, config))

    first = model()
    first(torch.zeros(1, 4))
    with first.disable_adapter():
        first(torch.zeros(1, 4))
    # By transformers' own code, which copies what it finds in its own way.
    TrainerState(stateful_callbacks={"calls": CallCounter(first, {}).state()}).save_to_json(
        str(tmp_path / "state.json")
    )
    read = TrainerState.load_from_json(str(tmp_path / "state.json"))
    stored = read.stateful_callbacks["calls"]["attributes"]
    second = model()
    CallCounter(second, stored)
    assert lora_fast.report(second) == lora_fast.report(first)
    second(torch.zeros(1, 4))
    found = lora_fast.report(second)
    assert found.fused_calls == 4
    assert sum(found.fallback_calls.values()) == 2
    assert CallCounter(model(), {}).state()["attributes"]["calls"].keys() == {
        layer.name for layer in found.layers
    }


def test_so_do_those_of_gated_mlps() -> None:
    first, second = (lora_fast.accelerate(gated_models.stock_model()) for _ in range(2))
    for _ in range(2):
        first(torch.zeros(2, 3, gated_models.H))
    CallCounter(second, CallCounter(first, {}).state()["attributes"])
    assert lora_fast.report(second) == lora_fast.report(first)
    second(torch.zeros(2, 3, gated_models.H))
    assert [mlp.fused_calls for mlp in lora_fast.report(second).mlps] == [3]


def test_progress_tells_every_step() -> None:
    seen = Recorder()
    progress = Progress("stock", seen, StepClock())
    progress.on_train_begin(ARGS, state(3), control())
    progress.on_log(ARGS, state(4), control(), {"loss": 0.5, "learning_rate": 0.1})
    progress.on_log(ARGS, state(4), control(), {"train_runtime": 1.0})
    progress.on_train_end(ARGS, state(9), control())
    assert seen.calls == [("training", "stock", 3, 9), ("step", 4, 0.5, 0.1), ("trained",)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run(loss: float) -> None:
    progress = Progress("lora_fast", Silent(), StepClock())
    with pytest.raises(TrainingError, match=rf"the loss is {loss} at step 4: try a lower --lr"):
        progress.on_log(ARGS, state(4), control(), {"loss": loss})


def test_a_stop_asked_for_comes_with_a_checkpoint() -> None:
    request, wanted = StopRequest(), control()
    request.on_step_end(ARGS, state(4), wanted)
    assert not wanted.should_training_stop
    request.ask()
    request.on_step_end(ARGS, state(4), wanted)
    assert wanted.should_training_stop
    assert wanted.should_save


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: int) -> None:
    request, seen = StopRequest(), Recorder()
    before = signal.getsignal(number)
    with stop_on_signals(request, seen):
        os.kill(os.getpid(), number)
        assert request.asked
        assert seen.calls[0][0] == "note"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
