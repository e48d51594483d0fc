"""Numbers of geometries: equal where everything is, found again without reading everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fast import geometry
from lora_fast.factors import Constants, Factors
from lora_fast.geometry import Numbers, check_of
from lora_fast.nf4 import NF4Weight

M, K, N, R = 6, 64, 32, 4
Operands = tuple[Tensor, list[Factors]]


def layer(weight: Any = None, **changed: Any) -> Factors:
    W = torch.zeros(N, K) if weight is None else weight
    given = {"A": torch.zeros(R, K, requires_grad=True), "B": torch.zeros(N, R)}
    return Factors(W, **{**given, "constants": Constants(2.0, 0.1, 7), **changed})


def operands(**changed: Any) -> Operands:
    return torch.zeros(M, K), [layer(**changed), layer()]


def nf4(blocksize: int = 64, *, double_quant: bool = True) -> NF4Weight:
    return NF4Weight.from_dense(torch.randn(N, K), blocksize=blocksize, double_quant=double_quant)


CHANGES: dict[str, Callable[[], Operands]] = {
    "rows": lambda: (torch.zeros(M + 1, K), operands()[1]),
    "dimensions": lambda: (torch.zeros(2, M // 2, K), operands()[1]),
    "dtype of x": lambda: (torch.zeros(M, K, dtype=torch.bfloat16), operands()[1]),
    "strides of x": lambda: (torch.zeros(K, M).t(), operands()[1]),
    "alignment of x": lambda: (torch.zeros(M * K + 1)[1:].view(M, K), operands()[1]),
    "device of W": lambda: operands(weight=torch.zeros(N, K, device="meta")),
    "strides of W": lambda: operands(weight=torch.zeros(K, N).t()),
    "rank": lambda: operands(A=torch.zeros(8, K), B=torch.zeros(N, 8)),
    "dtype of B": lambda: operands(B=torch.zeros(N, R, dtype=torch.float16)),
    "a bias": lambda: operands(bias=torch.zeros(N)),
    "a bias of the other": lambda: (torch.zeros(M, K), [layer(), layer(bias=torch.zeros(N))]),
    "scaling": lambda: operands(constants=Constants(1.0, 0.1, 7)),
    "dropout": lambda: operands(constants=Constants(2.0, 0.2, 7)),
    "NF4": lambda: operands(weight=nf4()),
    "NF4 of another blocksize": lambda: operands(weight=nf4(128)),
    "NF4 without double quantisation": lambda: operands(weight=nf4(double_quant=False)),
    "one layer": lambda: (torch.zeros(M, K), [layer()]),
}
BESIDE = ("beside",)


@pytest.fixture(params=["with torch's guards", "without"])
def numbers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Numbers:
    if request.param == "without":
        monkeypatch.setattr(geometry, "check_of", lambda tensors: None)
    return Numbers()


def number_of(numbers: Numbers, given: Operands, beside: tuple[Any, ...] = BESIDE) -> int:
    x, fs = given
    number, tensors = numbers.find(beside, [x], fs)
    expected = [x]
    for f in fs:
        W: Any = f.weight
        expected += [W] if isinstance(W, Tensor) else geometry.parts_of(W)
        expected += [t for t in (f.A, f.B, f.bias) if t is not None]
    assert list(map(id, tensors)) == list(map(id, expected))
    return numbers.add(beside, [x], fs) if number is None else number


OF_TENSORS = [c for c in CHANGES if c not in ("scaling", "dropout") and "blocksize" not in c]


@pytest.mark.parametrize("change", OF_TENSORS)
def test_a_number_of_the_same_call_hides_no_change_of_its_tensors(
    numbers: Numbers, change: str
) -> None:
    """Between forward and backward, tensors may be replaced; constants may not."""
    x, fs = operands()
    added = numbers.add(BESIDE, [x], fs, 7)
    for _ in range(2):
        x, fs = operands()
        assert numbers.find(BESIDE, [x], fs, 7)[0] == added
    x, fs = CHANGES[change]()
    assert numbers.find(BESIDE, [x], fs, 7)[0] is None


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_has_a_number_of_its_own(numbers: Numbers, change: str) -> None:
    makes = (operands, CHANGES[change])
    first, second = (number_of(numbers, make()) for make in makes)
    assert first != second
    for _ in range(3):
        assert [number_of(numbers, make()) for make in makes] == [first, second]


def test_what_is_beside_counts(numbers: Numbers) -> None:
    given = operands()
    assert number_of(numbers, given, ("a",)) != number_of(numbers, given, ("b",))


def test_seeds_and_numbers_in_memory_do_not_count(numbers: Numbers) -> None:
    first = number_of(numbers, operands())
    assert number_of(numbers, operands(constants=Constants(2.0, 0.1, 8))) == first
    assert number_of(numbers, operands(weight=torch.ones(N, K))) == first


def test_what_is_known_is_found_without_reading_all(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = Numbers()
    makes = [operands, *(CHANGES[name] for name in ("rows", "rank", "NF4", "a bias"))]
    expected = [[number_of(numbers, make()) for _ in range(2)][1] for make in makes]
    read: list[Any] = []
    monkeypatch.setattr(geometry, "of_any", lambda *given: read.append(given))
    assert [number_of(numbers, make()) for make in makes] == expected
    assert read == []


def test_a_run_with_too_many_geometries_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_MOST", 2)
    numbers, found = Numbers(), []
    for rows in (1, 2, 3, 1, 2, 3):
        given = torch.zeros(rows, K), [layer()]
        found.append(number_of(numbers, given))
        assert number_of(numbers, given) == found[-1]
    assert len(numbers._known) <= 2
    assert len(set(found[:3])) == 3


def test_this_version_of_torch_has_guards() -> None:
    check = check_of([torch.zeros(2, 3), torch.zeros(4)])
    assert check is not None
    assert check(torch.ones(2, 3), torch.ones(4))
    assert not check(torch.ones(2, 3), torch.ones(5))
    assert not check(torch.ones(3, 2).t(), torch.ones(4))


def test_a_version_without_guards_has_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    assert check_of([torch.zeros(2)]) is None
