"""Experts with adapters, against the reference in float64: every gradient, every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.instruments.accuracy import (
    assert_all_accurate,
    assert_as_close,
    assert_same_bits,
    orders,
)
from lora_fast import reference
from lora_fast.backends import torch_grouped
from lora_fast.experts.nf4_experts import NF4Experts
from lora_fast.experts.operands import Projection
from lora_fast.functional import adapted_experts, experts_block
from lora_fast.nf4 import NF4Weight

# Not powers of two; experts 0, 1, 2 have rows, 3 has none, 4 has one.
E, H, INNER, R = 5, 13, 9, 3
TRAINED = ("x", "w", "first.bias", "first.A", "first.B", "second.bias", "second.A", "second.B")


def _clamped(rows: Tensor) -> Tensor:
    """As in gpt_oss: interleaved, clamped, with a gate of its own."""
    gate, up = rows[..., ::2].clamp(max=0.5), rows[..., 1::2].clamp(-0.5, 0.5)
    return (up + 1) * gate * torch.sigmoid(gate * 1.7)


def _silu(rows: Tensor) -> Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def _interleaved_gelu(rows: Tensor) -> Tensor:
    return torch.nn.functional.gelu(rows[..., ::2], approximate="tanh") * rows[..., 1::2]


def _relu2(rows: Tensor) -> Tensor:
    return torch.nn.functional.relu(rows).square()


# (arguments of experts_block, the same gate for the reference, rows of the first projection)
GATES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor], int]] = {
    "silu": ({}, _silu, 2 * INNER),
    "own": ({"activation": _clamped}, _clamped, 2 * INNER),
    "interleaved": (
        {"activation": "gelu_tanh", "interleaved": True}, _interleaved_gelu, 2 * INNER
    ),
    "ungated": ({"activation": "relu2", "gated": False}, _relu2, INNER),
}  # fmt: skip


def _operands(
    P: int,
    tokens: int,
    k: int,
    *,
    transposed: bool,
    bias: bool,
    r: int = R,
    hidden: int = H,
    inner: int = INNER,
) -> Any:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    first = {"weight": draw(E, hidden, P).transpose(1, 2) if transposed else draw(E, P, hidden)}
    second = {
        "weight": draw(E, inner, hidden).transpose(1, 2) if transposed else draw(E, hidden, inner)
    }
    for factors, N, K in ((first, P, hidden), (second, hidden, inner)):
        factors["weight"] = factors["weight"] / K**0.5
        # B as PEFT stores it: [N, R, E], the experts fastest.
        factors |= {"A": draw(E, r, K) / K**0.5, "B": draw(N, r, E).permute(2, 0, 1)}
        factors["bias"] = draw(E, N) if bias else None
    # Experts 0, 1, 2 and, of one row alone, 4.
    choices = [torch.randperm(3, generator=generator)[:k] for _ in range(tokens)]
    index = torch.stack(choices) if tokens else torch.zeros(0, k, dtype=torch.int64)
    if tokens > 1:
        index[0, 0] = 4
    return draw(tokens, hidden), index, draw(tokens, k), first, second


def _run(call: Callable[..., Tensor], values: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The output and all gradients of a block, in `dtype`; weights, too, are rounded to it."""
    x, index, w, first, second = values
    leaves = {"x": x, "w": w}
    for name, factors in (("first", first), ("second", second)):
        leaves |= {f"{name}.{key}": t for key, t in factors.items()}
    leaves = {
        key: None if t is None else t.detach().to(dtype).requires_grad_(key in TRAINED)
        for key, t in leaves.items()
    }
    parts = [
        {key: leaves[f"{name}.{key}"] for key in ("weight", "bias", "A", "B")} | {"scaling": 0.7}
        for name in ("first", "second")
    ]
    y = call(leaves["x"], index, leaves["w"], *parts)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    y.backward(direction.to(dtype))
    grads = {key: t.grad for key, t in leaves.items() if t is not None and t.requires_grad}
    return {"y": y.detach(), **grads}


def _check(values: Any, gate: str, dtype: torch.dtype = torch.float32) -> None:
    """The accuracy rule in float32. In 16 bits results come through two rounded projections and a
    gate, as through a small model: no further from float64 than twice plain PyTorch."""
    options, plain, _ = GATES[gate]

    def fused(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
        return experts_block(x, index, w, Projection(**first), Projection(**second), **options)

    def specified(*arguments: Any) -> Tensor:
        return reference.experts_block(*arguments, plain)

    rounded = [_rounded(v, dtype) for v in values]
    actual, ref64 = _run(fused, rounded, dtype), _run(specified, rounded, torch.float64)
    eager = orders(lambda: _run(specified, rounded, dtype))
    if dtype is torch.float32:
        assert_all_accurate(actual, ref64, eager)
        return
    for key, expected in ref64.items():
        if expected is not None:
            assert_as_close(actual[key], expected, eager[key], name=key)


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(t, dtype) for key, t in value.items()}
    if value is None or not value.is_floating_point():
        return value
    return value.to(dtype).float()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_block_of_every_layout(gate: str, transposed: bool) -> None:
    values = _operands(GATES[gate][2], 11, 2, transposed=transposed, bias=transposed)
    assert {0, 1, 2, 4} == set(values[1].unique().tolist())  # 3 has no rows, 4 one
    assert int((values[1] == 4).sum()) == 1
    _check(values, gate)


