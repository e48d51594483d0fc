"""Outputs kept for siblings: of this x, these parameters, this mode and thread, and no longer."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attentions import (
    ALONE,
    THREE,
    TWO,
    do_nothing,
    layer_of,
    stock_model,
)
from lora_models import K, accelerated_copy, compare, lora_layers, quietly
from products import products_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from lora_fast.peft_layers.shared_input import GROUP

F32, BF16 = torch.float32, torch.bfloat16


def agree(fused: Any, stock: Any, x: Tensor, **more: Any) -> None:
    compare(fused, stock, x, compute_dtype=F32, **more)


def _write_A(model: Any) -> None:
    with torch.no_grad():
        layer_of(model, "k_proj").lora_A["default"].weight.add_(0.5)


def _write_base(model: Any) -> None:
    with torch.no_grad():
        layer_of(model, "v_proj").base_layer.weight.mul_(2.0)


def _scale(model: Any) -> None:
    layer_of(model, "k_proj").scaling["default"] = 3.0


def _replace(model: Any) -> None:
    torch.manual_seed(3)
    layer_of(model, "k_proj").lora_B["default"] = nn.Linear(5, 12, bias=False)


def _merge(model: Any) -> None:
    quietly(layer_of(model, "v_proj").merge)


def _disable(model: Any) -> None:
    layer_of(model, "v_proj").enable_adapters(False)


CHANGES = [_write_A, _write_base, _scale, _replace, _merge, _disable]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changes_between_the_calls_is_seen(change: Callable[[Any], None]) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    x = torch.randn(9, K)
    for model in (stock, fused):
        model.get_base_model().between.action = change
    torch.testing.assert_close(fused(x), stock(x))


def test_what_begins_to_train_between_the_calls_gets_a_gradient() -> None:
    stock = stock_model()
    grads = []
    for model in (accelerated_copy(stock), stock):
        A = layer_of(model, "k_proj").lora_A["default"].weight.requires_grad_(False)
        model.get_base_model().between.action = lambda attention, A=A: A.requires_grad_()
        model(torch.ones(9, K)).sum().backward()
        grads.append(A.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("inference", [False, True])
def test_an_x_that_is_written_to_is_another_x(inference: bool) -> None:
    """Inference tensors do not count how often they are written to."""
    stock = stock_model()
    fused = accelerated_copy(stock)
    results = []
    for model in (stock, fused):
        with torch.inference_mode(inference):
            x = torch.ones(9, K)

            def double(attention: Any, x: Tensor = x) -> None:
                x.mul_(2.0)

            model.get_base_model().between.action = double
            results.append(model(x))
    torch.testing.assert_close(*results)


def test_a_child_that_is_replaced_is_not_computed() -> None:
    fused, x = accelerated_copy(stock_model()), torch.randn(9, K)
    attention = fused.get_base_model()
    attention.k_proj = nn.Linear(K, 12)
    assert products_of(lambda: fused(x)) == TWO + 1


def test_modes_of_autograd_do_not_mix() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    x, outputs = torch.randn(65, K), []
    for model in (fused, stock):
        attention = model.get_base_model()

        def other_mode(attention: Any) -> None:
            torch.set_grad_enabled(not torch.is_grad_enabled())

        attention.between.action = other_mode
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                outputs.append(model(x))
    assert [y.requires_grad for y in outputs] == [False, True] * 2
    torch.testing.assert_close(outputs[:2], outputs[2:])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rows", [9, 70])
def test_checkpointing(reentrant: bool, rows: int) -> None:
    stock = stock_model()
    agree(
        Checkpointed(accelerated_copy(stock), reentrant),
        Checkpointed(stock, reentrant),
        torch.randn(rows, K),
    )


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rows", [16, 200])
def test_recomputation_draws_the_masks_of_the_forward_pass(reentrant: bool, rows: int) -> None:
    fused = accelerated_copy(stock_model(lora_dropout=0.5))
    seen: list[Tensor] = []
    fused.get_base_model().v_proj.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    x = torch.randn(rows, K, requires_grad=True)
    Checkpointed(fused, reentrant)(x).sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)


def copies_of(fused: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(fused),
        "pickle": torch.load(buffer, weights_only=False),
        "copy of a copy": copy.deepcopy(copy.deepcopy(fused)),
    }


def test_copies_start_clean_and_equal(grouped: list[int]) -> None:
    fused = accelerated_copy(stock_model())
    x = torch.randn(4, K)
    fused(x)
    copies = copies_of(fused)
    for name, other in copies.items():
        siblings = [len(layer.siblings) for layer in lora_fast.report(other).layers]
        assert siblings == [2, 2, 2], name
        assert products_of(lambda other=other: other(x)) == THREE, f"{name}: the first call"
    for name, other in copies.items():
        with torch.no_grad():
            layer_of(other, "k_proj").lora_B["default"].weight.mul_(3.0)
        stock = lora_fast.decelerate(copy.deepcopy(other))
        assert not any(GROUP in vars(layer) for layer in lora_layers(stock))
        torch.testing.assert_close(other(x), stock(x), msg=name)
    assert set(grouped) == {3}


def test_a_copy_of_one_layer_has_no_siblings(grouped: list[int]) -> None:
    fused, x = accelerated_copy(stock_model()), torch.randn(4, K)
    fused(x)
    attention = fused.get_base_model()
    copied = [copy.deepcopy(layer) for layer in lora_layers(fused)]
    copied[0](x)
    attention.q_proj, attention.k_proj, attention.v_proj = copied
    assert products_of(lambda: fused(x)) == 3 * ALONE, "they were copied apart"
    lora_fast.accelerate(fused)
    assert products_of(lambda: fused(x)) == THREE


def products_in_this_process(model: Any, x: Tensor) -> int:
    torch.set_num_threads(1)
    return products_of(lambda: model(x))


def test_a_spawned_copy_starts_clean_and_equal() -> None:
    fused, x = accelerated_copy(stock_model()), torch.randn(4, K)
    fused(x)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(products_in_this_process, (fused, x)) == THREE


class Refused(Exception):
    pass


def refuse(attention: Any) -> None:
    raise Refused


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("leaf", [True, False])
def test_an_exception_between_two_siblings_leaves_nothing(grad: bool, leaf: bool) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    attention = fused.get_base_model()
    attention.between.action = refuse
    x = torch.randn(70, K, requires_grad=True)
    x = x if leaf else x * 2
    with torch.set_grad_enabled(grad), pytest.raises(Refused):
        fused(x)
    gone = weakref.ref(x)
    expected = x.detach().clone()
    del x
    gc.collect()
    assert gone() is None
    group, _ = vars(lora_layers(fused)[0])[GROUP]
    assert not group.of_thread.kept.outputs
    attention.between.action = do_nothing
    torch.testing.assert_close(fused(expected), stock(expected))


def test_the_same_x_again_after_an_exception() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    x = torch.randn(70, K)
    for model in (stock, fused):
        model.get_base_model().between.action = refuse
        with torch.no_grad(), pytest.raises(Refused):
            model(x)
        model.get_base_model().between.action = do_nothing
        for layer in lora_layers(model):
            layer.lora_B["default"].weight.data += 1.0
    with torch.no_grad():
        expected = [layer(x) for layer in lora_layers(stock)]
        torch.testing.assert_close([layer(x) for layer in lora_layers(fused)], expected)
        torch.testing.assert_close(fused(x), stock(x))


def test_what_a_failed_call_kept_is_not_that_of_another_x(grouped: list[int]) -> None:
    """If the first layer, which would release it, is no longer computed here."""
    stock = stock_model()
    fused = accelerated_copy(stock)
    before = torch.randn(9, K)
    attention = fused.get_base_model()
    attention.between.action = refuse
    with torch.no_grad(), pytest.raises(Refused):
        fused(before)
    attention.between.action = do_nothing
    for model in (stock, fused):
        quietly(layer_of(model, "q_proj").merge)
    x = torch.randn(9, K)
    torch.testing.assert_close(fused(x), stock(x))
    x = before.view_as(before)  # the same numbers, but another tensor
    torch.testing.assert_close(fused(x), stock(x))
    assert grouped == [3, 2, 2]


@pytest.mark.parametrize("grad", [True, False])
def test_outputs_go_when_they_are_fetched(grad: bool) -> None:
    fused = accelerated_copy(stock_model())
    group, _ = vars(lora_layers(fused)[0])[GROUP]
    left: list[int] = []
    fused.get_base_model().between.action = lambda attention: left.append(
        len(group.of_thread.kept.outputs)
    )
    with torch.set_grad_enabled(grad):
        fused(torch.randn(65, K))
    assert left == [2]
    assert not group.of_thread.kept.outputs
