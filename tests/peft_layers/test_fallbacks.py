"""Anything the fused path does not cover gives stock PEFT's result, bitwise, and is counted."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lora_models import (
    K,
    accelerated_copy,
    assert_equal_runs,
    counted,
    lora_config,
    lora_layers,
    peft_model,
    quietly,
    run,
)
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Prepare = Callable[[Any], Any]


def _adapter(name: str) -> Callable[[Any], nn.Module]:
    return lambda model: getattr(lora_layers(model)[0], name)["default"]


def _hook(find: Callable[[Any], nn.Module], register: str, hook: Callable[..., Any]) -> Prepare:
    return lambda model: getattr(find(model), register)(hook)


def _halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output / 2


def _double_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * 2,)


def _negate_gradient(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(None if g is None else -g for g in inputs)


def _replace_forward(model: Any) -> None:
    module = _adapter("lora_A")(model)
    forward = module.forward
    module.forward = lambda x: forward(x) + 1


def _second_adapter(**config: Any) -> Prepare:
    def add(model: Any) -> None:
        torch.manual_seed(5)
        model.add_adapter("other", lora_config(r=3, lora_alpha=3, **config))
        model.base_model.set_adapter(["default", "other"])

    return add


def _set_dropout(dropout: nn.Module) -> Prepare:
    def replace(model: Any) -> None:
        lora_layers(model)[0].lora_dropout["default"] = dropout
        model.train()

    return replace


def _bias_in_lora_A(model: Any) -> None:
    torch.manual_seed(5)
    lora_layers(model)[0].lora_A["default"] = nn.Linear(K, 5)


class Scaled(Tensor):
    """A tensor subclass whose products differ from those of its memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) * 3 if func is nn.functional.linear else result


def _subclassed_weight(find: Callable[[Any], nn.Module]) -> Prepare:
    def replace(model: Any) -> None:
        module = find(model)
        weight = module.weight.detach().as_subclass(Scaled)
        del module._parameters["weight"]
        module.weight = weight

    return replace


def _nothing(model: Any) -> None:
    pass


# reason, what to do to a model of one dense layer first, arguments of peft_model
SAME_RESULT: list[tuple[str, Prepare, dict[str, Any]]] = [
    ("adapters disabled", lambda m: m.base_model.disable_adapter_layers(), {}),
    ("merged", lambda m: m.merge_adapter(safe_merge=True), {}),
    ("no active adapter", lambda m: m.base_model.set_adapter([]), {}),
    ("DoRA with several adapters", _second_adapter(use_dora=True), {"use_dora": True}),
    ("hooks on lora_A", _hook(_adapter("lora_A"), "register_forward_hook", _halve), {}),
    ("hooks on lora_B", _hook(_adapter("lora_B"), "register_forward_hook", _halve), {}),
    (
        "hooks on lora_A",
        _hook(_adapter("lora_A"), "register_forward_pre_hook", _double_input),
        {},
    ),
    (
        "hooks on lora_B",
        _hook(_adapter("lora_B"), "register_full_backward_hook", _negate_gradient),
        {},
    ),
    (
        "hooks on lora_A",
        _hook(_adapter("lora_A"), "register_full_backward_pre_hook", lambda m, g: (g[0] * 2,)),
        {},
    ),
    ("hooks on lora_dropout", _hook(_adapter("lora_dropout"), "register_forward_hook", _halve), {}),
    (
        "lora_A is ParametrizedLinear",
        lambda m: parametrizations.weight_norm(_adapter("lora_A")(m)),
        {},
    ),
    ("forward of lora_A replaced", _replace_forward, {}),
    ("lora_A has a bias", _bias_in_lora_A, {}),
    ("lora_A is Scaled", _subclassed_weight(_adapter("lora_A")), {}),
    ("lora_dropout is AlphaDropout", _set_dropout(nn.AlphaDropout(0.5)), {}),
    ("dropout with several adapters", _second_adapter(lora_dropout=0.5), {"lora_dropout": 0.2}),
    ("dtype float64", lambda m: m.double(), {}),
]


@pytest.mark.parametrize(
    ("reason", "prepare", "config"),
    SAME_RESULT,
    ids=[f"{i}-{c[0]}" for i, c in enumerate(SAME_RESULT)],
)
def test_same_bits_as_stock(reason: str, prepare: Prepare, config: dict[str, Any]) -> None:
    stock = peft_model(**config).train()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        quietly(prepare, model)
    x = torch.randn(3, 7, K, dtype=torch.float64 if reason == "dtype float64" else torch.float32)
    results = []
    for model in (fused, stock):
        torch.manual_seed(3)
        results.append(run(model, x))
    assert_equal_runs(*results)
    assert counted(fused) == (0, {reason: 1})


