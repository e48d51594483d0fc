"""NF4 experts under activation checkpointing: decoded once for a recomputed forward and its
backward pass, within the limit, and released."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expert_checks import TRAINED, E, fused, operands, run
from machines import MACHINES, Executor, started
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_fast
from bench.instruments.accuracy import assert_as_close, assert_same_bits
from lora_fast.experts import nf4_experts
from lora_fast.experts.nf4_experts import NF4Experts
from lora_fast.experts.storage import decoded_bytes, store_packed
from lora_fast.four_bit import decoded
from lora_fast.functional import adapted_experts
from lora_fast.nf4 import NF4Weight

pytestmark = pytest.mark.usefixtures("released_weights")
HIDDEN, INNER, R = 32, 32, 16


def values_of(transposed: bool) -> Any:
    x, index, w, *both = operands(
        2 * INNER, 12, 2, transposed=False, bias=True, r=R, hidden=HIDDEN, inner=INNER
    )
    for factors in both:
        stored = factors["weight"].mT.contiguous() if transposed else factors["weight"]
        matrix = NF4Weight.from_dense(stored.reshape(-1, stored.shape[2]))
        matrix.quant_state.shape = stored.shape
        factors["weight"] = NF4Experts(matrix.packed, matrix.quant_state, transposed)
    return [x, index, w, *both]


def project(x: Tensor, index: Tensor, w: Tensor, first: Any, second: Any) -> Tensor:
    offsets = torch.bincount(index[:, 0], minlength=E).cumsum(0)
    first = {**first}
    return adapted_experts(x, first.pop("weight"), offsets, first.pop("bias"), **first)


CALLS = {"block": fused("silu"), "own gate": fused("own"), "projection": project}
trained = {"projection": ("x", "first.bias", "first.A", "first.B")}


def results(call: str, values: Any, dtype: torch.dtype, reentrant: bool | None) -> dict[str, Any]:
    def checkpointed(*given: Any) -> Tensor:
        if reentrant is None:
            return CALLS[call](*given)
        return checkpoint(CALLS[call], *given, use_reentrant=reentrant)

    return run(checkpointed, values, dtype, trained.get(call, TRAINED))


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    decode = nf4_experts.decode

    def counted(packed: Tensor, *given: Any) -> Tensor:
        found.append(packed.data_ptr())
        return decode(packed, *given)

    monkeypatch.setattr(nf4_experts, "decode", counted)
    return found


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_an_expert_is_decoded_once_for_a_recomputed_forward_and_its_backward(
    call: str, transposed: bool, reentrant: bool, decodes: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    values = values_of(transposed)
    with lora_fast.set_backend("torch"):
        expected = results(call, values, torch.bfloat16, None)
        once = len(decodes) // 2  # the experts with rows, forward and backward
        decodes.clear()
        actual = results(call, values, torch.bfloat16, reentrant)
        assert len(decodes) == 2 * once, "forward, and recomputed forward"
        monkeypatch.setattr(decoded.bytes_saved, "told", 0)
        decodes.clear()
        without = results(call, values, torch.bfloat16, reentrant)
        assert len(decodes) == 3 * once
    for key, value in expected.items():
        assert_same_bits(actual[key], value, name=key)
        assert_same_bits(without[key], value, name=key)


def test_the_limit_holds_for_each_projection(
    decodes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room for the second alone, whose W is the smaller one, it is saved."""
    monkeypatch.setattr(decoded.bytes_saved, "told", 2 * E * HIDDEN * INNER)
    with lora_fast.set_backend("torch"):
        values = values_of(False)
        results("block", values, torch.bfloat16, None)
        each = len(decodes) // 4
        decodes.clear()
        results("block", values, torch.bfloat16, False)
    assert len(decodes) == 5 * each


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    "machine",
    [
        pytest.param(
            machine,
            id=name,
            marks=[*marks, *([] if name in ("interpreter", "sm_90") else [pytest.mark.exhaustive])],
        )
        for name, machine, marks in MACHINES
    ],
)
def test_the_kernels_decode_once(
    machine: Callable[[], Executor], transposed: bool, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, projections = values_of(transposed), 1 if call == "projection" else 2
    dtype = torch.bfloat16

    def counted(limit: int) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(decoded.bytes_saved, "told", limit)
        with executor.counting_launches() as launches:
            found = results(call, values, dtype, False)
        return sum(name.startswith("nf4") for name in launches), found

    with started(machine()) as executor, lora_fast.set_backend("triton"):
        values = [v.to(executor.device) if isinstance(v, Tensor) else v for v in values]
        once, actual = counted(1 << 40)
        again, expected = counted(0)
    assert (once, again) == (2 * projections, 3 * projections)
    dense = [
        {**v, "weight": v["weight"].dequantize(dtype)} if isinstance(v, dict) else v
        for v in values_of(transposed)
    ]
    with lora_fast.set_backend("torch"):
        ref64 = results(call, dense, torch.float64, None)
    for key, value in expected.items():
        # dX of a dense weight adds the low rank apart.
        if key == "x":
            assert_as_close(actual[key], ref64[key], [value], name=key)
        else:
            assert_same_bits(actual[key], value, name=key)


def test_the_default_limit_has_room_for_the_experts_of_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoded.bytes_saved, "told", None)
    monkeypatch.setattr(decoded.bytes_saved, "largest_block", 0)
    base: Any = nn.Module()
    base.layers = nn.ModuleList(nn.Module() for _ in range(2))
    base.layers[1].experts = experts = nn.Module()
    for name, shape in (("gate_up_proj", (E, 2 * INNER, HIDDEN)), ("down_proj", (E, 64, INNER))):
        matrix = NF4Weight.from_dense(torch.randn(shape, dtype=torch.bfloat16).flatten(0, 1))
        matrix.quant_state.shape = torch.Size(shape)
        store_packed(experts, name, matrix.packed, matrix.quant_state)
    decoded.provide_for(base, decoded_bytes)
    assert decoded.bytes_saved.limit == 2 * E * INNER * (2 * HIDDEN + 64)