@pytest.mark.parametrize(
    ("tokens", "k", "r"), [(1, 1, 1), (7, 3, 16), (40, 2, 64)], ids=lambda value: str(value)
)
def test_tokens_choices_and_ranks(tokens: int, k: int, r: int) -> None:
    _check(_operands(2 * INNER, tokens, k, transposed=False, bias=True, r=r), "silu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    _check(_operands(2 * INNER, 24, 2, transposed=False, bias=True), "silu", dtype)


def test_no_tokens() -> None:
    values = _operands(2 * INNER, 0, 2, transposed=False, bias=True)
    found = _run(
        lambda x, i, w, a, b: experts_block(x, i, w, Projection(**a), Projection(**b)),
        values, torch.float32,
    )  # fmt: skip
    assert found["y"].shape == (0, H)
    assert not found["first.A"].any() and not found["second.B"].any()


def _block(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
    return experts_block(x, index, w, Projection(**first), Projection(**second))


def test_equal_bits_and_inputs_unchanged() -> None:
    values = _operands(2 * INNER, 30, 2, transposed=True, bias=True)
    before = [v.clone() for v in values[:3]]
    once, again = (_run(_block, values, torch.float32) for _ in range(2))
    for key, expected in once.items():
        assert_same_bits(again[key], expected, name=key)
    for v, old in zip(values[:3], before, strict=True):
        assert_same_bits(v, old, name="input")


def test_an_index_beyond_the_experts_names_none() -> None:
    x, index, w, first, second = _operands(2 * INNER, 6, 2, transposed=False, bias=True)
    index[2] = E
    _check((x, index, w, first, second), "silu")
    found = _run(_block, (x, index, w, first, second), torch.float32)
    assert not found["y"][2].any() and not found["x"][2].any() and not found["w"][2].any()


@pytest.mark.parametrize("trains", TRAINED)
def test_what_does_not_train_gets_no_gradient(trains: str) -> None:
    values = _operands(2 * INNER, 9, 2, transposed=False, bias=True)
    everything = _run(_block, values, torch.float32)
    leaves: dict[str, Tensor] = {}

    def one(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
        named = {"x": x, "w": w}
        for name, factors in (("first", first), ("second", second)):
            named |= {f"{name}.{key}": factors[key] for key in ("bias", "A", "B")}
        for key, t in named.items():
            leaves[key] = t.requires_grad_(key == trains)
        return _block(x, index, w, first, second)

    found = _run(one, values, torch.float32)
    assert_same_bits(found[trains], everything[trains], name=trains)
    assert all(t.grad is None for key, t in leaves.items() if key != trains)


def test_what_is_saved() -> None:
    """x, the rows before the gate, the routing and S; no tensor of all experts' weights beside the
    frozen ones, no h, no output of an expert."""
    values = _operands(2 * INNER, 16, 2, transposed=False, bias=False)
    x, index, w, first, second = values
    trained = [x, w, first["A"], first["B"], second["A"], second["B"]]
    for t in trained:
        t.requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in trained}
    known |= {f["weight"].untyped_storage().data_ptr() for f in (first, second)}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _block(x, index, w, first, second)
    places = index.numel()
    floats = sum(t.numel() for t in saved.values() if t.is_floating_point())
    assert floats == places * (2 * INNER + 2 * R)
    assert sum(t.numel() for t in saved.values() if not t.is_floating_point()) == 2 * places + E


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
    values = _operands(48, 20, 3, transposed=gate == "own", bias=True, r=5, hidden=16, inner=24)
    if beyond:
        values[1][4:7] = E
    _check(values, gate, torch.bfloat16)
    # Forward: base, shrink and expand of both. Backward: base, dS and dS A, and three gradients.
    assert len(grouped) == 2 * 3 + 2 * (3 + 3)


def test_all_experts_in_nf4(grouped: list[str]) -> None:
    """Decoded into a workspace: the bits of the dense weight."""
    x, index, w, first, second = _operands(
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
    actual = _block(x.bfloat16(), index, w, first, second)
    assert_same_bits(actual, _block(x.bfloat16(), index, w, *decoded), name="y")
    assert grouped


def test_one_projection() -> None:
    x, _, _, first, _ = _operands(2 * INNER, 12, 1, transposed=True, bias=True)
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
    x, index, w, first, second = _operands(2 * INNER, 4, 1, transposed=False, bias=False)
    y = _block(x.requires_grad_(), index, w, first, second)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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
    ({"activation": 3}, TypeError, "activation must be a name or a function"),
    ({"gated": False, "activation": "relu"}, RuntimeError, "shape"),
]


@pytest.mark.parametrize(("changed", "error", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_operands_that_do_not_fit(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    x, index, w, first, second = _operands(2 * INNER, 4, 1, transposed=False, bias=False)
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
