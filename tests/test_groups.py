"""Several layers that read the same x, computed together: adapted_linears."""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_all_accurate, assert_same_bits, orders
from equation import lay_out
from machines import interpreter, started

from lora_fast import NF4Weight, reference
from lora_fast.functional import Member, adapted_linears
from lora_fast.operation import dispatch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = ((72, 5), (40, 16), (136, 8))


def make(
    dtype, adapter, nf4, M=37, K=64, device="cpu", trains=("x", "A", "B"), dY_layout="contiguous"
):
    """x, members and their dY; adapter and nf4 are those of all members, or one for each."""
    torch.manual_seed(0)
    adapters, packed = _each(adapter), _each(nf4)

    def randn(*shape, of=dtype):
        return torch.randn(shape).to(of).to(device)

    x = randn(M, K).requires_grad_("x" in trains)
    members = []
    for i, (N, R) in enumerate(SIZES):
        weight = randn(N, K)
        bias = randn(N).requires_grad_("bias" in trains) if i != 1 else None
        A, B = randn(R, K, of=adapters[i]), randn(N, R, of=adapters[i])
        for name, factor in (("A", A), ("B", B)):
            factor.requires_grad_(name in trains)
        weight = NF4Weight.from_dense(weight) if packed[i] else weight
        members.append(Member(weight, bias, A, B, 0.5 + i))
    return x, members, [lay_out(randn(M, N), dY_layout) for N, _ in SIZES]


def _each(value):
    return value if isinstance(value, tuple) else (value,) * len(SIZES)


def _with_dropout(x, members):
    return adapted_linears(x, members, dropout_p=0.3, dropout_seed=11)


def _results(call, x, members, dYs, convert):
    """Outputs and gradients; a dY that is None belongs to an output that leads to no loss."""
    x = convert(x).detach().requires_grad_(x.requires_grad)
    leaves = [
        tuple(
            None if t is None else convert(t).detach().requires_grad_(t.requires_grad)
            for t in (member.bias, member.A, member.B)
        )
        for member in members
    ]
    ys = call(
        x, [m._replace(bias=b, A=A, B=B) for m, (b, A, B) in zip(members, leaves, strict=True)]
    )
    led = [(y, convert(dY).to(y.dtype)) for dY, y in zip(dYs, ys, strict=True) if dY is not None]
    torch.autograd.backward(*zip(*led, strict=True))
    found = {"dx": x.grad}
    for i, (y, (bias, A, B)) in enumerate(zip(ys, leaves, strict=True)):
        found |= {f"y{i}": y.detach(), f"dA{i}": A.grad, f"dB{i}": B.grad}
        if bias is not None:
            found[f"dbias{i}"] = bias.grad
    return found


def _dense(weight, dtype):
    return weight.dequantize(dtype) if isinstance(weight, NF4Weight) else weight


def _exact(mask):
    def call(x, members):
        return [
            reference.adapted_linear(
                x, _dense(m.weight, FP32).cpu().double(), m.bias, A=m.A, B=m.B, scaling=m.scaling,
                dropout_p=0.0 if mask is None else 0.3, dropout_mask=mask,
            )
            for m in members
        ]  # fmt: skip

    return call


def _eager(dtype, mixed, mask):
    def call(x, members):
        with torch.autocast("cpu", dtype=dtype, enabled=mixed):
            linear = torch.nn.functional.linear
            dropped = x if mask is None else x * mask / 0.7
            return [
                linear(x, _dense(m.weight, dtype).cpu(), m.bias)
                + linear(linear(dropped, m.A), m.B) * m.scaling
                for m in members
            ]

    return call


def check(dtype, adapter, nf4, device="cpu", drops=False, idle=(), **options):
    """The rule for every result; the outputs `idle` lead to no loss."""
    x, members, dYs = make(dtype, adapter, nf4, device=device, **options)
    dYs = [None if i in idle else dY for i, dY in enumerate(dYs)]
    mask = dispatch.dropout_mask(11, *x.shape, 0.3, x.device).cpu() if drops else None
    call = _with_dropout if drops else adapted_linears
    results = _results(call, x, members, dYs, lambda t: t)
    exact = _results(_exact(mask), x, members, dYs, lambda t: t.detach().cpu().double())
    plain = _eager(dtype, {*_each(adapter)} != {dtype}, mask)
    eager = orders(lambda: _results(plain, x, members, dYs, lambda t: t.detach().cpu()))
    # NF4 weights are exact in float32 and rounded to the compute dtype: that is the weight here.
    assert_all_accurate(results, exact, eager, compute_dtype=dtype)
    return results


ALL = ("x", "bias", "A", "B")


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("trains", [ALL, ("A", "B"), ("x",), ("x", "B"), ("x", "A")], ids=str)
@pytest.mark.parametrize(
    ("dtype", "adapter", "nf4"),
    [(FP32, FP32, False), (BF16, FP32, False), (FP16, FP16, True), (FP32, FP32, True)],
)
def test_torch_backend(dtype, adapter, nf4, trains):
    check(dtype, adapter, nf4, trains=trains)
    check(dtype, adapter, nf4, trains=trains, drops=True)


