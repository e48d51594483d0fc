"""The gates of modules of experts: which forms are found, and that they compute what the code
does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import machines
import pytest
import torch
from expert_models import FUSES, pair, wrappers
from machines import started
from torch import Tensor, nn

from bench.instruments.accuracy import assert_models_agree
from lora_fast.backends.torch_gates import GluForm, GluGate
from lora_fast.gated import ACTIVATIONS, Activation
from lora_fast.peft_layers.expert_gates import form_of

LIMITS = {"limit": 1.5, "swiglu_limit": 1.5, "alpha": 1.7, "swiglu_alpha": 1.7}
HALVES = GluForm("silu", limit=1.5)
SHIFTED = GluForm("silu", limit=1.5, alpha=1.7, shift=1.0)


def _experts(gate: Callable[..., Tensor], act_fn: nn.Module | None = None, **held: Any) -> Any:
    module = type("Experts", (nn.Module,), {"_apply_gate": gate})()
    if act_fn is not None:
        module.act_fn = act_fn
    for name, value in {**LIMITS, **held}.items():
        setattr(module, name, value)
    return module


def _of_model(model: str, cls: str) -> Callable[..., Tensor]:
    """The gate of a class of transformers."""
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    gate = getattr(getattr(module, cls, None), "_apply_gate", None)
    if gate is None:
        pytest.skip(f"transformers without the gate of {cls}")
    found: Callable[..., Tensor] = gate
    return found


def _default() -> Any:
    """That of experts without one of their own, from transformers 5."""
    return pytest.importorskip("transformers.integrations.moe")._default_apply_gate


def assert_computes(module: Any, form: GluForm) -> None:
    """The gate and its gradient, in float64: some numbers are beyond the limits."""
    rows = torch.randn(50, 12, dtype=torch.float64).mul_(2).requires_grad_()
    h = module._apply_gate(rows)
    dh = torch.randn_like(h)
    (expected,) = torch.autograd.grad(h, rows, dh)
    gate = GluGate(form)
    rebuilt, vjp = gate.rebuilt(rows.detach())
    for actual, wanted in ((gate.forward(rows.detach()), h), (rebuilt, h), (vjp(dh), expected)):
        torch.testing.assert_close(actual, wanted.detach())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_default_gate(activation: Activation) -> None:
    from transformers.activations import ACT2FN

    name = {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)
    module, form = _experts(_default(), ACT2FN[name]), GluForm(activation)
    assert form_of(module) == form
    assert_computes(module, form)


@pytest.mark.parametrize(
    ("model", "cls", "expected"),
    [
        ("gpt_oss", "GptOssExperts", SHIFTED._replace(interleaved=True)),
        ("minimax_m3_vl", "MiniMaxM3VLExperts", SHIFTED),
        ("deepseek_v4", "DeepseekV4Experts", HALVES),
        # The limit of what the activation gives is another function.
        ("step3p7", "Step3p7Experts", None),
    ],
)
def test_gates_of_transformers(model: str, cls: str, expected: GluForm | None) -> None:
    module = _experts(_of_model(model, cls), nn.SiLU())
    assert form_of(module) == expected
    if expected is not None:
        assert_computes(module, expected)


def test_limits_are_read_at_each_call() -> None:
    module = _experts(_of_model("gpt_oss", "GptOssExperts"))
    for limit in (7.0, 2):
        module.limit = limit
        assert form_of(module) == SHIFTED._replace(interleaved=True, limit=float(limit))


def _halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.chunk(2, dim=-1)  # type: ignore[return-value]


silu = torch.nn.functional.silu
# Code that is close to a form, and is none.
OTHERS: dict[str, Callable[..., Any]] = {
    "up first": lambda self, rows: silu(rows.chunk(2, dim=-1)[1]) * rows.chunk(2, dim=-1)[0],
    "gate twice": lambda self, rows: silu(rows.chunk(2, dim=-1)[0]) * rows.chunk(2, dim=-1)[0],
    "no activation": lambda self, rows: rows.chunk(2, dim=-1)[0] * rows.chunk(2, dim=-1)[1],
    "halves of rows": lambda self, rows: silu(rows.chunk(2, dim=0)[0]) * rows.chunk(2, dim=0)[1],
    "one limit": lambda self, rows: (
        silu(rows.chunk(2, dim=-1)[0].clamp(max=self.limit)) * rows.chunk(2, dim=-1)[1]
    ),
    "other limits": lambda self, rows: (
        silu(rows.chunk(2, dim=-1)[0].clamp(max=2.0)) * rows.chunk(2, dim=-1)[1].clamp(-1.0, 2.0)
    ),
    "limit below": lambda self, rows: (
        silu(rows.chunk(2, dim=-1)[0].clamp(-2.0, 2.0)) * rows.chunk(2, dim=-1)[1].clamp(-2.0, 2.0)
    ),
    "scaled": lambda self, rows: silu(rows.chunk(2, dim=-1)[0]) * rows.chunk(2, dim=-1)[1] * 2.0,
    "by values": lambda self, rows: rows if rows.sum() > 0 else silu(rows),
    "a tensor": lambda self, rows: silu(rows.chunk(2, dim=-1)[0] * self.table),
    "a helper": lambda self, rows: silu(_halves(rows)[0]) * _halves(rows)[1],
}


def test_a_limit_that_may_be_none() -> None:
    def gate(self: Any, rows: Tensor) -> Tensor:
        first, second = rows.chunk(2, dim=-1)
        if self.limit is not None:
            first, second = first.clamp(max=self.limit), second.clamp(-self.limit, self.limit)
        return silu(first) * second

    assert form_of(_experts(gate)) == HALVES
    assert form_of(_experts(gate, limit=None)) == GluForm("silu")


def test_code_of_ones_own() -> None:
    def gate(self: Any, rows: Tensor) -> Tensor:
        first, second = torch.chunk(rows, 2, -1)
        return second * (torch.sigmoid(first) * first)

    assert form_of(_experts(gate)) == GluForm("silu")


@pytest.mark.parametrize("name", OTHERS)
def test_other_gates_are_those_of_their_module(name: str) -> None:
    assert form_of(_experts(OTHERS[name], table=torch.ones(3))) is None


def test_a_replaced_gate_or_activation_is_seen() -> None:
    module = _experts(_default(), nn.SiLU())
    assert form_of(module) == GluForm("silu")
    module.act_fn = nn.Tanh()
    assert form_of(module) is None
    module.act_fn = nn.SiLU(inplace=True)
    assert form_of(module) is None
    module.act_fn = nn.GELU()
    assert form_of(module) == GluForm("gelu")
    module.act_fn.forward = torch.tanh
    assert form_of(module) is None
    module.act_fn = nn.SiLU()
    module._apply_gate = lambda rows: rows
    assert form_of(module) is None


needs_fused = pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags")


@needs_fused
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("qwen3_moe", GluForm("silu")),
        ("gpt_oss", GluForm("silu", interleaved=True, limit=7.0, alpha=1.702, shift=1.0)),
    ],
)
def test_models_take_the_kernels_of_the_gate(family: str, form: GluForm) -> None:
    stock, fused = pair(family)
    (wrapper, *_), plain = wrappers(fused), wrappers(stock)[0]
    state, _ = wrapper.active()
    assert state.gate.form == form
    x, w, index = torch.randn(6, state.first.weight.shape[2]), torch.rand(6, 2), [[0, 1], [3, 0]]
    top_k_index = torch.tensor(index * 3)
    with started(machines.interpreter()) as machine, machine.counting_launches() as names:
        y = wrapper(x.requires_grad_(), top_k_index, w)
        y.sum().backward()
    assert "expert_gate_forward" in names and "expert_gate_gradients" in names
    grads = {"y": y.detach(), "x": x.grad}
    x.grad = None
    expected = plain(x, top_k_index, w)
    expected.sum().backward()
    assert_models_agree(grads, {"y": expected.detach(), "x": x.grad})
