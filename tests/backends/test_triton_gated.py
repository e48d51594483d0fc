"""A gated MLP on the Triton backend: every result by the rule, and the launches that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import machines
import pytest
import torch
from gated_checks import BF16, FP16, FP32, MEMBERS, MLP, check, factors_of, fused, make, results_of
from machines import Executor, started

pytest.importorskip("triton")
from lora_fast.kernels import launch_plans
from lora_fast.kernels.triton_version import VERSION

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast import gated
from lora_fast.backends import triton_plans
from lora_fast.backends.selection import backend_for
from lora_fast.factors import Needs

# More rows than a few, which are left to the layers.
MANY = MLP(BF16, FP32, M=70)
# Rates of dropout that are drawn as they are, multiples of 2⁻¹⁵.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"biased": MEMBERS},
    "fused": {"fused": True, "biased": ("gate",)},
    "fused, dropout, in nf4": {"fused": True, "p": 0.25, "nf4": ("gate", "down")},
    "nf4": {"nf4": MEMBERS},
    "only h of a fused layer": {"alone": True, "fused": True},
    "dropout": {"p": 0.25},
    "all dropped": {"p": 1.0},
    "gate computed elsewhere": {"ready": ("gate",), "layout": "transposed"},
    "up computed elsewhere": {"ready": ("up",), "p": 0.25},
    "both in one, computed elsewhere": {"ready": ("gate",), "fused": True},
    "only an activation": {"ready": ("gate", "up"), "alone": True},
    "three dimensions": {"lead": (2, 35)},
    "zero strides": {"layout": "zero-stride"},
    **{f"only {name}": {"adapted": (name,), "p": 0.25} for name in MEMBERS},
    "not up": {"adapted": ("gate", "down")},
    "no adapter": {"adapted": ()},
    "A frozen": {"trains": ("x", "B")},
    "B frozen": {"trains": ("x", "A")},
    "x alone": {"trains": ("x",)},
    "down frozen": {"frozen": ("down",)},
    "rank 64": {"ranks": (64, 64, 64)},
    "rank 100, dropout": {"ranks": (100, 20, 40), "p": 0.25},
    "ranks of 8": {"ranks": (8, 16, 24), "p": 0.25},
    "gelu": {"activation": "gelu"},
}
DTYPES = {
    "bfloat16 adapters": (BF16, None),
    "float16": (FP16, FP32),
    "float32": (FP32, None),
}
SOME = ("plain", "ranks of 8", "fused", "dropout", "nf4", "rank 100, dropout")


@pytest.fixture
def interpreter() -> Iterator[Executor]:
    with started(machines.interpreter()) as machine:
        yield machine


@pytest.mark.interpreter
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))
def test_every_variant(interpreter: Executor, changes: dict[str, Any]) -> None:
    check(MANY, **changes)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES.values(), ids=list(DTYPES))
def test_every_dtype(interpreter: Executor, dtype: Any, adapter: Any, name: str) -> None:
    check(replace(MANY, dtype=dtype, adapter=adapter), **VARIANTS[name])


def test_compiled_code(typical_executor: Executor) -> None:
    with typical_executor.counting_launches() as names:
        check(MANY, typical_executor.device, p=0.25, ranks=(8, 8, 8), H=64, intermediate=64)
    assert {"gated_forward", "gated_backward"} <= set(names)


# Other kernels than those of the case above, or other tiles of them.
COMPILED: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float16, dropout": (FP16, {"p": 0.25}),
    "float32": (FP32, {}),
    "rank 40": (BF16, {"ranks": (40, 64, 33)}),
    "rank 100, dropout": (BF16, {"ranks": (100, 20, 40), "p": 0.25}),
    "nf4, dropout": (BF16, {"nf4": MEMBERS, "p": 0.25}),
    "fused, biases": (BF16, {"fused": True, "biased": ("gate", "down")}),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "float32" else pytest.mark.exhaustive)
        for name in COMPILED
    ],
)
def test_compiled_variants(ptx_executor: Executor, name: str) -> None:
    dtype, changes = COMPILED[name]
    with ptx_executor.counting_launches() as names:
        check(replace(MANY, dtype=dtype, H=64, intermediate=64), ptx_executor.device, **changes)
    assert "gated_forward" in names and {"gated_backward", "gated_gradients"} & set(names)


@pytest.mark.parametrize(
    "is_fused",
    [
        pytest.param(False, id="apart"),
        pytest.param(True, id="fused", marks=pytest.mark.exhaustive),
    ],
)
@pytest.mark.compiled
def test_repeated_launches_give_the_same_bits(sm: int, is_fused: bool) -> None:
    mlp = replace(MANY, ranks=(8, 8, 8), H=32, intermediate=32, fused=is_fused)
    with lora_fast.set_backend("triton"):
        # The second call is recorded, the third repeats it on other memory.
        first, *_, third = [results_of(make(mlp), fused) for _ in range(3)]
    assert any(type(plan) is launch_plans.Plan for plan in triton_plans._plans.values())
    for name, value in first.items():
        again = third[name]
        assert value is not None and again is not None
        assert_same_bits(again, value, name=name)


# Beside these, products by cuBLAS; on a CPU they are no other launches than on a GPU with adapters
# in float32.
FORWARD = ["shrink", "gated_forward", "expand"]
OF_DOWN = ["strips", "ticketed_gemm"]
BEFORE = ["ticketed_gemm", "expand", "strips"]
NOT_BEFORE_3_7 = pytest.mark.skipif(
    VERSION < (3, 7), reason="Triton before 3.7 takes gated_gradients in float16"
)
LAUNCHES = {
    "plain": [*FORWARD, *OF_DOWN, "gated_backward", *BEFORE],
    "ranks of 8": [*FORWARD, *OF_DOWN, "gated_backward", *BEFORE],
    "fused": [*FORWARD, *OF_DOWN, "gated_backward", "strips", *BEFORE],  # a bias trains
    "nf4": [
        "shrink", "nf4_decode", "nf4_decode", "gated_forward", "nf4_decode_augmented", *OF_DOWN,
        "nf4_decode", "gated_backward", "ticketed_gemm", "expand", "nf4_decode", "nf4_decode",
        "strips",
    ],
    "rank 100, dropout": [
        *FORWARD, *OF_DOWN, "gated_gradients", "strips", "strips", "strips", *BEFORE,
    ],
    "no adapter": ["gated_forward", "gated_backward"],
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        *((name, {}) for name in LAUNCHES),
        pytest.param("ranks of 8", {"dtype": FP16, "adapter": FP32}, marks=NOT_BEFORE_3_7),
        ("ranks of 8", {"dtype": FP32, "adapter": FP32}),
    ],
    ids=[*LAUNCHES, "float16", "float32"],
)
def test_launches(interpreter: Executor, name: str, dtypes: dict[str, torch.dtype]) -> None:
    o = make(replace(MANY, **VARIANTS[name], **dtypes))
    with interpreter.counting_launches() as names:
        y = fused(o, o.leaves)
        y.backward(o.dY)
    expected = list(LAUNCHES[name])
    if dtypes.get("dtype") == FP32:
        # cuBLAS expands a layer by itself if its factors have the dtype of the product.
        expected.remove("expand")
    assert names == expected


@pytest.mark.interpreter
def test_few_rows_are_left_to_the_layers(interpreter: Executor) -> None:
    o = make(replace(MANY, M=64))
    with interpreter.counting_launches() as names:
        fused(o, o.leaves)
    assert names == ["ticketed_gemm"] * 3


@pytest.mark.interpreter
@pytest.mark.parametrize("is_fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("R", [8, 100])
def test_gradients_may_take_the_memory_of_gate_and_up(
    interpreter: Executor, is_fused: bool, R: int
) -> None:
    mlp = replace(MANY, fused=is_fused, ranks=(R, R, R), ready=() if is_fused else ("up",))
    apart, together = (_gradients(mlp, in_place=in_place) for in_place in (False, True))
    assert apart.keys() == together.keys()
    for name, value in apart.items():
        assert_same_bits(together[name], value, name=name)


def _gradients(mlp: MLP, *, in_place: bool) -> dict[str, torch.Tensor]:
    o, no = make(mlp), Needs()
    linears = gated.GatedLinears(*(factors_of(o, o.leaves, name) for name in MEMBERS))
    trains = Needs(x=True, A=True, B=True)
    up = no if mlp.fused else Needs(x=True)
    needs, backend = gated.GatedNeeds(trains, up, trains), backend_for(torch.device("cpu"))
    with torch.no_grad():
        x = o.leaves["x"].detach()
        ready = None if mlp.fused else o.leaves["up"].detach()
        _, saved = backend.gated_forward(x, linears, mlp.activation, needs)
        given = None if ready is None else ready.clone()
        grads = backend.gated_backward(
            o.dY, x, saved, linears, mlp.activation, needs, in_place=in_place
        )
    if ready is not None and given is not None:
        assert_same_bits(ready, given, name="an output that was computed elsewhere")
    found = {"x": grads.x}
    for name, of in zip(MEMBERS, grads[1:], strict=True):
        found |= {f"{name}.{key}": value for key, value in of._asdict().items()}
    return {name: value for name, value in found.items() if value is not None}
