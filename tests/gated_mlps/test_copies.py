"""A copied, pickled or merged gated MLP is fused or needs nothing of ours."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
from gated_models import (
    GatedMLP,
    H,
    agree,
    counts,
    layer_of,
    mlp_of,
    stock_model,
)
from lora_models import (
    accelerated_copy,
    quietly,
)

import lora_fast
from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree, assert_same_bits


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replica(model: Any) -> Any:
    """As ``nn.DataParallel`` makes one of the MLP."""
    made = copy.deepcopy(model)
    old = mlp_of(made)
    new = old._replicate_for_data_parallel()
    new._modules = {name: copy.deepcopy(child) for name, child in old._modules.items()}
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.fill_(torch.nan)  # the replica has its own
    parent = next(m for m in made.modules() if m._modules.get("mlp") is old)
    parent._modules["mlp"] = new
    return made


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved, replica])
def test_copies_run_fused(copied: Any) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    agree(fused, stock)
    other = copied(fused)
    agree(other, stock)
    assert counts(other) == (2, {})
    if copied not in (copy.copy, replica):
        assert counts(fused) == (1, {})
        with torch.no_grad():
            layer_of(other, "up_proj").lora_B["default"].weight.add_(1.0)
        agree(fused, stock)
        lora_fast.decelerate(other)
        assert type(mlp_of(other)) is GatedMLP


def test_a_merged_and_unloaded_model_needs_nothing_of_ours() -> None:
    fused = lora_fast.accelerate(stock_model())
    x = torch.randn(3, H)
    expected = fused(x)
    merged = quietly(fused.merge_and_unload)
    assert_agree(merged(x), expected, within=ORDER_DIFFERENCE)
    data = pickle.dumps(merged)
    assert b"lora_fast" not in data
    for copied in (pickle.loads(data), copy.deepcopy(merged)):
        assert type(mlp_of(copied)) is GatedMLP
        assert torch.equal(copied(x), merged(x))


def _in_child(data: bytes, results: Any) -> None:
    model = pickle.loads(data)
    y = model(torch.ones(2, H))
    results.put((y.detach().tolist(), counts(model)))


def test_a_spawned_copy_runs_fused() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    fused = lora_fast.accelerate(stock_model())
    process = context.Process(target=_in_child, args=(pickle.dumps(fused), results))
    process.start()
    y, found = results.get(timeout=120)
    process.join()
    assert found == (1, {})
    assert_same_bits(torch.tensor(y), fused(torch.ones(2, H)).detach(), name="y")
