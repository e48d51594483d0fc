"""Experts on the Triton backend: every result by the rule, the launches that they take, and that
nothing waits for the offsets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import machines
import pytest
import torch
from expert_checks import INNER, E, block, check, fused, operands, run
from machines import Executor, started
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.instruments.saved_tensors import SavedTensors

pytest.importorskip("triton")
import lora_fast
from bench.instruments import stub_driver
from bench.instruments.accuracy import (
    assert_accurate,
    assert_all_accurate,
    assert_same_bits,
    orders,
)
from lora_fast import reference
from lora_fast.backends.torch_gates import gate_of
from lora_fast.experts.nf4_experts import NF4Experts
from lora_fast.experts.operands import Projection
from lora_fast.functional import adapted_experts
from lora_fast.nf4 import NF4Weight
from lora_fast.operation import expert_layers

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def interpreter() -> Iterator[Executor]:
    with started(machines.interpreter()) as machine:
        yield machine


def _some(**changes: Any) -> Any:
    given: dict[str, Any] = {"tokens": 20, "k": 2, "transposed": False, "bias": True} | changes
    return operands(2 * INNER, **given)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("changes", "gate", "dtype"),
    [
        pytest.param({}, "silu", FP32, id="plain"),
        pytest.param({"transposed": True, "bias": False}, "interleaved", FP32, id="transposed"),
        pytest.param({"tokens": 1, "k": 1, "r": 1}, "own", FP32, id="one row"),
        pytest.param({"k": 3, "r": 100}, "silu", FP32, id="rank 100"),
        pytest.param({"r": 16}, "silu", BF16, id="bfloat16"),
        pytest.param({}, "own", FP16, id="own gate, float16"),
        pytest.param({}, "clamped", BF16, id="clamped"),
        pytest.param({}, "clamped", FP16, id="clamped, float16"),
    ],
)
def test_a_block(
    interpreter: Executor, changes: dict[str, Any], gate: str, dtype: torch.dtype
) -> None:
    check(_some(**changes), gate, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("plain", [3, 4], ids=["first", "second"])
def test_a_projection_without_an_adapter(
    interpreter: Executor, plain: int, dtype: torch.dtype
) -> None:
    values = list(_some(tokens=8, bias=False))
    values[plain] = {**values[plain], "A": None, "B": None}
    check(values, "silu", dtype)


@pytest.mark.interpreter
def test_rows_of_no_expert(interpreter: Executor) -> None:
    x, index, w, first, second = _some(tokens=8)
    index[2] = E
    check((x, index, w, first, second), "silu")
    found = run(block, (x, index, w, first, second), FP32)
    assert not found["y"][2].any() and not found["x"][2].any() and not found["w"][2].any()


@pytest.mark.interpreter
def test_no_tokens(interpreter: Executor) -> None:
    found = run(block, _some(tokens=0), FP32)
    assert found["y"].shape[0] == 0
    assert not found["first.A"].any() and not found["second.bias"].any()


@pytest.mark.interpreter
@pytest.mark.parametrize("trains", [("w", "first.A"), ("x", "second.B")])
def test_what_does_not_train_gets_no_gradient(
    interpreter: Executor, trains: tuple[str, ...]
) -> None:
    values = _some(tokens=8)
    everything = run(block, values, FP32)
    found = run(block, values, FP32, trains)
    for name, value in found.items():
        assert_same_bits(value, everything[name], name=name)
    assert found.keys() == {"y", *trains}


@pytest.mark.interpreter
def test_one_projection(interpreter: Executor) -> None:
    x, _, _, first, _ = _some(tokens=12)
    offsets = torch.tensor([3, 3, 4, 9, 10])

    def of_dtype(call: Any, dtype: torch.dtype) -> dict[str, Any]:
        t = {key: v.detach().to(dtype).requires_grad_() for key, v in first.items()}
        t["weight"].requires_grad_(False)
        read = x.detach().to(dtype).requires_grad_()
        y = call(read, t["weight"], offsets, t["bias"], A=t["A"], B=t["B"], scaling=1.3)
        y.backward(torch.ones_like(y).cumsum(0).sin())
        return {"y": y.detach(), "x": read.grad, **{k: t[k].grad for k in ("bias", "A", "B")}}

    with interpreter.counting_launches() as names:
        actual = of_dtype(adapted_experts, FP32)
    ref64 = of_dtype(reference.adapted_experts, torch.float64)
    assert_all_accurate(actual, ref64, orders(lambda: of_dtype(reference.adapted_experts, FP32)))
    assert not actual["y"][10:].any() and not actual["x"][10:].any()
    # Beside the products with W: S, the rest of y; dS, the rest of dX, dB with dbias, dA.
    assert names == [
        "expert_shrink", "expert_product", "expert_shrink", "expert_product",
        "expert_gradients", "expert_gradients",
    ]  # fmt: skip


@pytest.mark.interpreter
def test_a_bias_whose_columns_lie_apart(interpreter: Executor) -> None:
    x, _, _, first, _ = _some(tokens=6)
    offsets, bias = torch.tensor([2, 2, 4, 6, 6]), first["bias"].detach()
    apart = bias.t().contiguous().t()
    assert apart.stride(1) != 1
    expected, found = (
        adapted_experts(x, first["weight"], offsets, b, A=first["A"], B=first["B"])
        for b in (bias, apart)
    )
    assert_same_bits(found.detach(), expected.detach(), name="y")


DENSE, WIDE = "nf4_decode", "nf4_decode_augmented"


def _in_nf4(factors: dict[str, Any], transposed: bool) -> dict[str, Any]:
    stored = factors["weight"].mT.contiguous() if transposed else factors["weight"]
    matrix = NF4Weight.from_dense(stored.reshape(-1, stored.shape[2]))
    matrix.quant_state.shape = stored.shape
    return {**factors, "weight": NF4Experts(matrix.packed, matrix.quant_state, transposed)}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("gate", "transposed", "decodes"),
    [
        pytest.param("silu", False, [DENSE, WIDE, DENSE, WIDE], id="kernels"),
        pytest.param("silu", True, [DENSE, WIDE, DENSE, WIDE], id="kernels, transposed"),
        pytest.param("own", True, [WIDE, WIDE, DENSE, DENSE], id="module, transposed"),
    ],
)
def test_nf4(interpreter: Executor, gate: str, transposed: bool, decodes: list[str]) -> None:
    """Each weight is decoded once in forward and once in backward; where a launch before the
    product makes its rows, [W | s · B] for [x | S], and [W ; A] for [du | dS]."""
    x, index, w, *both = operands(64, 6, 2, transposed=False, bias=False, hidden=16, inner=32)
    values = (x, index, w, *(_in_nf4(f, transposed) for f in both))
    with interpreter.counting_launches() as names:
        check(values, gate)
    assert [name for name in names if "nf4" in name] == decodes
    # The low rank is added to nothing in memory, but around a gate that its module computes.
    assert names.count("expert_product") == decodes[2:].count(DENSE) * (gate == "own")


@pytest.mark.interpreter
def test_one_projection_in_nf4(interpreter: Executor) -> None:
    x, _, _, first, _ = operands(64, 9, 1, transposed=False, bias=False, hidden=16, inner=32)
    offsets = torch.tensor([2, 2, 3, 7, 7])
    packed = _in_nf4(first, False)
    weights = packed["weight"], packed["weight"].dequantize()
    with interpreter.counting_launches() as names:
        y = adapted_experts(x, weights[0], offsets, A=first["A"], B=first["B"], scaling=0.7)
    assert names[:2] == ["expert_shrink", "nf4_decode_augmented"]
    results = [
        reference.adapted_experts(
            x.to(t), weights[1].to(t), offsets, A=first["A"].to(t), B=first["B"].to(t), scaling=0.7
        )
        for t in (torch.float64, FP32)
    ]
    assert_accurate(y, *results, name="y")


# By the dtype and the gate: the kernels of the gate have registers for it, or not, or a module
# computes it, which has its own launches beside these.
FORWARD = {
    "kernels": [
        "expert_shrink",  # rows by expert, S1
        "expert_gate_forward",  # h, S2
        "expert_product",  # the low rank and the bias of y
        "expert_scatter",
    ],
    "module": [
        "expert_shrink",
        "expert_product",  # the low rank and the bias of u
        "expert_shrink",  # S2
        "expert_product",
        "expert_scatter",
    ],
}
_BEFORE = [
    "expert_shrink",  # dy by expert, dS2, the bias's part of dw
    "expert_gradients",  # dB2, dbias2
]
_AFTER = [
    "expert_product",  # the low rank of dx
    "expert_gradients",  # dB1, dbias1
    "expert_gradients",  # dA1
    "expert_scatter",  # dx
]
BACKWARD = {
    "strips": [
        *_BEFORE,
        "expert_gate_backward",  # du, dA2, dB1
        "expert_sums",  # dS1, dw
        *_AFTER,  # with dbias1 alone
    ],
    "tiles": [
        *_BEFORE,
        "expert_gate_gradients",  # du, w h
        "expert_sums",  # dw
        "expert_gradients",  # dA2
        "expert_shrink",  # dS1
        *_AFTER,
    ],
    "module": [
        *_BEFORE,
        "expert_product",  # the low rank of v
        "expert_sums",  # dw
        "expert_gradients",  # dA2
        "expert_shrink",  # dS1
        *_AFTER,
    ],
}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("gate", "dtype", "forward", "backward"),
    [
        pytest.param("silu", BF16, "kernels", "strips", id="strips"),
        pytest.param("clamped", FP32, "kernels", "tiles", id="tiles"),
        pytest.param("own", FP32, "module", "module", id="module"),
    ],
)
def test_launches(
    interpreter: Executor, gate: str, dtype: torch.dtype, forward: str, backward: str
) -> None:
    values, call = _some(), fused(gate)
    with interpreter.counting_launches() as names:
        once = run(call, values, dtype)
    assert names == [*FORWARD[forward], *BACKWARD[backward]]
    for name, value in run(call, values, dtype).items():
        assert_same_bits(value, once[name], name=name)


@pytest.mark.interpreter
def test_without_trained_biases_nothing_reads_du_but_for_dx_and_dS(interpreter: Executor) -> None:
    values, trains = _some(bias=False), ("x", "w", "first.A", "first.B", "second.A", "second.B")
    with interpreter.counting_launches() as names:
        run(block, values, BF16, trains)
    launches = [*FORWARD["kernels"], *BACKWARD["strips"]]
    launches.remove("expert_gradients")
    assert sorted(names) == sorted(launches)


@pytest.mark.interpreter
def test_what_is_saved(interpreter: Executor) -> None:
    """x, the rows before the gate, the routing and S; no h, no rows of x, no output of an
    expert."""
    x, index, w, first, second = _some(bias=False)
    trained = [x, w, first["A"], first["B"], second["A"], second["B"]]
    for t in trained:
        t.requires_grad_()
    with SavedTensors([*trained, first["weight"], second["weight"]]) as saved:
        block(x, index, w, first, second)
    places, R = index.numel(), first["A"].shape[1]
    assert saved.elements(floating=True) == places * (2 * INNER + 2 * R)
    assert saved.elements(floating=False) == 2 * places + E


@pytest.mark.offline
@pytest.mark.parametrize(("arch", "dtype"), [(90, BF16), (80, BF16), (90, FP16)], ids=str)
def test_nothing_waits_for_the_offsets(arch: int, dtype: torch.dtype) -> None:
    """Tensors without data: reading a value of one raises. The products are torch's where these
    are one launch."""
    shapes = {"tokens": 256, "k": 2, "r": 16, "hidden": 64, "inner": 32}
    x, index, w, *both = operands(64, transposed=False, bias=True, **shapes)
    values = [t.to("meta") for t in (x, index, w)]
    values += [{name: t.to("meta") for name, t in factors.items()} for factors in both]

    def call(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
        layers = Projection(**first), Projection(**second)
        return expert_layers.block(x, index, w, *layers, gate_of("silu"))

    with stub_driver.recording(arch) as log, lora_fast.set_backend("triton"):
        found = run(call, values, dtype)
    assert all(t.is_meta for t in found.values())
    products = [launch for launch in log.launches if launch.arguments.get("x_ptr") is not None]
    own = [launch for launch in products if launch.name.startswith("expert_product")]
    assert len(own) == (0 if (arch, dtype) == (90, BF16) else 4)


class _Made(TorchDispatchMode):
    """The elements of every tensor that is made, and not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and func._schema.returns[0].alias_info is None:
            self.elements.append(made.numel())
        return made


