"""A small model with one gated MLP, stock PEFT's and accelerated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from lora_models import compare, peft_model
from torch import Tensor, nn

import lora_fast
from lora_fast.acceleration.report import MLPReport

H, WIDTH = 16, 40
NAMES = ("gate_proj", "up_proj", "down_proj")


class GatedMLP(nn.Module):
    """Ragged, with a bias of up and of down."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(H, WIDTH, bias=False)
        self.up_proj, self.down_proj = nn.Linear(H, WIDTH), nn.Linear(WIDTH, H)
        self.act_fn = nn.SiLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class BothInOne(nn.Module):
    """gate and up in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(H, 2 * WIDTH), nn.Linear(WIDTH, H)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * nn.functional.gelu(gate, approximate="tanh"))


class Parts(nn.Module):
    """The parts of a gated MLP; a subclass has the forward."""

    def __init__(self, act: Any = None, width: int = 6) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, width), nn.Linear(4, width)
        self.down, self.gate_up = nn.Linear(width, 4), nn.Linear(4, 2 * width)
        self.act = nn.SiLU() if act is None else act
        self.width, self.sparsity, self.calls = width, 0.0, 0
        self.config = SimpleNamespace(pretraining=SimpleNamespace(tp=1), parts=[])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class ByMethod(Parts):
    """By a property and a method of its own."""

    @property
    def activation(self) -> Any:
        return self.act

    def gated(self, x: Tensor) -> Tensor:
        return self.activation(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gated(x))


class Split(Parts):
    """By one layer, whose rows are split."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).split(self.width, dim=-1)
        return self.down(up * nn.functional.silu(gate))


class Model(nn.Module):
    """The MLP in a model."""

    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.mlp = GatedMLP() if mlp is None else mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def stock_model(kind: str = "dense", *, mlp: nn.Module | None = None, **options: Any) -> Any:
    """A stock PEFT model in evaluation mode, every linear layer adapted unless `options` say."""
    torch.manual_seed(0)
    options.setdefault("target_modules", r".*_proj")
    return peft_model(kind, model=Model(mlp), **options).eval()


def liger_forward() -> Any:
    """A forward in the module and under the name of Liger's, which is a kernel there."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(h)

    forward.__module__ = "liger_kernel.transformers.swiglu"
    forward.__qualname__ = "LigerSwiGLUMLP.forward"
    return forward


def mlp_of(model: Any) -> Any:
    return next(m for name, m in model.named_modules() if name.rpartition(".")[2] == "mlp")


def layer_of(model: Any, name: str) -> Any:
    return mlp_of(model)._modules[name]


def reported(model: Any) -> MLPReport:
    """What the report says of the MLP."""
    (found,) = lora_fast.report(model).mlps
    return found


def counts(model: Any) -> tuple[int, dict[str, int]]:
    """Calls of the MLP as one operation, and of its own forward by reason."""
    found = reported(model)
    return found.fused_calls, found.fallback_calls


def linears_of(module: nn.Module) -> dict[str, Any]:
    return {n: c for n, c in module._modules.items() if isinstance(c, nn.Linear)}


def agree(fused: Any, stock: Any, x: Tensor | None = None) -> None:
    x = torch.randn(3, 5, H) if x is None else x
    compare(fused, stock, x, compute_dtype=torch.float32, layers=3)
