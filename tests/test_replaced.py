"""Functions that somebody replaced for every layer are called, and their results are stock's."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import attentions
import bitsandbytes as bnb
import expert_models
import gated_models
import pytest
import torch
from lora_models import (
    K,
    accelerated_copy,
    assert_equal_runs,
    counted,
    lora_layers,
    peft_model,
    run,
)
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import lora_fast
from lora_fast.peft_layers.expert_gates import form_of
from lora_fast.peft_layers.fused_forward import CAST
from lora_fast.replaced import own, replaced

Surroundings = Callable[[], contextlib.AbstractContextManager[Any]]


def _doubled(owner: Any, name: str) -> Surroundings:
    """`name` of a class or module, replaced by a function with twice its result."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        inherited = name not in vars(owner)
        stock = getattr(owner, name)
        setattr(owner, name, functools.wraps(stock)(lambda *a, **k: stock(*a, **k) * 2))
        try:
            yield
        finally:
            delattr(owner, name) if inherited else setattr(owner, name, stock)

    return patched


class _DoubledProduct(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y * 2 if func is functional.linear else y


DROPS = {"lora_dropout": 0.5}
# reason, what is replaced, kind of the base layer, options of the adapter
REPLACED: dict[str, tuple[Surroundings, str, dict[str, Any]]] = {
    "forward of nn.Linear replaced": (_doubled(nn.Linear, "forward"), "dense", {}),
    "call of nn.Linear replaced": (_doubled(nn.Linear, "__call__"), "dense", {}),
    "torch.nn.functional.linear replaced": (_doubled(functional, "linear"), "dense", {}),
    "dropout of PyTorch replaced": (_doubled(functional, "dropout"), "dense", DROPS),
    "a torch function mode": (_DoubledProduct, "dense", {}),
    "forward of Linear replaced": (_doubled(peft_layer.Linear, "forward"), "dense", {}),
    "cast of the input of Linear replaced": (_doubled(BaseTunerLayer, CAST), "dense", {}),
    "norm of DoRA replaced": (
        _doubled(DoraLinearLayer, "get_weight_norm"),
        "dense",
        {"use_dora": True},
    ),
}
ALIKE: dict[str, tuple[str, Surroundings, str, dict[str, Any]]] = {
    **{reason: (reason, *case) for reason, case in REPLACED.items()},
    "nn.Module": (
        "call of nn.Linear replaced",
        _doubled(nn.Module, "__call__"),
        "dense",
        {},
    ),
    "nn.Dropout": (
        "dropout of PyTorch replaced",
        _doubled(nn.Dropout, "forward"),
        "dense",
        DROPS,
    ),
    "PEFT's Linear4bit": (
        "forward of Linear4bit replaced",
        _doubled(Linear4bit, "forward"),
        "nf4",
        {},
    ),
}


@pytest.mark.parametrize(("reason", "surroundings", "kind", "options"), ALIKE.values(), ids=ALIKE)
def test_layers_call_what_replaced_a_function(
    reason: str, surroundings: Surroundings, kind: str, options: dict[str, Any]
) -> None:
    stock = peft_model(kind, **options).train()
    fused = accelerated_copy(stock)
    x = torch.randn(3, 7, K)
    results = []
    with surroundings():
        for model in (fused, stock):
            torch.manual_seed(3)
            results.append(run(model, x))
    assert_equal_runs(*results)
    assert counted(fused) == (0, {reason: 1})
    run(fused, x)
    assert counted(fused) == (1, {reason: 1})


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["layer", "group", "MLP"])
def test_a_layer_whose_cast_of_the_input_is_replaced_calls_it(name: str) -> None:
    stock, width = {
        "layer": (peft_model(), K),
        "group": (attentions.stock_model(), K),
        "MLP": (gated_models.stock_model(), gated_models.H),
    }[name]
    fused = accelerated_copy(stock)
    x = torch.randn(5, width)
    run(fused, x)
    for model in (stock, fused):
        last = lora_layers(model)[-1]
        cast = last._cast_input_dtype
        last._cast_input_dtype = functools.partial(lambda cast, *given: 2 * cast(*given), cast)
    torch.testing.assert_close(run(fused, x), run(stock, x))
    assert lora_layers(fused)[-1]._lora_fast_calls.by_reason()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("reason", "surroundings", "kind", "options"), ALIKE.values(), ids=ALIKE)
