"""Accelerated PEFT layers against stock PEFT: values, gradients, dtypes, shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from lora_models import (
    K,
    N,
    Single,
    accelerated_copy,
    compare,
    counted,
    float64_copy,
    lora_layers,
    peft_model,
    run,
)
from torch import Tensor, nn

from bench.instruments.accuracy import assert_all_accurate, orders
from bench.instruments.saved_tensors import SavedTensors
from lora_fast import reference
from lora_fast.backends.selection import backend_for
from lora_fast.backends.torch_ops import TorchBackend
from lora_fast.peft_layers import lora_layers as fused_lora_layers
from lora_fast.peft_layers import plain_lora

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
KINDS = ["dense", "nf4"]


def _coarser(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _exact_in_every_dtype(*shape: int) -> Tensor:
    """So that a test measures what the operation rounds, not what casting its input rounds."""
    return torch.randn(shape).to(BF16).float()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, adapter: torch.dtype, dtype: torch.dtype) -> None:
    stock = peft_model(kind, dtype, adapter, compute_dtype=dtype)
    fused = accelerated_copy(stock)
    x = torch.randn(3, 7, K, dtype=dtype)
    compare(
        fused,
        stock,
        x,
        compute_dtype=_coarser(dtype, adapter),
        eager_autocast=dtype if dtype != F32 and adapter == F32 else None,
    )
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("autocast", [BF16, F16])
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_under_autocast(
    kind: str, x_dtype: torch.dtype, autocast: torch.dtype
) -> None:
    stock = peft_model(kind, F32, F32, compute_dtype=autocast)
    fused = accelerated_copy(stock)
    x = _exact_in_every_dtype(21, K).to(x_dtype)
    compare(fused, stock, x, compute_dtype=_coarser(x_dtype, autocast), autocast=autocast)
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
@pytest.mark.parametrize("compute_dtype", [None, F32, BF16, F16])
def test_nf4_computes_in_the_dtype_of_the_base_layer(
    compute_dtype: torch.dtype | None, x_dtype: torch.dtype
) -> None:
    stock = peft_model("nf4", F32, F32, compute_dtype=compute_dtype)
    fused = accelerated_copy(stock)
    x = _exact_in_every_dtype(9, K).to(x_dtype)
    computed = compute_dtype or x_dtype
    compare(
        fused,
        stock,
        x,
        compute_dtype=_coarser(x_dtype, computed),
        eager_autocast=computed if computed != F32 else None,
    )
    (layer,) = lora_layers(fused)
    (stock_layer,) = lora_layers(stock)
    assert layer.base_layer.compute_dtype == stock_layer.base_layer.compute_dtype
    assert layer.base_layer.bias.dtype == F32, "bitsandbytes casts the bias in place, we must not"
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("quantity", ["x", "lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_off_by_one_percent_is_caught(
    kind: str, dtype: torch.dtype, quantity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = peft_model(kind, dtype, F32, compute_dtype=dtype)
    fused = accelerated_copy(stock)
    backward = TorchBackend.backward
    field = quantity.removeprefix("lora_")

    def wrong(*args: object) -> object:
        (grads,) = backward(*args)
        return [grads._replace(**{field: getattr(grads, field) * 1.01})]

    monkeypatch.setattr(TorchBackend, "backward", wrong)
    with pytest.raises(AssertionError, match=rf"{quantity}.*best fit actual ≈ 1\.0"):
        compare(fused, stock, torch.randn(3, 7, K, dtype=dtype), compute_dtype=dtype)


def test_a_dropped_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = peft_model()
    fused = accelerated_copy(stock)
    read = plain_lora.read_plain

    def without_bias(layer: object) -> object:
        plain = read(layer)
        assert plain is not None
        return plain._replace(factors=plain.factors._replace(bias=None))

    monkeypatch.setattr(plain_lora, "read_plain", without_bias)
    with pytest.raises(AssertionError, match=r"y \("):
        compare(fused, stock, torch.randn(21, K), compute_dtype=F32)


@pytest.mark.parametrize("kind", KINDS)
def test_result_dtypes_equal_stock(kind: str) -> None:
    """Every combination of base, adapter, x, autocast and compute dtype, errors included."""
    errors = 0
    for base, adapter in itertools.product([F32, BF16, F16], [F32, BF16]):
        for compute in [None] if kind == "dense" else [None, F32, BF16]:
            stock = peft_model(kind, base, adapter, compute_dtype=compute)
            fused = accelerated_copy(stock)
            combinations = list(itertools.product([F32, BF16, F16], [None, BF16, F16]))
            for x_dtype, autocast in combinations:
                x = torch.randn(3, K, dtype=x_dtype)
                expected = _dtype_or_error(stock, x, autocast)
                assert _dtype_or_error(fused, x, autocast) == expected, (base, x_dtype, autocast)
                errors += isinstance(expected, str)
            fused_calls, fallbacks = counted(fused)
            assert fused_calls + sum(fallbacks.values()) == len(combinations)
            assert set(fallbacks) <= {"x and base layer differ in dtype"}
            if kind == "nf4":
                assert not fallbacks
    assert errors == (12 if kind == "dense" else 0)


def _dtype_or_error(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> object:
    try:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return model(x).dtype
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("shape", [(K,), (1, K), (9, K), (2, 3, K), (2, 3, 2, K)])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: str, shape: tuple[int, ...]) -> None:
    stock = peft_model(kind)
    fused = accelerated_copy(stock)
    x = torch.randn(shape)
    assert fused(x).shape == (*shape[:-1], N)
    compare(fused, stock, x, compute_dtype=F32)
    assert counted(fused) == (2, {})


@pytest.mark.parametrize("shape", [(0, K), (0, 3, K), (3, 0, K), (2, 0, 2, K)])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    stock = peft_model(kind, dtype, compute_dtype=dtype)
    fused = accelerated_copy(stock)
    actual, expected = (run(model, torch.randn(shape, dtype=dtype)) for model in (fused, stock))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        assert not actual[name].any(), name
    assert counted(fused) == (1, {})


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def _every_other_feature(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(4, *x.shape[1:])


@pytest.mark.parametrize("view", [_transposed, _every_other_feature, _expanded])
@pytest.mark.parametrize("kind", KINDS)
def test_strided_input(kind: str, view: Callable[[Tensor], Tensor]) -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(view(x))

    stock = peft_model(kind, model=Viewing())
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(4, 5, K), compute_dtype=F32)
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_bias(kind: str, bias: bool) -> None:
    with nullcontext() if bias else pytest.warns(UserWarning, match="has no bias"):
        stock = peft_model(kind, model=Single(bias), lora_bias=True)
    fused = accelerated_copy(stock)
    assert any("lora_B.default.bias" in name for name, _ in fused.named_parameters())
    compare(fused, stock, torch.randn(9, K), compute_dtype=F32)
    assert counted(fused) == (1, {})


def test_bias_and_base_weight_can_train() -> None:
    stock = peft_model(bias="all")
    lora_layers(stock)[0].base_layer.weight.requires_grad_(True)
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(9, K), compute_dtype=F32)
    assert counted(fused) == (1, {})


def test_every_trainable_moves_and_nothing_else() -> None:
    model = accelerated_copy(peft_model("nf4", compute_dtype=BF16))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(9, K)).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == ("lora_" in name), name


def test_rank_and_scaling_of_rslora_and_rank_pattern() -> None:
    stock = peft_model(use_rslora=True, rank_pattern={"fc": 3}, alpha_pattern={"fc": 7})
    fused = accelerated_copy(stock)
    assert lora_layers(fused)[0].r == {"default": 3}
    compare(fused, stock, torch.randn(9, K), compute_dtype=F32)
    assert counted(fused) == (1, {})


def test_fan_in_fan_out_is_ignored_by_the_forward_as_in_peft() -> None:
    stock = peft_model()
    lora_layers(stock)[0].fan_in_fan_out = True
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(9, K), compute_dtype=F32)
    assert counted(fused) == (1, {})


@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_uses_one_mask_in_forward_and_backward(kind: str, p: float) -> None:
    """The stream of masks is ours, not PEFT's; the equation for the mask drawn is the same."""
    stock = peft_model(kind, lora_dropout=p).train()
    fused = accelerated_copy(stock)
    x = torch.randn(2, 6, K)
    torch.manual_seed(11)
    actual = run(fused, x)
    torch.manual_seed(11)
    assert torch.equal(run(fused, x)["y"], actual["y"]), "torch.manual_seed must reproduce it"

    torch.manual_seed(11)
    seed = int(torch.randint(2**62, ()))
    mask = backend_for(x.device).dropout_mask(seed, 12, K, p, x.device)
    assert not mask.any() if p == 1.0 else 0.3 < mask.float().mean() < 0.9
    wide, plain = (
        _Masked(lora_layers(model)[0], mask)
        for model in (float64_copy(stock), float64_copy(stock).float())
    )
    ref64, eager = run(wide, x.double()), orders(lambda: run(plain, x))
    actual = {name.replace("base_model.model.fc.", "layer."): t for name, t in actual.items()}
    assert_all_accurate(actual, ref64, eager, compute_dtype=F32)
    assert counted(fused) == (2, {})


