"""Launch plans of checkpointed NF4 weights, which give the decoded W for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attentions
import gated_models
import pytest
import torch
from checked_plans import bound_launches
from lora_models import K
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight
from lora_fast.four_bit import decoded
from lora_fast.functional import adapted_linear

N = 48
BF16 = torch.bfloat16


@pytest.fixture
def launches(with_cublas: None) -> Iterator[Any]:
    """The launches of a block on a stub for sm_90."""
    from bench.instruments import stub_driver

    with stub_driver.recording(90) as log, lora_fast.set_backend("triton"):
        yield log.launches


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch, launches: Any) -> list[str]:
    """The kernels whose launches went through Triton's binder."""
    return bound_launches(monkeypatch)


def third_of(launches: Any) -> list[str]:
    """The names of the last of three equal steps' launches."""
    names = [launch.name for launch in launches]
    each = len(names) // 3
    assert names == 3 * names[:each]
    return names[:each]


def checkpointed(kind: str, rows: int = 80) -> Callable[..., list[Tensor]]:
    """The results of a checkpointed call of NF4 weights for a seed: a layer, q, k and v, or a gated
    MLP."""
    torch.manual_seed(0)
    if kind == "layer":
        weight = NF4Weight.from_dense(torch.randn(N, K))
        leaves, width = [torch.zeros(8, K), torch.zeros(N, 8)], K
        A, B = (leaf.requires_grad_() for leaf in leaves)

        def call(x: Tensor) -> Tensor:
            return adapted_linear(x, weight, A=A, B=B, scaling=2.0)

    else:
        made = attentions.stock_model if kind == "group" else gated_models.stock_model
        model = lora_fast.accelerate(made("nf4"))
        leaves = [p for p in model.parameters() if p.requires_grad]
        width, call = K if kind == "group" else gated_models.H, model.get_base_model()

    def run(seed: int, reentrant: bool = False) -> list[Tensor]:
        torch.manual_seed(seed)
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn(leaf.shape))
                leaf.grad = None
        x = torch.randn(rows, width, dtype=BF16 if kind == "layer" else None).requires_grad_()
        y = checkpoint(call, x, use_reentrant=reentrant)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
        return [y.detach(), x.grad, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    return run


@pytest.fixture
def with_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """NF4 weights are decoded by launches of their own."""
    from lora_fast.backends import selection, triton_plans

    backend = triton_plans.PlannedTritonBackend(cublas=True)
    monkeypatch.setattr(selection, "_triton", lambda name: backend)


@pytest.mark.offline
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("limit", [1 << 40, 0])
@pytest.mark.parametrize("kind", ["layer", "group", "mlp"])
def test_a_checkpointed_call_of_nf4_weights_is_repeated(
    launches: Any, bound: list[str], kind: str, limit: int, reentrant: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """W is decoded once more where nothing may be saved."""
    monkeypatch.setattr(decoded.bytes_saved, "told", limit)
    run = checkpointed(kind)
    for seed in range(3):
        run(seed, reentrant)
        if seed == 1:
            before = len(bound)
    assert len(bound) == before
    third = third_of(launches)
    weights = 1 if kind == "layer" else 3
    assert sum(name.startswith("nf4") for name in third) == (2 if limit else 3) * weights


@pytest.mark.offline
def test_as_many_weights_as_there_is_room_for_are_decoded_once(
    launches: Any, bound: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """q, the widest, and not k and v."""
    monkeypatch.setattr(decoded.bytes_saved, "told", 4 * 20 * K)
    run = checkpointed("group")
    for seed in range(3):
        run(seed)
    assert len(bound) == 2 * len(launches) // 3
    assert sum(name.startswith("nf4") for name in third_of(launches)) == 2 * 3 + 2


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["layer", "group", "mlp"])
def test_repeated_checkpoints_have_the_same_bits(
    kind: str, with_cublas: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executed: with plans and without, with decoded weights that are saved and without."""
    from lora_fast.backends import triton_plans
    from tests import ptx_executor

    monkeypatch.setattr(decoded.bytes_saved, "told", 1 << 40)
    with ptx_executor.installed(90), lora_fast.set_backend("triton"):
        run, plain = checkpointed(kind, rows=70), {}
        with monkeypatch.context() as patch:
            patch.setattr(decoded.bytes_saved, "told", 0)
            for seed in (1, 2):
                triton_plans.forget()
                plain[seed] = run(seed)
        triton_plans.forget()
        for seed in (1, 2, 1, 2):
            for one, other in zip(run(seed), plain[seed], strict=True):
                assert_same_bits(one, other, name="result")
