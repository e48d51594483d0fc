"""q, k and v, or gate and up, in one function: like alone, whatever the model does in between."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lora_models import K, accelerated_copy, compare, counted, lora_layers, quantised, quietly
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from lora_fast import autograd
from lora_fast.peft_layers.shared_input import GROUP

F32, BF16 = torch.float32, torch.bfloat16


class Attention(nn.Module):
    """Three projections of one x, of two widths, put together by something that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(K, 20)
        self.k_proj = nn.Linear(K, 12, bias=False)
        self.v_proj = nn.Linear(K, 12)
        self.between: Callable[[Any], None] = lambda model: None

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q = self.q_proj(x)
        self.between(self)
        k = self.k_proj(x if other is None else other)
        v = self.v_proj(x if other is None else other)
        return torch.cat([torch.tanh(q), k * v], dim=-1)


def stock_model(kind: str = "dense", **config: Any) -> Any:
    torch.manual_seed(0)
    base: nn.Module = Attention()
    between = base.between
    if kind == "nf4":
        base = quantised(base, F32)
        base.between = between
    options = {"r": 5, "lora_alpha": 8, "init_lora_weights": False, **config}
    return get_peft_model(
        base, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], **options)
    )


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the function computed."""
    calls: list[int] = []
    forward = autograd.dispatch.forward_group
    monkeypatch.setattr(
        autograd.dispatch,
        "forward_group",
        lambda x, fs, *rest: calls.append(len(fs)) or forward(x, fs, *rest),
    )
    return calls


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
    stock.add_adapter("other", LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], **other))
    stock.base_model.set_adapter(["default", "other"])
    fused = accelerated_copy(stock)
    agree(fused, stock, torch.randn(9, K))
    assert grouped == [3]


def _layer(model: Any, name: str) -> Any:
    return next(m for n, m in model.named_modules() if n.endswith(name))


def _write_A(model: Any) -> None:
    with torch.no_grad():
        _layer(model, "k_proj").lora_A["default"].weight.add_(0.5)


def _write_base(model: Any) -> None:
    with torch.no_grad():
        _layer(model, "v_proj").base_layer.weight.mul_(2.0)


def _scale(model: Any) -> None:
    _layer(model, "k_proj").scaling["default"] = 3.0


def _replace(model: Any) -> None:
    torch.manual_seed(3)
    _layer(model, "k_proj").lora_B["default"] = nn.Linear(5, 12, bias=False)


def _merge(model: Any) -> None:
    quietly(_layer(model, "v_proj").merge)


def _disable(model: Any) -> None:
    _layer(model, "v_proj").enable_adapters(False)


@pytest.mark.parametrize(
    "change", [_write_A, _write_base, _scale, _replace, _merge, _disable], ids=lambda f: f.__name__
)
def test_what_changes_between_the_calls_is_seen(change: Callable[[Any], None]) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    x = torch.randn(9, K)
    for model in (stock, fused):
        attention = model.get_base_model()
        attention.between = change
    torch.testing.assert_close(fused(x), stock(x))


def test_what_begins_to_train_between_the_calls_gets_a_gradient() -> None:
    stock = stock_model()
    grads = []
    for model in (accelerated_copy(stock), stock):
        A = _layer(model, "k_proj").lora_A["default"].weight.requires_grad_(False)
        model.get_base_model().between = lambda attention, A=A: A.requires_grad_()
        model(torch.ones(9, K)).sum().backward()
        grads.append(A.grad)
    torch.testing.assert_close(*grads)


def test_an_x_that_is_written_to_is_another_x() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    results = []
    for model in (stock, fused):
        x = torch.ones(9, K)

        def double(attention: Any, x: Tensor = x) -> None:
            x.mul_(2.0)

        model.get_base_model().between = double
        results.append(model(x))
    torch.testing.assert_close(*results)


def test_cross_attention_is_given_up_and_stays_right(grouped: list[int]) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    for _ in range(6):
        x, other = torch.randn(4, K), torch.randn(4, K)
        torch.testing.assert_close(fused(x, other), stock(x, other))
    assert 0 < len(grouped) <= 3, "q no longer computes k and v in vain"


def test_no_grad_and_grad_do_not_mix() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    x = torch.randn(65, K)
    layers = lora_layers(fused)
    with torch.no_grad():
        layers[0](x)
    assert layers[1](x).requires_grad
    layers[0](x)
    with torch.inference_mode():
        assert not layers[1](x).requires_grad
        torch.testing.assert_close(layers[2](x), lora_layers(stock)[2](x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)

    class Checkpointed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.model, x, use_reentrant=reentrant)

    agree(Checkpointed(fused), Checkpointed(stock), torch.randn(9, K))


def test_siblings_of_one_p_share_drop_x(grouped: list[int]) -> None:
    fused = accelerated_copy(stock_model(lora_dropout=0.5))
    x = torch.randn(4, K)
    torch.manual_seed(3)
    y = fused(x)
    torch.manual_seed(3)
    mask = autograd.dispatch.dropout_mask(int(torch.randint(2**62, ())), 4, K, 0.5, x.device)
    stock = lora_fast.decelerate(copy.deepcopy(fused))
    for layer in lora_layers(stock):
        layer.lora_dropout["default"] = Masked(mask)
    torch.testing.assert_close(y, stock(x))
    assert grouped == [3]
    _layer(fused, "k_proj").lora_dropout["default"].p = 0.1
    fused(x)
    assert grouped == [3], "another p is another mask"
    fused.eval()(x)
    assert grouped == [3, 3]


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0.0) * 2.0


def test_hooks_before_a_sibling_compute_alone(grouped: list[int]) -> None:
    hooked = accelerated_copy(stock_model())
    doubled = lambda module, args: (args[0] * 2,)  # noqa: E731
    _layer(hooked, "k_proj").register_forward_pre_hook(doubled)
    stock = stock_model()
    _layer(stock, "k_proj").register_forward_pre_hook(doubled)
    x = torch.randn(4, K)
    torch.testing.assert_close(hooked(x), stock(x))
    assert not grouped


def test_what_runs_after_a_sibling_runs_at_its_own_call(grouped: list[int]) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    order: list[str] = []
    for model in (stock, fused):
        for name in ("q_proj", "k_proj"):
            _layer(model, name).register_forward_hook(
                lambda module, args, y, name=name: order.append(name) or y * 2
            )
    x = torch.randn(4, K)
    torch.testing.assert_close(fused(x), stock(x))
    assert order == ["q_proj", "k_proj"] * 2
    assert grouped == [3]


def test_copies_and_pickles_form_groups_of_their_own(grouped: list[int]) -> None:
    fused = accelerated_copy(stock_model())
    buffer = io.BytesIO()
    fused.get_base_model().between = print_nothing
    torch.save(fused, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fused), torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            _layer(other, "k_proj").lora_B["default"].weight.mul_(3.0)
        stock = lora_fast.decelerate(copy.deepcopy(other))
        assert not any(GROUP in vars(layer) for layer in lora_layers(stock))
        for _ in range(3):
            x = torch.randn(4, K)
            torch.testing.assert_close(other(x), stock(x))
    assert grouped and set(grouped) == {3}
    alone = copy.deepcopy(lora_layers(fused)[0])
    before = len(grouped)
    alone(torch.randn(4, K))
    alone(torch.randn(4, K))
    assert len(grouped) == before, "a copy of one layer has no siblings"


def print_nothing(model: Any) -> None:
    pass


def test_nothing_is_kept_alive(grouped: list[int]) -> None:
    fused = accelerated_copy(stock_model())
    layers = lora_layers(fused)
    x = torch.randn(65, K)
    group, _ = vars(layers[0])[GROUP]
    for layer, left in zip(layers, (2, 1, 0), strict=True):
        layer(x)
        assert len(group._kept) == left
    with torch.no_grad():
        layers[0](x)
    assert len(group._kept) == 2
    del x
    gc.collect()
    assert not group._kept, "what was kept goes with x"


def test_few_rows_without_gradients_are_computed_alone(grouped: list[int]) -> None:
    """A group would save them no launch, and no read of W."""
    stock = stock_model()
    fused = accelerated_copy(stock)
    for rows, calls in ((64, []), (65, [3])):
        x = torch.randn(rows, K)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), stock(x))
        assert grouped == calls
    assert counted(fused) == (6, {})


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
    fused = accelerated_copy(stock)
    ids = torch.randint(64, (2, 12))
    for model in (stock, fused):
        model(input_ids=ids, labels=ids).loss.backward()
    assert grouped == [3, 2] * 2, "q, k, v and gate, up of two layers"
    theirs = dict(stock.named_parameters())
    for name, parameter in fused.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)
    assert counted(fused) == (14, {})
