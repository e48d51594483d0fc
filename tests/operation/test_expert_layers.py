"""Experts with adapters, against the reference in float64: every gradient, every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_checks import GATES, INNER, TRAINED, E, H, R, block, check, operands, run
from torch import Tensor

from bench.instruments.accuracy import (
    assert_all_accurate,
    assert_same_bits,
    orders,
)
from bench.instruments.saved_tensors import SavedTensors
from lora_fast import reference
from lora_fast.backends import torch_grouped
from lora_fast.backends.torch_gates import GluForm
from lora_fast.experts.nf4_experts import NF4Experts
from lora_fast.experts.operands import Projection
from lora_fast.functional import adapted_experts, experts_block
from lora_fast.nf4 import NF4Weight


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_block_of_every_layout(gate: str, transposed: bool) -> None:
    values = operands(GATES[gate][2], 11, 2, transposed=transposed, bias=transposed)
    assert {0, 1, 2, 4} == set(values[1].unique().tolist())  # 3 has no rows, 4 one
    assert int((values[1] == 4).sum()) == 1
    check(values, gate)


@pytest.mark.parametrize(
    ("tokens", "k", "r"), [(1, 1, 1), (7, 3, 16), (40, 2, 64)], ids=lambda value: str(value)
)
def test_tokens_choices_and_ranks(tokens: int, k: int, r: int) -> None:
    check(operands(2 * INNER, tokens, k, transposed=False, bias=True, r=r), "silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    check(operands(2 * INNER, 24, 2, transposed=False, bias=True), "silu", dtype)


def test_no_tokens() -> None:
    values = operands(2 * INNER, 0, 2, transposed=False, bias=True)
    found = run(
        lambda x, i, w, a, b: experts_block(x, i, w, Projection(**a), Projection(**b)),
        values, torch.float32,
    )  # fmt: skip
    assert found["y"].shape == (0, H)
    assert not found["first.A"].any() and not found["second.B"].any()


def test_equal_bits_and_inputs_unchanged() -> None:
    values = operands(2 * INNER, 30, 2, transposed=True, bias=True)
    before = [v.clone() for v in values[:3]]
    once, again = (run(block, values, torch.float32) for _ in range(2))
    for key, expected in once.items():
        assert_same_bits(again[key], expected, name=key)
    for v, old in zip(values[:3], before, strict=True):
        assert_same_bits(v, old, name="input")


def test_an_index_beyond_the_experts_names_none() -> None:
    x, index, w, first, second = operands(2 * INNER, 6, 2, transposed=False, bias=True)
    index[2] = E
    check((x, index, w, first, second), "silu")
    found = run(block, (x, index, w, first, second), torch.float32)
    assert not found["y"][2].any() and not found["x"][2].any() and not found["w"][2].any()


@pytest.mark.parametrize("trains", TRAINED)
def test_what_does_not_train_gets_no_gradient(trains: str) -> None:
    values = operands(2 * INNER, 9, 2, transposed=False, bias=True)
    everything = run(block, values, torch.float32)
    leaves: dict[str, Tensor] = {}

    def one(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
        named = {"x": x, "w": w}
        for name, factors in (("first", first), ("second", second)):
            named |= {f"{name}.{key}": factors[key] for key in ("bias", "A", "B")}
        for key, t in named.items():
            leaves[key] = t.requires_grad_(key == trains)
        return block(x, index, w, first, second)

    found = run(one, values, torch.float32)
    assert_same_bits(found[trains], everything[trains], name=trains)
    assert all(t.grad is None for key, t in leaves.items() if key != trains)


def test_what_is_saved() -> None:
    """x, the rows before the gate, the routing and S; no tensor of all experts' weights beside the
    frozen ones, no h, no output of an expert."""
    values = operands(2 * INNER, 16, 2, transposed=False, bias=False)
    x, index, w, first, second = values
    trained = [x, w, first["A"], first["B"], second["A"], second["B"]]
    for t in trained:
        t.requires_grad_()
    with SavedTensors([*trained, first["weight"], second["weight"]]) as saved:
        block(x, index, w, first, second)
    places = index.numel()
    assert saved.elements(floating=True) == places * (2 * INNER + 2 * R)
    assert saved.elements(floating=False) == 2 * places + E


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The way of a GPU, on a CPU, and the calls of it."""
    calls: list[str] = []
    product = torch_grouped._grouped
    if product is None:
        pytest.skip("this torch has no grouped products")

    def counted(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
        calls.append("product")
        made = product(a, b, offs=offs)
        if b.dim() == 3 and offs[-1] < a.shape[0]:  # as on a GPU: nobody writes these rows
            made[int(offs[-1]) :] = float("nan")
        return made

    monkeypatch.setattr(torch_grouped, "_grouped", counted)
    monkeypatch.setattr(torch_grouped, "takes", torch_grouped.fits)
    return calls


@pytest.mark.parametrize("gate", ["silu", "own"])
@pytest.mark.parametrize("beyond", [False, True])
def test_all_experts_in_each_call(gate: str, beyond: bool, grouped: list[str]) -> None:
    """On a GPU, in bfloat16; a rank that is no multiple of 8, experts without rows, and rows that
    belong to no expert."""
    values = operands(48, 20, 3, transposed=gate == "own", bias=True, r=5, hidden=16, inner=24)
    if beyond:
        values[1][4:7] = E
    check(values, gate, torch.bfloat16)
    # Forward: base, shrink and expand of both. Backward: base, dS and dS A, and three gradients.
    assert len(grouped) == 2 * 3 + 2 * (3 + 3)


def test_all_experts_in_nf4(grouped: list[str]) -> None:
    """Decoded into a workspace: the bits of the dense weight."""
    x, index, w, first, second = operands(
        64, 12, 2, transposed=False, bias=False, hidden=16, inner=32
    )
    for factors in (first, second):
        dense = factors["weight"].bfloat16()
        matrix = NF4Weight.from_dense(dense.reshape(-1, dense.shape[2]))
        matrix.quant_state.shape = dense.shape
        factors["weight"] = NF4Experts(matrix.packed, matrix.quant_state)
    decoded = [{**f, "weight": f["weight"].dequantize()} for f in (first, second)]
    for t in (first, second, *decoded):
        t |= {key: t[key].bfloat16() for key in ("A", "B")}
    actual = block(x.bfloat16(), index, w, first, second)
    assert_same_bits(actual, block(x.bfloat16(), index, w, *decoded), name="y")
    assert grouped


def test_one_projection() -> None:
    x, _, _, first, _ = operands(2 * INNER, 12, 1, transposed=True, bias=True)
    offsets = torch.tensor([3, 3, 4, 9, 10], dtype=torch.int32)

    def run(call: Any, dtype: torch.dtype) -> dict[str, Any]:
        t = {key: v.detach().to(dtype).requires_grad_() for key, v in first.items()}
        t["weight"].requires_grad_(False)
        read = x.detach().to(dtype).requires_grad_()
        y = call(read, t["weight"], offsets, t["bias"], A=t["A"], B=t["B"], scaling=1.3)
        y.backward(torch.ones_like(y).cumsum(0).sin())
        return {"y": y.detach(), "x": read.grad, **{k: t[k].grad for k in ("bias", "A", "B")}}

    ref64 = run(reference.adapted_experts, torch.float64)
    eager = orders(lambda: run(reference.adapted_experts, torch.float32))
    actual = run(adapted_experts, torch.float32)
    assert_all_accurate(actual, ref64, eager)
    assert not actual["y"][10:].any() and not actual["x"][10:].any()


def test_nf4_is_the_decoded_weight() -> None:
    """Of both layouts, an expert at a time: the bits of the dense weight."""
    stored = torch.randn(4, 16, 8)
    matrix = NF4Weight.from_dense(stored.view(64, 8), blocksize=64)
    matrix.quant_state.shape = stored.shape
    for transposed in (False, True):
        weight = NF4Experts(matrix.packed, matrix.quant_state, transposed)
        dense = weight.dequantize()
        assert weight.shape == dense.shape == ((4, 8, 16) if transposed else (4, 16, 8))
        x = torch.randn(9, weight.shape[2])
        offsets = torch.tensor([2, 2, 8, 9])
        assert_same_bits(
            adapted_experts(x, weight, offsets), adapted_experts(x, dense, offsets), name="y"
        )


def test_differentiating_twice_raises() -> None:
    x, index, w, first, second = operands(2 * INNER, 4, 1, transposed=False, bias=False)
    y = block(x.requires_grad_(), index, w, first, second)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for asked in (None, [x]):
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward(inputs=asked, retain_graph=True)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(4, H, 1)}, ValueError, "hidden_states must have two dimensions"),
    ({"x": torch.zeros(4, H + 1)}, ValueError, f"hidden_states must have {H} features"),
    ({"index": torch.zeros(4, 1)}, TypeError, "top_k_index must be an int32 or int64 tensor"),
    ({"index": torch.zeros(3, 1).long()}, ValueError, "top_k_index must have shape"),
    ({"index": -torch.ones(4, 1).long()}, ValueError, "top_k_index must not be negative"),
    ({"w": torch.zeros(4, 2)}, ValueError, "top_k_weights must have the shape of top_k_index"),
    ({"first.A": None}, ValueError, "first.A must be given when first.B is"),
    ({"first.A": torch.zeros(E, R, H + 1)}, ValueError, "first.A must have shape"),
    ({"second.B": torch.zeros(E, R, H)}, ValueError, "second.B must have shape"),
    ({"second.bias": torch.zeros(E)}, ValueError, "second.bias must have shape"),
    ({"first.scaling": float("nan")}, ValueError, "scaling must be finite"),
    ({"first.weight": torch.zeros(E, 2, H).requires_grad_()}, ValueError, "must be frozen"),
    ({"first.weight": torch.zeros(2, H)}, ValueError, r"must have shape \[E, N, K\]"),
    ({"activation": "swish"}, ValueError, "activation must be one of"),
    ({"activation": 3}, TypeError, "activation must be a name, a GluForm or a function"),
    ({"activation": GluForm("swish")}, ValueError, "activation must be one of"),
    ({"gated": False, "activation": GluForm("relu")}, ValueError, "must have halves or pairs"),
    ({"gated": False, "activation": "relu"}, RuntimeError, "shape"),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_operands_that_do_not_fit(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, index, w, first, second = operands(2 * INNER, 4, 1, transposed=False, bias=False)
    named = {"x": x, "index": index, "w": w}
    named |= {f"first.{k}": v for k, v in first.items()}
    named |= {f"second.{k}": v for k, v in second.items()}
    named |= {k: v for k, v in changed.items() if k not in ("activation", "gated")}
    options = {k: v for k, v in changed.items() if k in ("activation", "gated")}
    parts = [
        Projection(**{k.split(".")[1]: v for k, v in named.items() if k.startswith(name)})
        for name in ("first.", "second.")
    ]
    with pytest.raises(error, match=message):
        experts_block(named["x"], named["index"], named["w"], *parts, **options)


@pytest.mark.parametrize("offsets", [[0, 2, 1, 4, 4], [0, 1, 2, 3, 5], [4, 4]])
def test_offsets_that_do_not_fit(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="expert_offsets must"):
        adapted_experts(torch.zeros(4, H), torch.zeros(E, 2, H), torch.tensor(offsets))
