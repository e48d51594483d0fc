"""The operators that torch.compile traces: their schemas, fakes and gradients, by opcheck."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import assert_same_bits
from equation import FACTORS, Case, Operands, fused, make
from torch.library import opcheck

from lora_fast import functional, library_ops, set_backend

CASE = Case(M=12, K=40, N=29, R=5, lead=(3, 4))
EVERYTHING = replace(CASE, factors=FACTORS, p=0.3, spans=((0, 2), (1, 5), (2, 2)))
CASES = [
    replace(EVERYTHING, dtype=torch.bfloat16, adapter_dtype=torch.float32, nf4=True),
    replace(CASE, nf4=True, nested=False, blocksize=32, trains=("B",)),
    replace(CASE, factors=("x", "g"), x_layout="transposed", lead=()),
]


@pytest.fixture(autouse=True)
def _torch_backend():
    with set_backend("torch"):
        yield


def arguments(o: Operands) -> list[Any]:
    """Those of lora_fast::adapted_linear."""
    flat = library_ops.FlatWeight.of(o.weight)
    vectors = [o.tensors.get(name) for name in ("bias", "A", "B", "b", "d", "g")]
    operands = (o.tensors["x"], flat.data, *vectors)
    needs = [t is not None and t.requires_grad for t in operands]
    seed = torch.tensor(o.case.seed) if o.case.p else None
    return [
        operands[0], *flat, *vectors, seed, o.spans, o.case.scaling, o.case.p, needs, "torch",
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case) -> None:
    forward = arguments(make(case))
    opcheck(library_ops.adapted_linear, forward)
    x, *rest = (t.detach() if isinstance(t, torch.Tensor) else t for t in forward)
    y, *saved = library_ops.adapted_linear(x, *rest)
    opcheck(library_ops.adapted_linear_backward, [torch.randn_like(y), x, *saved, *rest])


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_opcheck_of_row_norms(nf4: bool) -> None:
    o = make(replace(CASE, nf4=nf4, trains=()))
    flat = library_ops.FlatWeight.of(o.weight)
    A, B = o.tensors["A"], o.tensors["B"]
    opcheck(torch.ops.lora_fast.row_norms.default, [*flat, A, B, 0.7, "torch"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_the_autograd_function(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fused(make(case))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(functional.AdaptedLinear, "apply", None)
    actual = fused(make(case))
    for name, value in expected.items():
        assert (value is None) == (actual[name] is None), name
        if value is not None and actual[name] is not None:
            assert_same_bits(actual[name], value, name=name)


def test_double_backward_raises() -> None:
    x, *rest = arguments(make(CASE))
    y, *_ = library_ops.adapted_linear(x, *rest)
    (dX,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="adapted_linear_backward"):
        dX.sum().backward()


def test_the_backend_is_that_of_the_trace() -> None:
    """Fakes and kernels must agree on what is saved, whatever is chosen when the graph runs."""
    x, *rest = arguments(make(replace(CASE, p=0.3)))
    with set_backend("triton"):
        _, _, _, mask = library_ops.adapted_linear(x, *rest)
        assert mask.shape == (CASE.M, CASE.K)