class _Masked(nn.Module):
    """The specification on the parameters of a LoRA layer, for a given mask."""

    def __init__(self, layer: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        return reference.adapted_linear(
            x,
            layer.base_layer.weight,
            layer.base_layer.bias,
            A=layer.lora_A["default"].weight,
            B=layer.lora_B["default"].weight,
            scaling=layer.scaling["default"],
            dropout_p=layer.lora_dropout["default"].p,
            dropout_mask=self.mask,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_eval_mode_has_no_dropout(kind: str) -> None:
    stock = peft_model(kind, lora_dropout=0.5).eval()
    fused = accelerated_copy(stock)
    compare(fused, stock, torch.randn(9, K), compute_dtype=F32)
    assert counted(fused) == (1, {})


def test_in_place_changes_of_the_result_are_allowed() -> None:
    fused = accelerated_copy(peft_model())
    y = fused(torch.randn(2, 3, K))
    y += 1
    y.relu_().sum().backward()
    assert counted(fused) == (1, {})


def test_accumulated_gradients_equal_one_large_batch() -> None:
    for kind, dtype in itertools.product(KINDS, [F32, BF16]):
        stock = peft_model(kind, dtype, compute_dtype=dtype)
        fused = accelerated_copy(stock)
        x = torch.randn(4, 6, K, dtype=dtype)
        wide = float64_copy(stock)
        for model, parts in ((fused, list(x)), (stock, [x]), (wide, [x.double()])):
            for rows in parts:
                model(rows).square().sum().backward()
        grads = [
            {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            for model in (fused, wide, stock)
        ]
        assert_all_accurate(*grads, compute_dtype=dtype, name=f"{kind} {dtype}")
        assert counted(fused) == (4, {})


def test_saves_x_and_the_shrink_only() -> None:
    """bfloat16 base with float32 adapters: no float32 copy of x, no product of A and B."""
    for kind in KINDS:
        fused = accelerated_copy(peft_model(kind, BF16, F32, compute_dtype=BF16))
        x = torch.randn(64, K, dtype=BF16, requires_grad=True)
        with SavedTensors(fused.parameters()) as saved:
            fused(x)
        assert saved.bytes == x.nbytes + 64 * 5 * 2, kind


def test_result_dtype_under_cuda_autocast() -> None:
    """lora.Linear4bit adds its terms without casting back where CUDA autocast is on."""
    dense, nf4 = (lora_layers(accelerated_copy(peft_model(kind)))[0] for kind in KINDS)
    y = torch.zeros(1, dtype=F16)
    torch.set_autocast_enabled("cuda", True)
    try:
        autocast = torch.get_autocast_dtype("cuda")
        assert fused_lora_layers._result_dtype(nf4, y) == (y + y.to(autocast)).dtype
        assert (
            fused_lora_layers._result_dtype(nf4, y.to(BF16)) == (y.to(BF16) + y.to(autocast)).dtype
        )
        assert fused_lora_layers._result_dtype(dense, y) == F16
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert fused_lora_layers._result_dtype(nf4, y) == F16


@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize("adapter", [F32, BF16])
@pytest.mark.parametrize("base", [BF16, F16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_models_under_autocast(
    kind: str, base: torch.dtype, adapter: torch.dtype, x_dtype: torch.dtype
) -> None:
    stock = peft_model(kind, base, adapter, compute_dtype=base)
    fused = accelerated_copy(stock)
    x = _exact_in_every_dtype(21, K).to(x_dtype)
    compare(fused, stock, x, compute_dtype=BF16, autocast=BF16)
    assert counted(fused) == (1, {})
