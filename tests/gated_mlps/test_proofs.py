"""A proof of a forward holds as long as what it relies on stays."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from gated_models import (
    ByMethod,
    Parts,
    Split,
    agree,
    counts,
    linears_of,
    stock_model,
)
from gated_models import (
    GatedMLP as ModelMLP,
)
from lora_models import accelerated_copy
from torch import Tensor, nn

from lora_fast.gated_mlps.discovery import GatedMLP, prove

SILU = GatedMLP("silu", "gate", "up", "down")
SCALE = 1.0


def act_is_gelu(module: Any) -> None:
    module.act = nn.GELU()


def forward_is_replaced(module: Any) -> None:
    module.forward = MethodType(lambda self, x: x, module)


def forward_of_class_is_replaced(module: Any) -> None:
    type(module).forward = lambda self, x: x


def method_is_replaced(module: Any) -> None:
    module.gated = lambda x: x


def forward_of_activation_is_replaced(module: Any) -> None:
    module.act.forward = lambda x: x


@pytest.mark.parametrize(
    "change",
    [
        act_is_gelu,
        forward_is_replaced,
        forward_of_class_is_replaced,
        method_is_replaced,
        forward_of_activation_is_replaced,
    ],
)
def test_what_a_proof_relies_on_may_change(change: Any) -> None:
    class Own(ByMethod):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gated(x))

    module = Own()
    proof = prove(module, linears_of(module))
    assert proof.mlp == SILU
    assert proof.holds(module)
    assert not proof.holds(copy.deepcopy(module))
    change(module)
    assert not proof.holds(module)
    expected = SILU._replace(activation="gelu") if change is act_is_gelu else None
    assert prove(module, linears_of(module)).mlp == expected


@pytest.mark.parametrize(
    ("act", "name"), [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.ReLU(), "relu")]
)
def test_a_function_of_torch_may_be_replaced(
    act: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = stock_model(mlp=ModelMLP(act))
    fused = accelerated_copy(stock)
    agree(fused, stock)
    monkeypatch.setattr(nn.functional, name, lambda x, *_, **__: torch.tanh(x))
    agree(fused, stock)
    assert counts(fused)[0] == 1
    monkeypatch.undo()
    agree(fused, stock)
    assert counts(fused)[0] == 2


class OfConfig(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if self.config.pretraining.tp > 1 or self.sparsity > SCALE:
            return x
        return super().forward(x)


@pytest.mark.parametrize("changed", ["config", "attribute", "global"])
def test_a_condition_may_change(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = OfConfig()
    proof = prove(module, linears_of(module))
    assert proof.mlp == SILU
    if changed == "config":
        module.config.pretraining.tp = 2
    elif changed == "attribute":
        module.sparsity = 2.0
    else:
        monkeypatch.setitem(globals(), "SCALE", -1.0)
    assert not proof.holds(module)
    assert prove(module, linears_of(module)).mlp is None


def test_linears_are_read_at_each_call_and_no_part_of_a_proof() -> None:
    module: Any = Parts()
    proof = prove(module, linears_of(module))
    module.gate = nn.Linear(4, 6)
    assert proof.holds(module)
    module = Split()
    proof = prove(module, linears_of(module))
    module.gate_up = nn.Linear(4, 14)  # its width was read
    assert not proof.holds(module)
    assert prove(module, linears_of(module)).mlp is None


def liger_class(name: str) -> Any:
    """A forward that calls a kernel, in the module and under the name of Liger's."""

    def forward(self: Any, x: Tensor) -> Tensor:
        raise AssertionError("runs on a GPU")

    forward.__module__, forward.__qualname__ = "liger_kernel.transformers.swiglu", f"{name}.forward"
    return forward


@pytest.mark.parametrize("on_instance", [True, False])
@pytest.mark.parametrize(
    ("name", "mlp"),
    [
        ("LigerSwiGLUMLP", GatedMLP("silu", "gate_proj", "up_proj", "down_proj")),
        ("LigerGEGLUMLP", GatedMLP("gelu_tanh", "gate_proj", "up_proj", "down_proj")),
        ("LigerPhi3SwiGLUMLP", GatedMLP("silu", "gate_up_proj", None, "down_proj")),
        ("LigerUnknown", None),
    ],
)
def test_liger_is_known_by_its_class(name: str, mlp: GatedMLP | None, on_instance: bool) -> None:
    class Patched(nn.Module):
        forward = liger_class(name)

    module = Parts() if on_instance else Patched()
    if on_instance:
        module.forward = MethodType(liger_class(name), module)  # type: ignore[method-assign]
    assert prove(module, linears_of(module)).mlp == mlp