def _call(model: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises((RuntimeError, TypeError, ValueError, AssertionError, AttributeError)) as e:
        lora_layers(model)[0](*args, **kwargs)
    return f"{type(e.value).__name__}: {e.value}"


def _rank(model: Any) -> None:
    lora_layers(model)[0].lora_A["default"] = nn.Linear(K, 4, bias=False)


def _bfloat16_B(model: Any) -> None:
    lora_layers(model)[0].lora_B.to(torch.bfloat16)


# reason, what to do to the model first, its kind, arguments of the layer
SAME_ERROR: list[tuple[str, Prepare, str, tuple[Any, ...]]] = [
    ("extra arguments", _nothing, "dense", (torch.ones(2, K), 1)),
    ("x is list", _nothing, "dense", ([1.0] * K,)),
    ("shape of x", _nothing, "dense", (torch.ones(2, K + 1),)),
    ("shape of x", _nothing, "nf4", (torch.ones(2, K + 2),)),
    ("shape of x", _nothing, "dense", (torch.tensor(1.0),)),
    ("x and base layer differ in dtype", _nothing, "dense", (torch.ones(2, K).bfloat16(),)),
    ("x is on the meta device", _nothing, "dense", (torch.ones(2, K, device="meta"),)),
    ("shapes of lora_A and lora_B", _rank, "dense", (torch.ones(2, K),)),
    ("lora_A and lora_B differ in dtype", _bfloat16_B, "dense", (torch.ones(2, K),)),
]


@pytest.mark.parametrize(
    ("reason", "prepare", "kind", "args"),
    SAME_ERROR,
    ids=[f"{i}-{c[0]}" for i, c in enumerate(SAME_ERROR)],
)
def test_same_error_as_stock(
    reason: str, prepare: Prepare, kind: str, args: tuple[Any, ...]
) -> None:
    stock = peft_model(kind)
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        prepare(model)
    assert _call(fused, *args) == _call(stock, *args)
    assert counted(fused) == (0, {reason: 1})


def test_disabled_input_casting() -> None:
    """bfloat16 x and float32 adapters: PEFT casts x, unless told not to, and then raises."""
    stock = peft_model(dtype=torch.bfloat16)
    fused = accelerated_copy(stock)
    x = torch.ones(2, K).bfloat16()
    with disable_input_dtype_casting(fused), disable_input_dtype_casting(stock):
        assert _call(fused, x) == _call(stock, x)
    assert counted(fused) == (0, {"x and lora_A differ in dtype": 1})
    fused(x)
    assert counted(fused)[0] == 1


def test_integers_are_left_to_bitsandbytes() -> None:
    stock = peft_model("nf4")
    fused = accelerated_copy(stock)
    x = torch.arange(2 * K).reshape(2, K)
    assert torch.equal(fused(x), stock(x))
    assert counted(fused) == (0, {"dtype int64": 1})


def test_nan_scaling_is_an_error() -> None:
    fused = accelerated_copy(peft_model())
    lora_layers(fused)[0].scaling["default"] = float("nan")
    with pytest.raises(ValueError, match="scaling must be finite"):
        fused(torch.ones(2, K))


def test_several_bfloat16_adapters_under_autocast_of_float16() -> None:
    """Autocast joins no tensors of a 16-bit dtype that is not its own."""
    stock = peft_model(dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    stock.add_adapter("other", lora_config(r=3))
    stock.bfloat16().base_model.set_adapter(["default", "other"])
    fused, exact = accelerated_copy(stock), copy.deepcopy(stock).float()
    x = torch.randn(9, K)
    with torch.no_grad():
        expected = exact(x)
        with torch.autocast("cpu", torch.float16):
            actual, eager = fused(x), stock(x)
    assert actual.dtype is eager.dtype and counted(fused) == (1, {})
    assert (actual - expected).norm() <= 2 * (eager - expected).norm()


def test_adapter_names_none_and_variant_arguments_run_fused() -> None:
    stock = peft_model()
    fused = accelerated_copy(stock)
    x = torch.randn(2, K)
    y = lora_layers(fused)[0](x, adapter_names=None, alora_offsets=None)
    torch.testing.assert_close(y, stock(x))
    assert counted(fused) == (1, {})


@contextlib.contextmanager
def _cuda_autocast() -> Iterator[None]:
    """torch.autocast("cuda") refuses to be enabled where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@contextlib.contextmanager
def _global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("reason", "surroundings"),
    [("CUDA autocast off CUDA", _cuda_autocast), ("global module hooks", _global_hook)],
)
def test_surroundings(reason: str, surroundings: Any) -> None:
    stock = peft_model("nf4")
    fused = accelerated_copy(stock)
    x = torch.randn(3, K)
    with surroundings():
        assert_equal_runs(run(fused, x), run(stock, x))
    assert counted(fused) == (0, {reason: 1})
    run(fused, x)
    assert counted(fused) == (1, {reason: 1})


def test_torch_func_and_forward_mode() -> None:
    stock = peft_model()
    fused = accelerated_copy(stock)
    x, tangent = torch.randn(2, 3, K)

    def of(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda rows: model(rows).square().sum()

    assert torch.equal(torch.func.grad(of(fused))(x), torch.func.grad(of(stock))(x))
    results = []
    for model in (fused, stock):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            results.append(torch.autograd.forward_ad.unpack_dual(model(dual)).tangent)
    assert torch.equal(*results)
    assert counted(fused) == (0, {"torch.func transform": 1, "forward-mode autograd": 1})


def test_tracing() -> None:
    stock = peft_model()
    fused = accelerated_copy(stock)
    x = torch.randn(3, K)
    traced = torch.jit.trace(fused, x, check_trace=False)
    assert torch.equal(traced(x), stock(x))
    assert counted(fused) == (0, {"torch.jit tracing": 1})


def test_distributed_tensors() -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        stock = peft_model()
        fused = accelerated_copy(stock)
        mesh = init_device_mesh("cpu", (1,))
        for model in (stock, fused):
            distribute_module(model, mesh)
        x = DTensor.from_local(torch.randn(3, K), mesh, [Replicate()])
        assert torch.equal(fused(x).to_local(), stock(x).to_local())
        assert counted(fused) == (0, {"lora_A is DTensor": 1})
    finally:
        torch.distributed.destroy_process_group()
