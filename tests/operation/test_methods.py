"""Every method of the equation, at every rank: on the torch backend, and in the kernels.

The kernels' whole matrix (method, rank, machine) runs with ``--leg exhaustive``; the suite runs a
sixth of what is compiled, in which every method, rank and architecture occurs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from equation import Case, check, make
from machines import MACHINES, started

BF16, FP32 = torch.bfloat16, torch.float32
RANKS = (1, 8, 64, 100, 256, 1024)
# factors that are there, factors that train (x stands for the input's gradient)
METHODS = {
    "LoRA": (("x", "bias", "A", "B"), ("x", "A", "B")),
    "LoRA-FA": (("x", "bias", "A", "B"), ("x", "B")),
    "VeRA": (("x", "bias", "A", "B", "b", "d"), ("x", "b", "d")),
    "DoRA": (("x", "bias", "A", "B", "g"), ("x", "A", "B", "g")),
    "AdaLoRA": (("x", "bias", "A", "B", "d"), ("x", "A", "B", "d")),
    "IA3": (("x", "bias", "g"), ("x", "bias", "g")),
    "BitFit": (("x", "bias"), ("x", "bias")),
    "all": (("x", "bias", "A", "B", "b", "d", "g"), ("x", "bias", "A", "B", "b", "d", "g")),
}
# Not a method: everything at once, where a d of one element is a sum of terms that cancel.
RANKS_OF = {name: RANKS[1:] if name == "all" else RANKS for name in METHODS}
LOW_RANK = [name for name, (factors, _) in METHODS.items() if "A" in factors]


def case_of(method: str, R: int, *, nf4: bool, p: float) -> Case:
    """Ragged with dropout, multiples of 16 without: what becomes asynchronous when compiled.

    At rank 1 the gradient of d is a single sum: sizes at which its terms do not cancel by chance.
    """
    factors, trains = METHODS[method]
    shape = {"M": 37, "K": 70, "N": 50} if p else {"M": 48, "K": 64, "N": 96 if R == 1 else 80}
    return Case(
        **shape, R=R, dtype=BF16, adapter_dtype=FP32, nf4=nf4, p=p, factors=factors, trains=trains,
        scaling=1.0 / R**0.5,
    )  # fmt: skip


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    ("method", "R"), [(method, R) for method in LOW_RANK for R in RANKS_OF[method]]
)
def test_torch_backend(method: str, R: int, nf4: bool, p: float) -> None:
    case = case_of(method, R, nf4=nf4, p=p)
    check(case)
    check(replace(case, dtype=FP32, adapter_dtype=None))


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("method", ["IA3", "BitFit"])
def test_torch_backend_without_an_adapter(method: str, nf4: bool) -> None:
    check(case_of(method, 1, nf4=nf4, p=0.0))


def _kernel_cases() -> list[object]:
    """(machine, case) for every method and rank, on every machine; NF4 and dropout alternate."""
    params = []
    for i, method in enumerate(METHODS):
        ranks = RANKS_OF[method] if method in LOW_RANK else (1,)
        for j, R in enumerate(ranks):
            for k, (name, machine, marks) in enumerate(MACHINES):
                if name == "interpreter" and R == 1024 and method not in ("LoRA", "VeRA"):
                    continue  # the same chunks of 64 columns, a second each
                nf4, drops = (i + j + k) % 2 == 0, method in LOW_RANK and (i + j // 2 + k) % 2 == 0
                case = case_of(method, R, nf4=nf4, p=0.1 if drops else 0.0)
                chosen = (i + j) % 6 == 2 * (k - 1) if method in LOW_RANK else i % 3 == k - 1
                rest = name.startswith("sm_") and not chosen
                marks = [*marks, pytest.mark.exhaustive] if rest else marks
                label = f"{name}-{method}-{case}"
                params.append(pytest.param(name, machine, case, id=label, marks=marks))
    return params


@pytest.mark.parametrize(("name", "machine", "case"), _kernel_cases())
def test_kernels(name, machine, case) -> None:
    with started(machine()) as executor:
        check(case, executor.device)


def test_the_matrix_has_every_method_rank_and_architecture() -> None:
    """A test of the tests: what the suite runs without ``exhaustive``."""
    chosen = [
        param.values for param in _kernel_cases() if pytest.mark.exhaustive not in param.marks
    ]
    assert {name for name, *_ in chosen} >= {"sm_80", "sm_90", "sm_100"}
    cases = [case for name, _, case in chosen if name.startswith("sm_")]
    assert {case.R for case in cases} == set(RANKS)
    assert {case.factors for case in cases} == {factors for factors, _ in METHODS.values()}
    assert {case.nf4 for case in cases} == {case.p > 0 for case in cases} == {True, False}


def test_make_gives_the_same_operands_twice() -> None:
    case = case_of("all", 8, nf4=False, p=0.1)
    first, second = make(case), make(case)
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
