"""The benchmark tools themselves: they count correctly, which needs no GPU."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from bench import decoder_layer, gated_mlp, linear, quantised_base
from bench.accuracy_table import run_case as accuracy_of
from bench.instruments.paired import Timings, measure
from bench.linear_cases import Case, build, fused_calls

CPU = torch.device("cpu")
TINY = Case(M=8, K=128, N=64, R=4, dtype=torch.float32, weight="dense")
TINY_NF4 = Case(M=8, K=128, N=64, R=4, dtype=torch.bfloat16, weight="nf4")


def test_ratio_pairs_the_rounds() -> None:
    """A machine that becomes ten times slower half-way does not change the ratio."""
    timings = Timings({"floor": [1, 1, 10, 10, 10], "other": [2, 2, 20, 20, 20]})
    ratio = timings.ratio("other", "floor")
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)


def test_measured_ratio_finds_twice_the_work() -> None:
    def work(rounds: int) -> None:
        for _ in range(rounds):
            sum(range(2000))

    steps = {"one": lambda: work(10), "two": lambda: work(20)}
    ratio = measure(steps, rounds=9, device=CPU, sample_seconds=2e-3).ratio("two", "one")
    assert 1.5 < ratio.median < 2.7


@pytest.mark.parametrize("case", [TINY, TINY_NF4], ids=str)
def test_variants_compute_the_same(case: Case) -> None:
    layers = build(case, CPU)
    assert list(layers) == list(case.variants)
    fast, stock = (layers[name].forward_backward() for name in ("lora_fast", "peft"))
    assert fused_calls(layers["lora_fast"]) == 1
    assert len(fast) == len(stock) == 3
    frozen = "bitsandbytes" if case.weight == "nf4" else "frozen"
    assert not torch.equal(layers["lora_fast"].forward(), layers[frozen].forward())
    for row in accuracy_of(case, CPU):
        assert row["broken"] is None


def test_saved_bytes_counts_what_beyond_x_is_kept() -> None:
    layers = build(TINY_NF4, CPU)
    S = TINY_NF4.M * TINY_NF4.R * 2
    assert layers["lora_fast"].saved_bytes() == S
    float32_copy_of_x = TINY_NF4.M * TINY_NF4.K * 4
    assert layers["peft"].saved_bytes() >= float32_copy_of_x
    assert layers["frozen"].saved_bytes() == layers["bitsandbytes"].saved_bytes() == 0


def test_table_has_a_row_per_direction() -> None:
    rows = linear.run_case(TINY_NF4, CPU, rounds=2)
    json.dumps(rows)
    lines = linear.format_rows(rows).splitlines()
    assert [re.split(r"  +", line)[1] for line in lines] == [
        "direction",
        "forward",
        "forward+backward",
    ]
    assert all(value > 0 for row in rows for value in row["median_seconds"].values())


def test_adapters_and_dropout_are_as_the_case_says() -> None:
    """PEFT's default adapters are float32; dropout changes what reaches them from call to call."""
    case = dataclasses.replace(TINY_NF4, dropout_p=0.5, adapter_dtype=torch.bfloat16)
    for name in ("peft", "lora_fast"):
        layer, default = build(case, CPU)[name], build(TINY_NF4, CPU)[name]
        assert {p.dtype for p in trained(layer.module)} == {torch.bfloat16}
        assert {p.dtype for p in trained(default.module)} == {torch.float32}
        assert not torch.equal(layer.forward(), layer.forward())
        assert torch.equal(default.forward(), default.forward())


def trained(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("weight", ["dense", "nf4"])
@pytest.mark.parametrize("shape", decoder_layer.SMALL, ids=lambda shape: shape.family)
def test_decoder_layers_of_all_contestants_compute_the_same(
    shape: decoder_layer.Shape, weight: str
) -> None:
    """Each step is of its own model; equal seeds make them equal, and ours runs fused."""
    case = decoder_layer.Case(shape, weight, 4, 0.0, 1, 8, torch.float32)
    results = {name: make()() for name, make in decoder_layer.makers(case, CPU).items()}
    peft = results["peft"]
    assert len(results["frozen"]) == 1 and len(peft) == 1 + 2 * len(shape.linears)
    for name in ("peft fp32", "lora_fast", "lora_fast fp32"):
        for mine, theirs in zip(results[name], peft, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert not torch.allclose(results["frozen"][0], peft[0])


def test_decoder_layer_reports_every_contestant() -> None:
    case = decoder_layer.Case(decoder_layer.SMALL[0], "dense", 4, 0.0, 1, 4, torch.float32)
    row = decoder_layer.run(case, CPU, rounds=1, sample_seconds=1e-4)
    assert set(row["over_frozen"]) == set(decoder_layer.CONTESTANTS) - {"frozen"}


def test_a_layer_that_is_not_fused_is_not_timed() -> None:
    case = decoder_layer.Case(decoder_layer.SMALL[0], "dense", 4, 0.0, 1, 4, torch.float32)
    with pytest.raises(RuntimeError, match="not every adapted linear ran fused"):
        decoder_layer.check_fused(decoder_layer.build(case, "peft", CPU))


def test_gated_mlps_of_all_contestants_compute_the_same() -> None:
    results = {}
    for name in gated_mlp.CONTESTANTS:
        model = gated_mlp.build(name, torch.float32, 0.0)
        results[name] = gated_mlp.step_of(model, torch.float32, 4)()
        fused = gated_mlp.saved_bytes(model, torch.float32, 4)
        plain = 4 * 4 * (gated_mlp.H + 2 * gated_mlp.WIDTH)
        if name in ("lora_fast", "lora_fast fp32"):
            assert fused <= 1.06 * plain
        elif name != "frozen":
            assert fused > 1.4 * plain
    assert len(results.pop("frozen")) == 1
    for found in results.values():
        for mine, theirs in zip(found, results["peft"], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_gated_mlps_report_every_contestant() -> None:
    row = gated_mlp.run(torch.bfloat16, 0.1, rounds=1, seconds=1e-4, tokens=4)
    assert set(row["over_peft"]) == {n for n in gated_mlp.CONTESTANTS if n[:4] != "peft"}
    assert set(row["saved"]) == set(gated_mlp.CONTESTANTS)


@pytest.mark.parametrize("kind", quantised_base.BASES)
def test_quantised_bases_report_a_ratio(kind: str) -> None:
    row = quantised_base.run(kind, 0.05, wide=kind == "fp4", rounds=1, seconds=1e-4, tokens=4)
    assert set(row["over_peft"]) == {"median", "low", "high"}
    assert set(row["median_seconds"]) == {"peft", "lora_fast"}
