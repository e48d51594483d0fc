"""Several layers that read the same x, computed together: adapted_linears."""

from __future__ import annotations

import pytest
import torch
from group_checks import BF16, FP16, FP32, check, make, results_of
from machines import interpreter, started

from bench.instruments.accuracy import assert_same_bits
from bench.instruments.saved_tensors import SavedTensors
from lora_fast.functional import adapted_linears

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


# What members need not have in common, or have in common so that they share more launches, and what
# autograd may hand in for their gradients.
UNLIKE = {
    "dense and nf4": {"nf4": (False, True, False)},
    "adapters in two dtypes": {"adapter": (FP32, BF16, FP32)},
    "both": {"nf4": (True, False, True), "adapter": (BF16, FP32, BF16)},
    "A of other strides": {"A_layout": ("contiguous", "transposed", "contiguous")},
    "A of other dtypes and strides": {
        "adapter": (FP32, BF16, FP32),
        "A_layout": ("transposed", "contiguous", "contiguous"),
    },
    "equal ranks": {"R": 8},
    "equal ranks without parts of dS": {"R": 40, "dtype": FP16, "drops": True},
    "equal ranks that are several steps": {"R": 72, "dtype": FP32},
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
    ("dtype", "adapter", "nf4", "M", "K", "R"),
    [
        (BF16, FP32, False, 96, 128, 8),
        (BF16, FP32, False, 37, 70, 4),
        (FP16, FP16, True, 37, 70, None),
    ],
)
def test_kernels(executor, dtype, adapter, nf4, M, K, R):
    check(dtype, adapter, nf4, executor.device, M=M, K=K, R=R, trains=ALL)


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
    sizes = {"M": 300, "K": 32, "R": 8}
    options = {"dtype": FP32, "adapter": FP32, "nf4": False, "trains": ALL, **sizes}
    expected = check(device=ptx_executor.device, **options)
    for order in ({"schedule": "reverse", "resident": 1}, {"schedule": "random:7", "resident": 3}):
        with ptx_executor.with_options(**order):
            results = check(device=ptx_executor.device, **options)
        for name, value in expected.items():
            assert_same_bits(results[name], value, name=name)


@pytest.mark.parametrize(("R", "sides"), [(None, 3), (8, 1)], ids=["own ranks", "equal ranks"])
def test_launches(interpreter_or_gpu, R, sides):
    x, members, dYs = make(BF16, FP32, False, device=interpreter_or_gpu.device, R=R)
    with interpreter_or_gpu.counting_launches() as names:
        results_of(adapted_linears, x, members, dYs, lambda t: t)
    assert names[:3] == ["ticketed_gemm"] * 3, "one launch a layer forward, the first shrinks"
    assert names[3:-2] == ["strips"] * sides, "one for all layers that are alike"
    assert names[-2:] == ["ticketed_gemm", "strips"], "one dX and one dA for all"


@pytest.mark.interpreter
@pytest.mark.parametrize("M", [1, 70])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_the_fused_route_takes_one_launch_a_layer_and_no_copy_of_A(monkeypatch, M, nf4):
    def copies(*_, **__):
        raise AssertionError("a launch of its own")

    x, members, _ = make(BF16, FP32, nf4, M=M, K=128, trains=())
    monkeypatch.setattr(torch, "cat", copies)
    with started(interpreter()) as machine, machine.counting_launches() as names, torch.no_grad():
        adapted_linears(x, members)
    assert [name for name in names if name != "nf4_decode"] == ["ticketed_gemm"] * 3


def test_saved_are_x_and_the_S_of_all():
    x, members, _ = make(BF16, FP32, False)
    with SavedTensors([t for m in members for t in m if isinstance(t, torch.Tensor)]) as saved:
        adapted_linears(x, members)
    assert sorted(shape for shape, _ in saved.shapes) == [(37, 29), (37, 64)]


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


class _WithoutGradients(torch.autograd.Function):
    """A loss whose backward pass has no gradient for anything."""

    @staticmethod
    def forward(ctx, *ys):
        return ys[0].new_zeros(())

    @staticmethod
    def backward(ctx, dloss):
        return None, None, None


def test_a_group_that_no_gradient_reaches_has_none():
    x, members, _ = make(FP32, FP32, False)
    _WithoutGradients.apply(*adapted_linears(x, members)).backward()
    assert x.grad is None
    assert all(member.A.grad is None and member.B.grad is None for member in members)