def test_graphs_are_made_again_once_a_function_is_replaced(
    reason: str, surroundings: Surroundings, kind: str, options: dict[str, Any]
) -> None:
    """Which those of stock PEFT do not always notice."""
    if reason.startswith("cast") and sys.version_info[:3] == (3, 13, 0):
        pytest.skip("on Python 3.13.0 torch.compile does not watch the attributes of base classes")
    # In a graph the masks of dropout are others, and in evaluation bitsandbytes packs its weights.
    stock = peft_model(kind, **options).train(options is not DROPS)
    fused = accelerated_copy(stock)
    x = torch.randn(3, 7, K)
    graph, of_stock = (torch.compile(m, backend="eager") for m in (fused, stock))
    plain = stock(x)
    torch.testing.assert_close(graph(x), plain)
    with surroundings():
        expected = of_stock(x)
        torch.testing.assert_close(graph(x), expected)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    assert counted(fused) == (0, {f"torch.compile: {reason}": 1})
    torch.testing.assert_close(graph(x), plain)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_default_device_makes_no_graph_fall_back() -> None:
    fused = accelerated_copy(peft_model())
    graph = torch.compile(fused, backend="eager", fullgraph=True)
    with torch.device("cpu"):
        graph(torch.randn(3, K))
    assert counted(fused) == (0, {})
    assert lora_fast.report(fused).layers[0].compiled


@pytest.mark.parametrize("name", ["forward", "matmul_4bit"])
def test_the_low_rank_is_added_to_what_replaced_a_4_bit_layer(name: str) -> None:
    stock = peft_model("nf4")
    fused = accelerated_copy(stock)
    x = torch.randn(3, 7, K)
    with _doubled(bnb if name == "matmul_4bit" else bnb.nn.Linear4bit, name)():
        torch.testing.assert_close(run(fused, x), run(stock, x))
    torch.testing.assert_close(run(fused, x), run(stock, x))


@pytest.mark.parametrize(
    "surroundings",
    [
        _doubled(nn.Linear, "forward"),
        _doubled(functional, "linear"),
        _doubled(peft_layer.Linear, "forward"),
        _DoubledProduct,
    ],
    ids=["nn.Linear", "linear", "PEFT's Linear", "mode"],
)
def test_gated_mlps_do_so(surroundings: Surroundings) -> None:
    stock = gated_models.stock_model()
    fused = accelerated_copy(stock)
    x = torch.randn(5, gated_models.H)
    with surroundings():
        assert_equal_runs(run(fused, x), run(stock, x))
    assert not any(layer._lora_fast_calls.fused for layer in lora_layers(fused))
    before = gated_models.counts(fused)[0]
    run(fused, x)
    assert gated_models.counts(fused)[0] == before + 1


@pytest.mark.skipif(not expert_models.FUSES, reason="PEFT or transformers lacks what experts need")
def test_experts_do_so() -> None:
    stock, fused = expert_models.pair("qwen3_moe")
    with _doubled(peft_layer.ParamWrapper, "forward")():
        found, expected = expert_models.results(fused), expert_models.results(stock)
    assert all(map(torch.equal, found.values(), expected.values()))
    experts = next(m for m in fused.modules() if hasattr(m, "_apply_gate"))
    assert form_of(experts) is not None
    with _doubled(functional, "silu")():
        assert form_of(experts) is None


def test_a_default_device_replaces_nothing() -> None:
    fused = accelerated_copy(peft_model())
    with torch.device("cpu"):
        run(fused, torch.randn(3, K))
    assert counted(fused) == (1, {})
    assert replaced() is None


def test_a_function_that_was_replaced_before_is_not_taken_for_the_original() -> None:
    forward = nn.Linear.forward
    assert own(forward, "torch.nn.modules.linear") is forward
    assert own(forward, "peft") is None
    with _doubled(nn.Linear, "forward")():
        assert own(nn.Linear.forward, "torch") is None
