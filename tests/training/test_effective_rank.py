"""Effective and stable rank against numpy's singular values of the product itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lora_models import Mlp
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model

from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree
from lora_fast.training.effective_rank import (
    EffectiveRanks,
    effective_rank,
    layer_ranks,
    low_rank_products,
    product_singular_values,
    stable_rank,
    summarise,
)

CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=3, target_modules=["fc1", "fc2"], init_lora_weights=False),
    "dora": LoraConfig(r=3, target_modules=["fc1", "fc2"], init_lora_weights=False, use_dora=True),
    "vera": VeraConfig(r=32, target_modules=["fc1", "fc2"], init_weights=False),
    "adalora": AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["fc1", "fc2"], init_lora_weights=False
    ),
}


@pytest.mark.parametrize(("N", "R", "K"), [(20, 3, 24), (5, 8, 24), (20, 8, 5), (1, 1, 1)])
def test_singular_values_are_those_of_the_product(N: int, R: int, K: int) -> None:
    left, right = torch.randn(N, R), torch.randn(R, K)
    found = product_singular_values(left, right).numpy()
    expected = np.linalg.svd((left.double() @ right.double()).numpy(), compute_uv=False)
    assert_agree(found, expected[: len(found)], within=ORDER_DIFFERENCE)
    assert np.all(np.abs(expected[len(found) :]) < 1e-6)


def test_the_product_is_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    svdvals = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: sizes.append(m.numel()) or svdvals(m))
    product_singular_values(torch.randn(500, 4), torch.randn(4, 700))
    assert sizes == [16]


def test_ranks_of_known_spectra() -> None:
    ones = torch.ones(7)
    assert effective_rank(ones) == pytest.approx(7)
    assert stable_rank(ones) == pytest.approx(7)
    one = torch.tensor([3.0, 0.0, 0.0])
    assert effective_rank(one) == pytest.approx(1)
    assert stable_rank(one) == pytest.approx(1)
    # Roy and Vetterli's definition, by hand: p = (2/3, 1/3).
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert effective_rank(torch.tensor([2.0, 1.0])) == pytest.approx(math.exp(entropy))
    assert stable_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.25)


def test_nothing_learned_and_nothing_finite() -> None:
    zero = product_singular_values(torch.zeros(5, 2), torch.randn(2, 5))
    assert (effective_rank(zero), stable_rank(zero)) == (0.0, 0.0)
    broken = product_singular_values(torch.full((5, 2), torch.inf), torch.randn(2, 5))
    assert math.isnan(effective_rank(broken))
    assert math.isnan(stable_rank(broken))


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_products_are_the_updates_of_peft(kind: str) -> None:
    model = get_peft_model(Mlp(), CONFIGS[kind])
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
    found = list(low_rank_products(model))
    assert [name for name, *_ in found] == ["fc1", "fc2"]
    for name, left, right in found:
        layer: Any = layers[f"base_model.model.{name}"]
        delta = layer.get_delta_weight("default")
        product = left @ right
        # Up to the scaling of the layer, one number, which no rank depends on.
        scaling = delta.norm() / product.norm()
        assert_agree(delta, scaling * product, within=ORDER_DIFFERENCE)


def test_other_models_have_no_low_rank_products() -> None:
    assert layer_ranks(Mlp()) == {}
    assert summarise([]) is None


def test_the_callback_records_ten_times_and_the_end() -> None:
    class State:
        max_steps = 25
        global_step = 0

    model = get_peft_model(Mlp(), CONFIGS["lora"])
    callback, state = EffectiveRanks(), State()
    for step in range(1, 26):
        state.global_step = step
        callback.on_step_end(None, state, None, model=model)
    steps = [step for step, _ in callback.history]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 25]
    found = summarise(callback.history)
    assert found is not None
    assert found["steps"] == steps
    assert found["layers"].keys() == {"fc1", "fc2"}
    mean = sum(ranks["effective"] for ranks in found["layers"].values()) / 2
    assert found["mean_effective_rank"][-1] == pytest.approx(mean)
    assert callback.state()["attributes"]["history"] == callback.history