@pytest.mark.offline
@pytest.mark.parametrize("stored", [BF16, FP32], ids=str)
def test_what_a_layer_of_qwen3_makes_and_saves(stored: torch.dtype) -> None:
    """Qwen3-30B-A3B, 8192 tokens: no tensor is as large as a projection of all experts, not where W
    has another dtype either, and saved are x, the rows before the gate, S and the routing."""
    experts, hidden, inner, tokens, k, R = 128, 2048, 768, 8192, 8, 16

    def made(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def projection(N: int, K: int) -> Projection:
        A, B = made(experts, R, K, dtype=FP32), made(N, R, experts, dtype=FP32).permute(2, 0, 1)
        trained = A.requires_grad_(), B.requires_grad_()
        return Projection(made(experts, N, K, dtype=stored), None, *trained, 2.0)

    x, w = made(tokens, hidden).requires_grad_(), made(tokens, k, dtype=FP32).requires_grad_()
    index = made(tokens, k, dtype=torch.int64)
    layers = projection(2 * inner, hidden), projection(hidden, inner)
    known = [x, w, *(t for p in layers for t in p if isinstance(t, Tensor))]
    with stub_driver.recording(90), lora_fast.set_backend("triton"), _Made() as found:
        with SavedTensors(known) as saved:
            out = expert_layers.block(x, index, w, *layers, gate_of("silu"))
        out.backward(made(tokens, hidden))
    rows = tokens * k
    assert max(found.elements) == rows * hidden < experts * 2 * inner * hidden
    assert saved.elements(floating=True) == rows * (2 * inner + 2 * R)
    assert saved.elements(floating=False) == 2 * rows + experts


def test_compiled_code(typical_executor: Executor) -> None:
    values = operands(32, 12, 2, transposed=False, bias=True, r=16, hidden=32, inner=16)
    values = [v.to(typical_executor.device) if isinstance(v, Tensor) else v for v in values]
    check(values, "silu", BF16)
