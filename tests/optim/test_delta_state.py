"""A resumed run of Delta-LoRA is bitwise equal to an uninterrupted one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_runs import (
    BF16,
    F32,
    C,
    adamw,
    assert_same_model,
    contents_of,
    layers_of,
    ours,
    peft,
    train_step,
    weight_of,
)
from lora_models import K, N
from torch import Tensor, nn

from bench.instruments.accuracy import assert_same_bits
from lora_fast.optim import DeltaLoRA


def _resumed(
    make: Callable[[], nn.Module], wrap: Callable[[nn.Module], DeltaLoRA], stop: int, load: str
) -> tuple[nn.Module, list[float]]:
    """Train `stop` steps, save, load into new objects in the order `load`, train up to 6."""
    model = make()
    optimizer = wrap(model)
    for step in range(stop):
        train_step(model, optimizer, step)
    file = io.BytesIO()
    adapters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    contents = model.state_dict() if load.startswith("whole") else adapters
    torch.save({"model": contents, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = make()
    optimizer = wrap(model)
    if load.endswith("optimizer first"):
        optimizer.load_state_dict(saved["optimizer"])
    if load.startswith("whole"):
        model.load_state_dict(saved["model"])
    else:
        model.load_state_dict(saved["model"], strict=False)
    if not load.endswith("optimizer first"):
        optimizer.load_state_dict(saved["optimizer"])
    return model, [train_step(model, optimizer, step) for step in range(stop, 6)]


_KINDS = [
    ("dense", F32, True),
    ("dense", BF16, True),
    ("dense", BF16, False),
    ("nf4", BF16, True),
    ("nf4", BF16, False),
]
# bitsandbytes loads no quantised weight into a quantised layer.
_LOADS = [
    *((kind, load) for kind in _KINDS for load in ("adapters", "adapters, optimizer first")),
    *((kind, "whole model") for kind in _KINDS if kind[0] == "dense"),
]


@pytest.mark.parametrize(("of", "load"), _LOADS, ids=str)
@pytest.mark.parametrize("stop", [1, 4], ids=["before the start", "after it"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    of: tuple[str, torch.dtype, bool], stop: int, load: str
) -> None:
    kind, dtype, keep = of

    def make() -> nn.Module:
        return ours(kind, dtype)

    def wrap(model: nn.Module) -> DeltaLoRA:
        optimizer = adamw(model, lr=3e-2)
        return DeltaLoRA(optimizer, model, c=C, start_step=2, keep_start=keep)

    model = make()
    optimizer = wrap(model)
    losses = [train_step(model, optimizer, step) for step in range(6)]
    resumed, last = _resumed(make, wrap, stop, load)
    assert last == losses[stop:]
    assert_same_model(resumed, model)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_going_back_to_a_copy_of_the_state(dtype: torch.dtype) -> None:
    model = ours(dtype=dtype)
    optimizer = DeltaLoRA(adamw(model), model, c=C)
    train_step(model, optimizer, 0)
    saved, contents = copy.deepcopy(optimizer.state_dict()), contents_of(model)
    losses = [train_step(model, optimizer, step) for step in (1, 2)]
    model.load_state_dict(contents)
    optimizer.load_state_dict(saved)
    for name, value in contents_of(model).items():
        assert_same_bits(value, contents[name], name=name)
    assert [train_step(model, optimizer, step) for step in (1, 2)] == losses


def test_loading_ones_own_state_changes_nothing() -> None:
    """What accelerate does when it wraps an optimizer."""
    model = ours(dtype=BF16)
    optimizer = DeltaLoRA(adamw(model), model, c=C)
    train_step(model, optimizer, 0)
    before = contents_of(model)
    optimizer.load_state_dict(optimizer.state_dict())
    for name, value in contents_of(model).items():
        assert_same_bits(value, before[name], name=name)


def test_states_that_do_not_fit() -> None:
    model = ours()
    optimizer = DeltaLoRA(adamw(model), model, c=C)
    plain = optimizer.optimizer.state_dict()
    empty = optimizer.state_dict()
    train_step(model, optimizer, 0)
    state, before = optimizer.state_dict(), contents_of(model)

    def expect(message: str, changed: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(changed)

    def own(**changes: Any) -> dict[str, Any]:
        return {**state, "delta_lora": {**state["delta_lora"], **changes}}

    layers = state["delta_lora"]["layers"]
    expect("state_dict must be that of a DeltaLoRA", plain)
    expect("state_dict must have c = 0.5, got 0.25", own(c=0.25))
    expect("state_dict must have start_step = 0, got 3", own(start_step=3))
    expect("must have the layers of the model, got other", own(layers={"fc1": layers["fc1"]}))
    swapped = {"fc1": layers["fc2"], "fc2": layers["fc1"]}
    expect("state_dict must have tensors of", own(layers=swapped))
    expect(
        "must be of keep_start=False",
        own(layers={n: {**s, "kept": True} for n, s in layers.items()}),
    )
    expect("must be of a run that has started", empty)
    for name, value in contents_of(model).items():
        assert_same_bits(value, before[name], name=name)


def test_a_trainer_run_and_its_resumption(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import set_seed

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = peft(dtype=BF16)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            y = self.mlp(x.bfloat16()).float()
            return {"loss": (y - labels).square().mean(), "logits": y}

    data = [{"x": torch.randn(K), "labels": torch.randn(N)} for _ in range(16)]

    def train(folder: str, stop: int, resume: str | None = None) -> tuple[nn.Module, DeltaLoRA]:
        set_seed(0)
        task = Task()
        optimizer = DeltaLoRA(adamw(task), task, c=C, start_step=1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=stop, per_device_train_batch_size=4,
            save_steps=3, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(task, arguments, train_dataset=data, optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        return task, optimizer

    whole, optimizer = train("whole", 6)
    assert optimizer.steps == 6
    start = Task()
    assert any(
        (weight_of(a) != weight_of(b)).any()
        for a, b in zip(layers_of(whole), layers_of(start), strict=True)
    )
    resumed, _ = train("resumed", 6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same_model(resumed, whole)
