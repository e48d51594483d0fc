"""The operators that torch.compile traces: their schemas, fakes and gradients, by opcheck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from equation import FACTORS, Case, Operands, fused, make
from machines import interpreter, started
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from bench.instruments.accuracy import assert_same_bits
from lora_fast import set_backend
from lora_fast.factors import Constants, Factors
from lora_fast.operation import autograd, compiled_groups, compiled_ops

CASE = Case(M=12, K=40, N=29, R=5, lead=(3, 4))
EVERYTHING = replace(CASE, factors=FACTORS, p=0.3, spans=((0, 2), (1, 5), (2, 2)))
GROUPS = [
    replace(CASE, dtype=torch.bfloat16, adapter_dtype=torch.float32, nf4=True, p=0.3),
    replace(CASE, nf4=True, quant_type="fp4", nested=False, trains=("B",)),
    CASE,
]
CASES = [
    replace(EVERYTHING, dtype=torch.bfloat16, adapter_dtype=torch.float32, nf4=True),
    replace(CASE, nf4=True, quant_type="fp4", nested=False, blocksize=32, trains=("B",)),
    replace(CASE, factors=("x", "g"), x_layout="transposed", lead=()),
]


@pytest.fixture(autouse=True)
def _torch_backend():
    with set_backend("torch"):
        yield


def arguments(o: Operands, backend: str = "torch") -> list[Any]:
    """Those of lora_fast::adapted_linear."""
    flat = compiled_ops.FlatWeight.of(o.weight)
    vectors = [o.tensors.get(name) for name in ("bias", "A", "B", "b", "d", "g")]
    operands = (o.tensors["x"], flat.data, *vectors)
    needs = [t is not None and t.requires_grad for t in operands]
    seed = torch.tensor(o.case.seed) if o.case.p else None
    return [
        operands[0], *flat, *vectors, seed, o.spans, o.case.scaling, o.case.p, needs, backend,
        compiled_ops.REVISION,
    ]  # fmt: skip


def backward_arguments(o: Operands, backend: str = "torch") -> list[Any]:
    """Those of lora_fast::adapted_linear_backward, after a forward pass."""
    x, *rest = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments(o, backend))
    y, *saved = compiled_ops.adapted_linear(x, *rest)
    return [torch.randn_like(y), x, *saved, *rest]


def row_norms_arguments(o: Operands, backend: str = "torch") -> list[Any]:
    """Those of lora_fast::row_norms."""
    factors = (o.tensors[name].detach() for name in "AB")
    return [*compiled_ops.FlatWeight.of(o.weight), *factors, 0.7, backend]


def group_arguments(o: Operands, backend: str = "torch") -> list[Any]:
    """Those of lora_fast::adapted_linears: two layers, one without a bias."""
    found: list[Any] = []
    original = compiled_groups.adapted_linears
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_groups, "adapted_linears", lambda *a: found.extend(a) or [])
        t, p = o.tensors, o.case.p
        bias, A, B = t["bias"], t["A"], t["B"]
        f = Factors(o.weight, bias, A, B, constants=Constants(o.case.scaling, p))
        with set_backend(backend):
            compiled_groups.apply(t["x"], [f, f._replace(bias=None)], o.case.seed if p else None)
    assert original is compiled_groups.adapted_linears
    return found


def group_backward_arguments(o: Operands, backend: str = "torch") -> list[Any]:
    """Those of lora_fast::adapted_linears_backward, after a forward pass; no loss reads y_2."""
    x, *rest = tree_map_only(torch.Tensor, torch.Tensor.detach, group_arguments(o, backend))
    y, _, *saved = compiled_groups.adapted_linears(x, *rest)
    return [[torch.randn_like(y), None], x, *saved, *rest]


# {operator: what makes its arguments, and for which cases}
OPERATORS: dict[str, tuple[Callable[..., list[Any]], list[Case]]] = {
    "adapted_linear": (arguments, CASES),
    "adapted_linear_backward": (backward_arguments, CASES),
    "adapted_linears": (group_arguments, GROUPS),
    "adapted_linears_backward": (group_backward_arguments, GROUPS),
    "row_norms": (row_norms_arguments, [replace(CASE, nf4=nf4) for nf4 in (False, True)]),
}
CALLS = [
    pytest.param(name, make_arguments, case, id=f"{name}-{case}")
    for name, (make_arguments, cases) in OPERATORS.items()
    for case in cases
]
calls = pytest.mark.parametrize(("name", "make_arguments", "case"), CALLS)


def operator(name: str) -> Any:
    return getattr(torch.ops.lora_fast, name).default


def test_every_registered_operator_is_checked() -> None:
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lora_fast::")
    }
    assert registered == OPERATORS.keys()
    root = Path(compiled_ops.__file__).resolve().parents[2]
    sources = [path for f in ("lora_fast", "kernels") for path in (root / f).rglob("*.py")]
    users = [path.name for path in sources if "torch.library" in path.read_text()]
    assert users == ["compiled_ops.py"], "what other files register is not seen here"


def test_a_graph_on_disk_names_the_revision_of_what_it_calls() -> None:
    """Inductor finds a graph again by its code; one of another revision has other results."""
    for name in OPERATORS.keys() - {"row_norms"}:
        assert operator(name)._schema.arguments[-1].name == "revision"
    case = make(CASE)
    assert group_arguments(case)[-1] == arguments(case)[-1] == compiled_ops.REVISION


@calls
def test_opcheck(name: str, make_arguments: Any, case: Case) -> None:
    opcheck(operator(name), make_arguments(make(case)))


@pytest.mark.interpreter
@calls
def test_opcheck_of_the_kernels(name: str, make_arguments: Any, case: Case) -> None:
    with started(interpreter()):
        made = make_arguments(make(case), "triton")
        opcheck(operator(name), made, test_utils=("test_schema", "test_faketensor"))


@calls
def test_fakes_say_what_the_kernels_make(name: str, make_arguments: Any, case: Case) -> None:
    """What the torch backend makes."""
    operands = make_arguments(make(case))
    expected = operator(name)(*operands)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, operands)
        found = operator(name)(*("triton" if isinstance(t, str) else t for t in fakes))
    expected, found = (
        [made] if isinstance(made, torch.Tensor) else list(made) for made in (expected, found)
    )
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_the_autograd_function(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fused(make(case))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(autograd.AdaptedLinears, "apply", None)
    actual = fused(make(case))
    for name, value in expected.items():
        assert (value is None) == (actual[name] is None), name
        if value is not None and actual[name] is not None:
            assert_same_bits(actual[name], value, name=name)


def test_double_backward_raises() -> None:
    x, *rest = arguments(make(CASE))
    y, *_ = compiled_ops.adapted_linear(x, *rest)
    (dX,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="adapted_linear_backward"):
        dX.sum().backward()


def test_the_backend_is_that_of_the_trace() -> None:
    """Fakes and kernels must agree on what is saved, whatever is chosen when the graph runs."""
    x, *rest = arguments(make(replace(CASE, p=0.3)))
    expected, *_ = compiled_ops.adapted_linear(x, *rest)
    with set_backend("triton"):
        found, *_ = compiled_ops.adapted_linear(x, *rest)
    assert_same_bits(found, expected, name="y, whose mask differs between the backends")
