"""The routes that a report names: those of the queries that can be a layer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import Mlp, accelerated_copy, lora_layers, peft_model

pytest.importorskip("triton")
from tuner_queries import BF16, FP32, NF4, PLAIN

import lora_fast
from lora_fast.acceleration import routes
from lora_fast.tuning import plans
from lora_fast.tuning import tuner as tuning
from lora_fast.tuning.plans import SWITCHES


@pytest.fixture(autouse=True)
def _is_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on a CPU, as if it were a GPU."""
    monkeypatch.setattr(routes, "uses_triton", lambda device: True)


@pytest.fixture
def meets(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the tuner have chosen the plans of some queries."""

    def chosen(*met: tuple[plans.Query, plans.Plan]) -> None:
        monkeypatch.setattr(tuning.tuner, "chosen", lambda device: list(met))

    return chosen


def routes_of(model: Any) -> list[str]:
    return [layer.route for layer in lora_fast.report(model).layers]


def forward_of(layer: Any, query: plans.Query = PLAIN) -> plans.Query:
    """The query of a forward pass of `layer`."""
    base, bias = layer.base_layer, layer.base_layer.bias is not None
    return query._replace(
        op=plans.FORWARD, K=base.in_features, N=(base.out_features,), R=(layer.r["default"],),
        switches=tuple(bias and name == "bias" for name in SWITCHES),
        weights=query.weights if query.is_nf4 else (base.weight.dtype,),
    )  # fmt: skip


def backward(query: plans.Query) -> plans.Query:
    """Which is not given a frozen bias."""
    return query._replace(op=plans.BACKWARD, switches=(False,) * len(SWITCHES))


def test_the_route_is_that_of_the_operations_so_far(
    meets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = accelerated_copy(peft_model(model=Mlp()))
    with lora_fast.set_backend("triton"):
        assert routes_of(model) == ["fused"] * 2
    assert routes_of(model) == ["chosen at its first call"] * 2
    query = forward_of(lora_layers(model)[0])
    meets(
        (query, plans.AUGMENTED),
        (backward(query), plans.HYBRID),
        (query._replace(M=8192), plans.HYBRID),
        (query._replace(M=64), plans.FUSED),
    )
    assert routes_of(model) == [
        "forward fused (M ≤ 64), augmented (M ≤ 2048), hybrid (more); backward hybrid",
        "chosen at its first call",
    ]
    assert routes_of(model)[0] in str(lora_fast.report(model))
    monkeypatch.setattr(routes, "uses_triton", lambda device: False)
    assert routes_of(model) == ["torch"] * 2


def test_the_routes_of_other_layers_are_theirs(meets: Any) -> None:
    """Of another width, rank, weight, bias or adapter, or in a group."""
    model = accelerated_copy(peft_model())
    query = forward_of(lora_layers(model)[0])
    (N,), (R,) = query.N, query.R
    meets(
        (query, plans.HYBRID),
        *(
            (other, plans.FUSED)
            for other in (
                query._replace(K=query.K + 1),
                query._replace(N=(N + 1,)),
                query._replace(R=(R + 1,)),
                query._replace(weights=((64, True),)),
                query._replace(weights=(BF16,)),
                query._replace(adapter=BF16),
                query._replace(switches=(False,) * len(SWITCHES)),
                query._replace(N=(N, 8), R=(R, R), weights=query.weights * 2),
            )
        ),
    )
    assert routes_of(model) == ["forward hybrid"]


def test_nf4_weights_of_other_blocks_are_others(meets: Any) -> None:
    model = accelerated_copy(peft_model("nf4"))
    (layer,) = lora_layers(model)
    state = layer.base_layer.weight.quant_state
    own = int(state.blocksize), bool(state.nested)
    query = forward_of(layer, NF4)
    meets(
        (query._replace(weights=(own,)), plans.AUGMENTED),
        (query._replace(weights=((own[0], not own[1]),)), plans.FUSED),
        (query._replace(weights=((2 * own[0], own[1]),)), plans.FUSED),
    )
    assert routes_of(model) == ["forward augmented"]


def test_a_backward_pass_of_a_decoded_weight_is_that_of_its_layer(meets: Any) -> None:
    model = accelerated_copy(peft_model("nf4"))
    (layer,) = lora_layers(model)
    state = layer.base_layer.weight.quant_state
    query = forward_of(layer, NF4)._replace(weights=((int(state.blocksize), bool(state.nested)),))
    dense = query._replace(weights=(BF16,))
    meets(
        (query, plans.AUGMENTED),
        (backward(dense), plans.HYBRID),
        # Of a dense layer.
        (dense, plans.FUSED),
        # W is decoded to the dtype of x.
        (backward(query._replace(weights=(FP32,))), plans.FUSED),
    )
    assert routes_of(model) == ["forward augmented; backward hybrid"]


def test_routes_that_differ_for_equal_rows_say_by_what(meets: Any) -> None:
    model = accelerated_copy(peft_model())
    query = forward_of(lora_layers(model)[0], PLAIN._replace(dtype=FP32))
    dropping = tuple(
        on or name == "dropout" for on, name in zip(query.switches, SWITCHES, strict=True)
    )
    meets((query, plans.HYBRID), (query._replace(tf32=True), plans.FUSED))
    assert routes_of(model) == [
        "forward hybrid (M ≤ 2048, float32), fused (M ≤ 2048, float32-tf32)"
    ]
    back = backward(query)
    meets(
        (back, plans.HYBRID),
        (back._replace(switches=dropping), plans.FUSED),
        (back._replace(M=64, dtype=BF16), plans.FUSED),
    )
    assert routes_of(model) == [
        "backward fused (M ≤ 64), hybrid (M ≤ 2048, with: nothing), "
        "fused (M ≤ 2048, with:bias,dropout)"
    ]


def test_choices_of_another_device_or_setting_are_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = tuning.Tuner(times=False)
    monkeypatch.setattr(tuning, "tuner", ours)
    monkeypatch.setattr(tuning, "place_of", lambda device: tuning.Place(device.type, 90))
    model = accelerated_copy(peft_model())
    query = forward_of(lora_layers(model)[0])
    ours.plan(query, torch.device("meta"), print)
    assert routes_of(model) == ["chosen at its first call"]
    ours.plan(query, torch.device("cpu"), print)
    assert routes_of(model) == ["forward hybrid"]
    torch.use_deterministic_algorithms(True)
    try:
        assert routes_of(model) == ["chosen at its first call"]
    finally:
        torch.use_deterministic_algorithms(False)