# What members need not have in common, and what autograd may hand in for their gradients.
UNLIKE = {
    "dense and nf4": {"nf4": (False, True, False)},
    "adapters in two dtypes": {"adapter": (FP32, BF16, FP32)},
    "both": {"nf4": (True, False, True), "adapter": (BF16, FP32, BF16)},
    "expanded dY": {"dY_layout": "zero-stride"},
    "no dY for the first": {"idle": (0,)},
    "no dY for the second": {"idle": (1,), "nf4": (False, True, True)},
    "one dY alone": {"idle": (0, 2), "drops": True},
}


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("options", UNLIKE.values(), ids=list(UNLIKE))
@pytest.mark.parametrize("trains", [ALL, ("x",), ("A", "B")], ids=str)
def test_unlike_members(options, trains):
    check(**{"dtype": BF16, "adapter": FP32, "nf4": False, "trains": trains, **options})


@pytest.mark.interpreter
@pytest.mark.parametrize("options", UNLIKE.values(), ids=list(UNLIKE))
def test_unlike_members_in_the_kernels(options):
    with started(interpreter()):
        check(**{"dtype": BF16, "adapter": FP32, "nf4": False, "trains": ALL, **options})


@pytest.mark.parametrize(
    ("dtype", "adapter", "nf4", "M", "K"),
    [
        (BF16, FP32, False, 96, 128),
        (FP16, FP16, True, 37, 70),
    ],
)
def test_kernels(executor, dtype, adapter, nf4, M, K):
    check(dtype, adapter, nf4, executor.device, M=M, K=K, trains=ALL)


@pytest.mark.parametrize(
    ("dtype", "adapter", "nf4", "M", "K"),
    [
        (FP32, FP32, False, 33, 64),
        (BF16, BF16, True, 160, 64),
    ],
)
def test_two_runs_of_the_kernels_give_the_same_bits(typical_executor, dtype, adapter, nf4, M, K):
    executor = typical_executor
    first = check(dtype, adapter, nf4, executor.device, M=M, K=K, trains=ALL)
    second = check(dtype, adapter, nf4, executor.device, M=M, K=K, trains=ALL)
    for name, value in first.items():
        assert_same_bits(value, second[name], name=name)


@pytest.mark.parametrize(("dtype", "nf4"), [(BF16, False), (FP16, True)])
def test_kernels_with_dropout(typical_executor, dtype, nf4):
    check(dtype, FP32, nf4, typical_executor.device, M=80, K=128, trains=ALL, drops=True)


@pytest.mark.exhaustive
def test_every_schedule_gives_the_same_bits(ptx_executor):
    """Three K-loops, producers of three dS, more rows than one group of tickets has."""
    options = {"dtype": FP32, "adapter": FP32, "nf4": False, "M": 300, "K": 32, "trains": ALL}
    expected = check(device=ptx_executor.device, **options)
    for order in ({"schedule": "reverse", "resident": 1}, {"schedule": "random:7", "resident": 3}):
        with ptx_executor.with_options(**order):
            results = check(device=ptx_executor.device, **options)
        for name, value in expected.items():
            assert_same_bits(results[name], value, name=name)


def test_launches(typical_executor):
    x, members, dYs = make(BF16, FP32, False, device=typical_executor.device)
    with typical_executor.counting_launches() as names:
        _results(adapted_linears, x, members, dYs, lambda t: t)
    assert names[:3] == ["ticketed_gemm"] * 3, "one launch a layer forward, the first shrinks"
    assert names[3:] == ["strips"] * 3 + ["ticketed_gemm", "strips"], "one dX and one dA for all"


@pytest.mark.interpreter
@pytest.mark.parametrize("M", [1, 64])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_few_rows_take_one_launch_a_layer_and_no_copy_of_A(monkeypatch, M, nf4):
    def copies(*_, **__):
        raise AssertionError("a launch of its own")

    x, members, _ = make(BF16, FP32, nf4, M=M, K=128, trains=())
    monkeypatch.setattr(torch, "cat", copies)
    with started(interpreter()) as machine, machine.counting_launches() as names, torch.no_grad():
        adapted_linears(x, members)
    assert names == ["ticketed_gemm"] * 3


def test_saved_are_x_and_the_S_of_all():
    x, members, _ = make(BF16, FP32, False)
    parameters = {t.data_ptr() for m in members for t in m if isinstance(t, torch.Tensor)}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
    ):
        adapted_linears(x, members)
    shapes = sorted(tuple(t.shape) for p, t in kept.items() if p not in parameters)
    assert shapes == [(37, 29), (37, 64)]


def test_an_output_that_leads_nowhere_leaves_no_gradient():
    x, members, dYs = make(FP32, FP32, False)
    ys = adapted_linears(x, members)
    alone = adapted_linears(x, [members[0], members[2]])
    wanted = torch.autograd.grad(
        (alone[0] * dYs[0]).sum() + (alone[1] * dYs[2]).sum(), [x, members[0].A, members[2].B]
    )
    ((ys[0] * dYs[0]).sum() + (ys[2] * dYs[2]).sum()).backward()
    assert members[1].A.grad is None and members[1].B.grad is None
    for got, want in zip((x.grad, members[0].A.grad, members[2].B.grad), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_outputs_may_be_changed_in_place():
    x, members, _ = make(FP32, FP32, False)
    ys = adapted_linears(x, members)
    changed = ys[0].mul_(2.0)
    (changed.sum() + ys[1].sum()).backward()
    assert x.grad is not None


def test_wrong_members():
    x, members, _ = make(FP32, FP32, False)
    with pytest.raises(ValueError, match="members must hold at least one"):
        adapted_linears(x, [])
    with pytest.raises(ValueError, match="members must have frozen weights"):
        trained = members[0].weight.clone().requires_grad_()
        adapted_linears(x, [members[0]._replace(weight=trained)])
    with pytest.raises(ValueError, match="x must have K = 64 features"):
        adapted_linears(x[:, 1:], members)
