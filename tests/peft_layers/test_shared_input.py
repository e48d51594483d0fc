"""q, k and v, or gate and up, in one function: like alone, whatever the model does in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attentions import (
    ALONE,
    PROJECTIONS,
    THREE,
    TWO,
    Attention,
    CrossAttention,
    QueryAlone,
    layer_of,
    stock_model,
)
from lora_models import K, accelerated_copy, compare, counted, lora_layers, quietly
from peft import LoraConfig, get_peft_model
from products import products_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast.backends.selection import backend_for

F32, BF16 = torch.float32, torch.bfloat16


def agree(fused: Any, stock: Any, x: Tensor, **more: Any) -> None:
    compare(fused, stock, x, compute_dtype=F32, **more)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("shape", [(9, K), (3, 4, K)], ids=str)
def test_values_and_gradients(kind: str, shape: tuple[int, ...], grouped: list[int]) -> None:
    stock = stock_model(kind)
    fused = accelerated_copy(stock)
    assert not grouped
    agree(fused, stock, torch.randn(shape))
    agree(fused, stock, torch.randn(shape))
    assert grouped == [3, 3]
    assert counted(fused) == (6, {})


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("rows", [1, 64, 65, 200])
def test_a_group_in_any_mode_and_of_any_number_of_rows(rows: int, grad: bool) -> None:
    """But of one row on a CPU, where there is nothing to share."""
    fused, x = accelerated_copy(stock_model()), torch.randn(rows, K)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert products_of(lambda: fused(x)) == (3 * ALONE if rows == 1 else THREE)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("shape", [(1, K), (1, 1, K), (K,)], ids=str)
def test_one_row_on_a_cpu_is_computed_alone(
    kind: str, shape: tuple[int, ...], grouped: list[int]
) -> None:
    stock = stock_model(kind)
    fused = accelerated_copy(stock)
    agree(fused, stock, torch.randn(shape))
    assert grouped == [] and counted(fused) == (3, {})


@pytest.mark.parametrize("rows", [1, 9])
def test_4_bit_layers_that_their_first_input_gives_a_dtype(rows: int) -> None:
    """Computed once in their first pass, which saves what the recomputed one does."""
    fused = accelerated_copy(stock_model("nf4", compute_dtype=None))
    fresh, x = copy.deepcopy(fused), torch.randn(rows, K, requires_grad=True)
    first, second = (products_of(lambda: fused(x)) for _ in range(2))
    assert first == second
    checkpoint(fresh, x, use_reentrant=False).sum().backward()
    recomputed, x.grad = x.grad, None
    fused(x).sum().backward()
    assert recomputed is not None and x.grad is not None
    assert_same_bits(recomputed, x.grad, name="dx")


def test_groups_can_be_refused(grouped: list[int]) -> None:
    stock = stock_model()
    fused = lora_fast.accelerate(copy.deepcopy(stock), group_shared_inputs=False)
    agree(fused, stock, torch.randn(9, K))
    lora_fast.accelerate(fused)
    agree(fused, stock, torch.randn(9, K))
    lora_fast.accelerate(fused, group_shared_inputs=False)
    agree(fused, stock, torch.randn(9, K))
    assert grouped == [3]


def test_two_of_three_form_a_group(grouped: list[int]) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    stock = get_peft_model(Attention(), config)
    fused = accelerated_copy(stock)
    agree(fused, stock, torch.randn(9, K))
    assert grouped == [2]


def test_several_adapters_and_scalings(grouped: list[int]) -> None:
    stock = stock_model()
    other = {"r": 3, "lora_alpha": 9, "init_lora_weights": False}
    stock.add_adapter("other", LoraConfig(target_modules=PROJECTIONS, **other))
    stock.base_model.set_adapter(["default", "other"])
    fused = accelerated_copy(stock)
    agree(fused, stock, torch.randn(9, K))
    assert grouped == [3]


def test_what_shares_no_input_shares_no_product() -> None:
    stock = stock_model(base=CrossAttention)
    fused, x, other = accelerated_copy(stock), torch.randn(4, K), torch.randn(4, K)
    for more in ((), (other,)):
        torch.testing.assert_close(fused(x, *more), stock(x, *more))
        assert products_of(lambda more=more: fused(x, *more)) == ALONE + TWO
    siblings = [layer.siblings for layer in lora_fast.report(fused).layers]
    assert siblings == [(), ("v_proj",), ("k_proj",)]


def test_nobody_is_computed_in_vain() -> None:
    fused = accelerated_copy(stock_model(base=QueryAlone))
    for _ in range(3):
        assert products_of(lambda: fused(torch.randn(70, K))) == ALONE


def test_layers_that_something_else_calls_are_on_their_own(grouped: list[int]) -> None:
    fused, x = accelerated_copy(stock_model()), torch.randn(9, K)
    fused(x)
    alone = [layer(x) for layer in lora_layers(fused)]
    assert grouped == [3]
    for y, expected in zip(alone, lora_layers(stock_model()), strict=True):
        torch.testing.assert_close(y, expected(x))


class Flagged(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.reads_values = True

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.q_proj(x)).sum() * self.k_proj(x)
        return y * self.v_proj(x) if self.reads_values else y


def test_conditions_on_the_module_hold_when_the_first_is_called() -> None:
    fused, x = accelerated_copy(stock_model(base=Flagged)), torch.randn(4, K)
    assert products_of(lambda: fused(x)) == THREE
    fused.get_base_model().reads_values = False
    assert products_of(lambda: fused(x)) == 2 * ALONE
    lora_fast.accelerate(fused)
    assert products_of(lambda: fused(x)) == TWO
    fused.get_base_model().reads_values = True
    assert products_of(lambda: fused(x)) == TWO + ALONE


def test_siblings_of_one_p_share_drop_x(grouped: list[int]) -> None:
    fused = accelerated_copy(stock_model(lora_dropout=0.5))
    x = torch.randn(4, K)
    torch.manual_seed(3)
    y = fused(x)
    torch.manual_seed(3)
    backend, seed = backend_for(x.device), int(torch.randint(2**62, ()))
    mask = backend.dropout_mask(seed, 4, K, 0.5, x.device)
    stock = lora_fast.decelerate(copy.deepcopy(fused))
    for layer in lora_layers(stock):
        layer.lora_dropout["default"] = Masked(mask)
    torch.testing.assert_close(y, stock(x))
    assert grouped == [3]
    layer_of(fused, "k_proj").lora_dropout["default"].p = 0.1
    assert lora_fast.report(fused).layers[0].siblings == ("v_proj",)
    fused(x)
    assert grouped == [3, 2], "another p is another mask"
    fused.eval()(x)
    assert grouped == [3, 2, 3]


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0.0) * 2.0


def test_a_merged_first_leaves_the_others_together(grouped: list[int]) -> None:
    stock = stock_model()
    quietly(layer_of(stock, "q_proj").merge)
    fused, x = accelerated_copy(stock), torch.randn(9, K)
    torch.testing.assert_close(fused(x), stock(x))
    assert grouped == [2]


# Groups where one layer runs hooks, which may do anything to those that follow it.
OTHERS = {"q_proj": [2], "k_proj": [], "v_proj": [2]}


def assert_as_reported(fused: Any, grouped: list[int]) -> None:
    layers = lora_fast.report(fused).layers
    assert sorted(len(layer.siblings) for layer in layers) == ([0, 1, 1] if grouped else [0, 0, 0])
    assert all(bool(layer.siblings) != bool(layer.alone) for layer in layers)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_hooks_before_a_layer_compute_it_alone(name: str, grouped: list[int]) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        layer_of(model, name).register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    x = torch.randn(4, K)
    torch.testing.assert_close(fused(x), stock(x))
    assert grouped == OTHERS[name]
    assert_as_reported(fused, grouped)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_hooks_after_a_layer_may_do_anything(name: str, grouped: list[int]) -> None:
    """Write the parameters of its siblings through .data, too, which leaves no trace."""
    stock = stock_model()
    fused = accelerated_copy(stock)
    order: list[str] = []
    for model in (stock, fused):

        def write(module: Any, args: Any, y: Tensor, model: Any = model) -> Tensor:
            order.append(name)
            for layer in lora_layers(model):
                layer.lora_B["default"].weight.data += 1.0
            return y * 2

        layer_of(model, name).register_forward_hook(write)
    x = torch.randn(4, K)
    torch.testing.assert_close(fused(x), stock(x))
    assert order == [name] * 2
    assert grouped == OTHERS[name]
    assert_as_reported(fused, grouped)


def test_hooks_of_another_child_between_the_calls(grouped: list[int]) -> None:
    fused, x = accelerated_copy(stock_model()), torch.randn(4, K)
    between = fused.get_base_model().between
    handle = between.register_forward_hook(lambda module, args, y: None)
    fused(x)
    assert not grouped
    handle.remove()
    fused(x)
    assert grouped == [3]


@pytest.mark.parametrize("kind", ["no source", "unlike its source"])
def test_without_source_there_is_no_group_and_the_report_says_why(kind: str) -> None:
    text = "def forward(self, x):\n    return self.q_proj(x) + self.q_proj(x)\n"
    names: dict[str, Any] = {}
    exec(text, names)
    written = type("Written", (Attention,), {"forward": names["forward"]})
    fused = accelerated_copy(stock_model(base=written))
    layers = lora_fast.report(fused).layers
    assert [layer.siblings for layer in layers] == [()] * 3
    assert {layer.alone for layer in layers} == {"no source of forward"}
    assert "none: no source of forward" in str(lora_fast.report(fused))


def test_a_tiny_llama_trains_as_without_groups(grouped: list[int]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    stock = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    fused = lora_fast.accelerate(copy.deepcopy(stock), fuse_mlp=False)
    ids = torch.randint(64, (2, 12))
    for model in (stock, fused):
        model(input_ids=ids, labels=ids).loss.backward()
    assert grouped == [3, 2] * 2, "q, k, v and gate, up of two layers"
    theirs = dict(stock.named_parameters())
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)
    assert counted(fused) == (14, {})


def test_the_report_names_siblings() -> None:
    fused = accelerated_copy(stock_model())
    layers = lora_fast.report(fused).layers
    assert [layer.siblings for layer in layers] == [
        ("k_proj", "v_proj"),
        ("q_proj", "v_proj"),
        ("q_proj", "k_proj"),
    ]
    header, first, *_ = str(lora_fast.report(fused)).splitlines()
    assert header.endswith("computed with")
    assert first.endswith("k_proj, v_proj")
    quietly(layer_of(fused, "q_proj").merge)
    first, second, _ = lora_fast.report(fused).layers
    assert (first.siblings, second.siblings) == ((), ("v_proj",))
    assert first.alone == "hooks, another dropout, or more than plain LoRA"
    assert all(
        layer.siblings == () and layer.alone is None
        for layer in lora_fast.report(lora_fast.decelerate(fused)).layers
    )
