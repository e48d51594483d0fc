"""Delta-LoRA: the weight follows the adapter, resumed runs equal uninterrupted ones."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_same_bits
from lora_models import K, Mlp, N, nf4_linear, peft_model
from torch import Tensor, nn

import lora_fast
from bench.delta_lora_rounding import update_of
from lora_fast import NF4Weight
from lora_fast.optim import DeltaLoRA

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
C = 0.5


def _ours(kind: str = "dense", dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(0)
    model = Mlp().to(dtype)
    quantize: Any = "nf4" if kind == "nf4" else None
    return lora_fast.convert(model, ["fc1", "fc2"], r=3, lora_alpha=6, quantize=quantize)


def _peft(kind: str = "dense", dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(0)
    return peft_model(kind, dtype, model=Mlp(), r=3, lora_alpha=6)


def _accelerated(kind: str = "dense", dtype: torch.dtype = F32) -> nn.Module:
    return lora_fast.accelerate(_peft(kind, dtype))


MODELS: dict[str, Callable[..., nn.Module]] = {
    "ours": _ours,
    "peft": _peft,
    "accelerated": _accelerated,
}


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def _weight(layer: Any) -> Tensor:
    """W in float64, decoded from NF4."""
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        return NF4Weight.from_params4bit(weight).dequantize(F64)
    return weight.detach().double()


def _product(layer: Any) -> Tensor:
    """s B A in float64."""
    if isinstance(layer, lora_fast.LoRALinear):
        return layer.scaling * (layer.lora_B.detach().double() @ layer.lora_A.detach().double())
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.scaling["default"] * (B.detach().double() @ A.detach().double())


def _optimizer(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, K, generator=generator)
    target = torch.randn(6, N, generator=generator)
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    base = next(m.base_layer for m in model.modules() if hasattr(m, "lora_A"))
    dtype = base.bias.dtype if base.bias is not None else dtype
    loss = (model(x.to(dtype)).float() - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _contents(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def _assert_same_model(actual: nn.Module, expected: nn.Module) -> None:
    left, right = _contents(actual), _contents(expected)
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert_same_bits(left[name], value, name=name)


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("start_step", [0, 2])
def test_the_weight_moves_by_the_papers_rule(kind: str, start_step: int) -> None:
    model = MODELS[kind]()
    optimizer = DeltaLoRA(_optimizer(model), model, c=C, start_step=start_step)
    for step in range(4):
        weights = [_weight(layer) for layer in _layers(model)]
        products = [_product(layer) for layer in _layers(model)]
        _step(model, optimizer, step)
        for layer, W, BA in zip(_layers(model), weights, products, strict=True):
            delta = _weight(layer) - W
            expected = C * (_product(layer) - BA)
            if step < start_step:
                assert (delta == 0).all()
            else:
                # One rounding of W, and of factors that are around 1, in float32.
                assert expected.abs().max() > 1e-4
                assert (delta - expected).abs().max() < 2**-23 * (1 + W.abs().max())


def test_everything_but_the_weight_is_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """With c = 0 the run is that of the wrapped optimizer, bit for bit."""
    wrapped, plain = _ours(), _ours()
    optimizer, other = DeltaLoRA(_optimizer(wrapped), wrapped, c=0.0), _optimizer(plain)
    for step in range(3):
        assert _step(wrapped, optimizer, step) == _step(plain, other, step)
    _assert_same_model(wrapped, plain)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_16_bit_weights_are_one_rounding_away_at_any_time(dtype: torch.dtype) -> None:
    model = _ours(dtype=dtype)
    optimizer = DeltaLoRA(_optimizer(model, lr=1e-3), model, c=C)
    start = [(_weight(layer), _product(layer)) for layer in _layers(model)]
    for step in range(20):
        _step(model, optimizer, step)
    for layer, (W, BA) in zip(_layers(model), start, strict=True):
        exact = W + C * (_product(layer) - BA)
        assert layer.base_layer.weight.dtype == dtype
        nearest = exact.to(F32).to(dtype).double()
        assert (_weight(layer) == nearest).double().mean() > 0.999
        assert (nearest != W).double().mean() > 0.2


def test_in_place_16_bit_weights_lose_small_steps() -> None:
    """What the docstring says of keep_start=False."""
    arrived = {}
    for keep in (True, False):
        model = _ours(dtype=BF16)
        optimizer = DeltaLoRA(_optimizer(model, lr=3e-4), model, c=C, keep_start=keep)
        layer = _layers(model)[1]
        W, BA = _weight(layer), _product(layer)
        for step in range(30):
            _step(model, optimizer, step)
        exact, got = C * (_product(layer) - BA), _weight(layer) - W
        arrived[keep] = float((got * exact).sum() / exact.square().sum())
    assert 0.9 < arrived[True] < 1.1, arrived
    assert arrived[False] < 0.5, arrived


def test_nf4_in_place_loses_all() -> None:
    arrived = {}
    for keep in (True, False):
        arrived[keep], _ = update_of("nf4", 1e-3, keep_start=keep, steps=40)
    assert 0.7 < arrived[True] < 1.1, arrived
    assert abs(arrived[False]) < 0.05, arrived


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_launch_a_weight(typical_executor: Any, dtype: torch.dtype) -> None:
    """The kernel, and what it makes of the weights, by the optimizer that uses it."""
    model = _ours(dtype=dtype).to(typical_executor.device)
    optimizer = DeltaLoRA(_optimizer(model), model, c=C)
    before = [(_weight(layer), _product(layer)) for layer in _layers(model)]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with typical_executor.counting_launches() as names:
        optimizer.step()
    assert names == ["weight_update"] * 2
    for layer, (W, BA) in zip(_layers(model), before, strict=True):
        exact = W + C * (_product(layer) - BA)
        # One rounding to W's dtype, and float32 sums of W and of factors below 1.
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-23 * (1 + W.abs().max())
        assert ((_weight(layer) - exact).abs() <= allowed).all()
        assert (_weight(layer) != W).any()


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_nf4_keeps_storage_and_format(kind: str, nested: bool) -> None:
    model = MODELS[kind]("nf4", BF16)
    if not nested:
        for layer in _layers(model):
            linear = nn.Linear(
                layer.base_layer.in_features, layer.base_layer.out_features
            ).bfloat16()
            layer.base_layer = nf4_linear(linear, BF16, compress_statistics=False)
    layer = _layers(model)[0]
    weight, state = layer.base_layer.weight, layer.base_layer.weight.quant_state
    pointer, W, BA = weight.data_ptr(), _weight(layer), _product(layer)
    optimizer = DeltaLoRA(_optimizer(model, lr=5e-2), model, c=C)
    for step in range(8):
        _step(model, optimizer, step)
    assert layer.base_layer.weight is weight and weight.data_ptr() == pointer
    assert weight.quant_state is state and state.nested is nested and state.blocksize == 64
    exact = W + C * (_product(layer) - BA)
    fresh = NF4Weight.from_dense(exact.float(), double_quant=nested)
    packed = NF4Weight.from_params4bit(weight).packed
    assert (packed == fresh.packed).double().mean() > 0.99
    # One quantisation away, not eight.
    once = (fresh.dequantize(F64) - exact).norm()
    assert (_weight(layer) - exact).norm() <= 1.001 * once
    assert (_weight(layer) != W).double().mean() > 0.1


def _resumed(
    make: Callable[[], nn.Module], wrap: Callable[[nn.Module], DeltaLoRA], stop: int, load: str
) -> tuple[nn.Module, list[float]]:
    """Train `stop` steps, save, load into new objects in the order `load`, train up to 6."""
    model = make()
    optimizer = wrap(model)
    for step in range(stop):
        _step(model, optimizer, step)
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
    return model, [_step(model, optimizer, step) for step in range(stop, 6)]


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
        return _ours(kind, dtype)

    def wrap(model: nn.Module) -> DeltaLoRA:
        optimizer = _optimizer(model, lr=3e-2)
        return DeltaLoRA(optimizer, model, c=C, start_step=2, keep_start=keep)

    model = make()
    optimizer = wrap(model)
    losses = [_step(model, optimizer, step) for step in range(6)]
    resumed, last = _resumed(make, wrap, stop, load)
    assert last == losses[stop:]
    _assert_same_model(resumed, model)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_going_back_to_a_copy_of_the_state(dtype: torch.dtype) -> None:
    model = _ours(dtype=dtype)
    optimizer = DeltaLoRA(_optimizer(model), model, c=C)
    _step(model, optimizer, 0)
    saved, contents = copy.deepcopy(optimizer.state_dict()), _contents(model)
    losses = [_step(model, optimizer, step) for step in (1, 2)]
    model.load_state_dict(contents)
    optimizer.load_state_dict(saved)
    for name, value in _contents(model).items():
        assert_same_bits(value, contents[name], name=name)
    assert [_step(model, optimizer, step) for step in (1, 2)] == losses


def test_loading_ones_own_state_changes_nothing() -> None:
    """What accelerate does when it wraps an optimizer."""
    model = _ours(dtype=BF16)
    optimizer = DeltaLoRA(_optimizer(model), model, c=C)
    _step(model, optimizer, 0)
    before = _contents(model)
    optimizer.load_state_dict(optimizer.state_dict())
    for name, value in _contents(model).items():
        assert_same_bits(value, before[name], name=name)


def test_states_that_do_not_fit() -> None:
    model = _ours()
    optimizer = DeltaLoRA(_optimizer(model), model, c=C)
    plain = optimizer.optimizer.state_dict()
    empty = optimizer.state_dict()
    _step(model, optimizer, 0)
    state, before = optimizer.state_dict(), _contents(model)

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
    for name, value in _contents(model).items():
        assert_same_bits(value, before[name], name=name)


def test_it_passes_for_the_optimizer_it_wraps() -> None:
    model = _ours()
    inner = torch.optim.SGD(lora_fast.optim.loraplus_param_groups(model, 0.1, 4.0), momentum=0.9)
    optimizer = DeltaLoRA(inner, model, c=C)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    _step(model, optimizer, 0)
    scheduler.step()
    assert [g["lr"] for g in inner.param_groups] == [0.05, 0.2] and calls == ["before", "after"]
    assert optimizer.state is inner.state and len(optimizer.state) == 4
    assert all(p.grad is None for p in model.parameters())
    assert "lr: 0.05" in repr(optimizer)
    loss = optimizer.step(lambda: torch.tensor(3.0))
    assert loss == 3.0
    clone = copy.deepcopy((model, optimizer))
    before = _contents(model)
    _step(*clone, 1)
    assert clone[1].steps == 3 and optimizer.steps == 2
    for name, value in _contents(model).items():
        assert_same_bits(value, before[name], name=name)
    assert clone[1].state_dict().keys() == optimizer.state_dict().keys()


def test_a_saved_tensor_is_not_overwritten_unnoticed() -> None:
    model = _ours()
    optimizer = DeltaLoRA(_optimizer(model), model, c=C)
    x = torch.randn(4, K, requires_grad=True)
    y = model(x)
    _step(model, optimizer, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_scalings_may_be_tensors() -> None:
    """As hot-swapped adapters of PEFT have them."""
    model, other = _peft(), _peft()
    for layer in _layers(model):
        layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    for each in (model, other):
        optimizer = DeltaLoRA(_optimizer(each), each, c=C)
        for step in range(2):
            _step(each, optimizer, step)
    for one, two in zip(_layers(model), _layers(other), strict=True):
        torch.testing.assert_close(_weight(one), _weight(two), rtol=0, atol=1e-7)


def test_a_trainer_run_and_its_resumption(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import set_seed

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = _peft(dtype=BF16)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            y = self.mlp(x.bfloat16()).float()
            return {"loss": (y - labels).square().mean(), "logits": y}

    data = [{"x": torch.randn(K), "labels": torch.randn(N)} for _ in range(16)]

    def train(folder: str, stop: int, resume: str | None = None) -> tuple[nn.Module, DeltaLoRA]:
        set_seed(0)
        task = Task()
        optimizer = DeltaLoRA(_optimizer(task), task, c=C, start_step=1)
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
        (_weight(a) != _weight(b)).any()
        for a, b in zip(_layers(whole), _layers(start), strict=True)
    )
    resumed, _ = train("resumed", 6, resume=str(tmp_path / "whole" / "checkpoint-3"))
    _assert_same_model(resumed, whole)
