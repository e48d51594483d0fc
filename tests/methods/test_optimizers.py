"""The optimizer of each method: which parameters it trains, and at which rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import save_bert

from lora_fast.methods.table import METHODS
from lora_fast.optim import DeltaLoRA
from lora_fast.training import models
from lora_fast.training.config import TrainConfig
from lora_fast.training.trainer import training_arguments

STEPS = 20


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("optimizers") / "bert")


def build(bert: Path, folder: Path, name: str, **options: Any) -> tuple[Any, Any]:
    """The model of a method and its optimizer."""
    given = TrainConfig(model=str(bert), data="d", method=name, quantize="none", **options)
    config = given.with_defaults(10)
    model = models.add_adapter(models.load_base(config, ["no", "yes"]), config, STEPS)
    args = training_arguments(config, folder, STEPS, torch.float32)
    method = METHODS[name]
    return model, method.optimize(model, args, config, STEPS, method.head_rate)


def rates(model: Any, optimizer: Any) -> dict[str, float]:
    """The learning rate of every parameter that trains, by name."""
    by_id = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    return {n: by_id[id(p)] for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_has_the_method_s_rate(bert: Path, tmp_path: Path, name: str) -> None:
    model, optimizer = build(bert, tmp_path, name)
    rate = METHODS[name].learning_rate(10)
    for parameter, found in rates(model, optimizer).items():
        if name == "lora-plus":
            continue
        head = "classifier" in parameter
        bound = METHODS[name].head_rate if head else None
        assert found == (rate if bound is None else min(rate, bound)), parameter


def test_b_learns_faster_in_lora_plus(bert: Path, tmp_path: Path) -> None:
    found = rates(*build(bert, tmp_path, "lora-plus", lr=1e-4, lr_ratio=8.0))
    assert {lr for n, lr in found.items() if "lora_A" in n} == {1e-4}
    assert {lr for n, lr in found.items() if "lora_B" in n} == {8e-4}


def test_a_rate_below_the_head_s_bound_is_the_head_s_as_well(bert: Path, tmp_path: Path) -> None:
    assert set(rates(*build(bert, tmp_path, "vera", lr=1e-5)).values()) == {1e-5}


def test_the_optimizer_is_the_one_that_was_named(bert: Path, tmp_path: Path) -> None:
    _, optimizer = build(bert, tmp_path, "lora", optim="sgd")
    assert type(optimizer) is torch.optim.SGD
    _, optimizer = build(bert, tmp_path, "lora-fa")
    assert type(optimizer).__name__ == "LoraFAOptimizer"


@pytest.mark.parametrize(("given", "start"), [(None, 2), (0, 0), (7, 7)])
def test_delta_lora_waits_for_a_tenth_of_the_steps(
    bert: Path, tmp_path: Path, given: int | None, start: int
) -> None:
    _, optimizer = build(bert, tmp_path, "delta-lora", delta_start=given, delta_scale=0.5)
    assert isinstance(optimizer, DeltaLoRA)
    assert (optimizer.start_step, optimizer.c) == (start, 0.5)
