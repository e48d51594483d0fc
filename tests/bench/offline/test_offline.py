"""python -m bench.offline: counts of PyTorch's operations, its models, its comparison."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("peft")


from bench.instruments.saved_tensors import SavedTensors
from bench.offline import __main__ as command
from bench.offline import (
    band,
    contestants,
    counting,
    issue,
    layers,
    lorafusion_graph,
    regression,
    tables,
    unsloth_graph,
)
from bench.offline.contestants import Case
from bench.offline.operations import (
    Operation,
    OperationCounter,
    Step,
    dropout_as_on_cuda,
)
from lora_fast.tuning.rooflines import BY_ARCH

LINEAR, LLAMA = layers.SHAPES[:2]
MB = 1e6


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def counted(run: Any) -> list[Operation]:
    with OperationCounter() as counter:
        run()
    return counter.operations


@pytest.mark.parametrize(
    ("run", "flops", "read", "written"),
    [
        (lambda: meta(4, 8) @ meta(8, 16).T.T, 1024, 2 * (32 + 128), 2 * 64),
        (lambda: meta(4, 16).addmm_(meta(4, 8), meta(8, 16)), 1024, 2 * (64 + 160), 128),
        (lambda: meta(4, 16).addmm_(meta(4, 8), meta(8, 16), beta=0), 1024, 2 * 160, 128),
        (lambda: meta(2, 4, 8) @ meta(2, 8, 16), 2048, 2 * (64 + 256), 256),
        (lambda: meta(4, 8) + meta(8), 0, 2 * (32 + 8), 64),
        (lambda: meta(8).add_(meta(1).expand(8)), 0, 2 * (8 + 1), 16),
        (lambda: meta(4, 8).to(torch.float32), 0, 64, 128),
        (lambda: torch.zeros(8, device="meta"), 0, 0, 32),
        (lambda: torch.native_dropout(meta(8), 0.1, True), 0, 16, 16 + 8),
    ],
)
def test_an_operation_reads_its_arguments_and_writes_its_results(
    run: Any, flops: int, read: int, written: int
) -> None:
    (operation,) = counted(run)
    assert (operation.flops, operation.read, operation.written) == (flops, read, written)


def test_views_and_allocations_launch_nothing() -> None:
    assert counted(lambda: meta(4, 8).T[1:].unsqueeze(0).detach()) == []
    assert counted(lambda: torch.empty_like(meta(4)).new_empty(3)) == []


def test_uncomputed_results_have_the_shape_and_touch_nothing() -> None:
    x = torch.ones(1 << 20)
    with OperationCounter(compute=False) as counter:
        y = (x * 2).view(1024, 1024) @ x.view(1024, 1024)
        x.add_(1)
    assert y.shape == (1024, 1024)
    assert [op.name for op in counter.operations] == [
        "aten::mul.Tensor",
        "aten::mm",
        "aten::add_.Tensor",
    ]
    assert x.eq(1).all()


def test_dropout_is_counted_as_on_cuda() -> None:
    x = meta(64, 64).requires_grad_()
    with dropout_as_on_cuda(), SavedTensors([]) as saved:
        (operation,) = counted(lambda: torch.nn.functional.dropout(x, 0.1))
    assert operation.name == "aten::native_dropout"
    assert saved.bytes == 64 * 64
    assert torch.nn.functional.dropout.__name__ == "dropout"


def test_peft_is_counted_from_its_own_operations() -> None:
    case = Case(LINEAR, 8192, 16, "dense", 0.0)
    frozen, peft = (contestants.stock(case, kind) for kind in ("frozen", "peft"))
    assert (len(frozen.forward), len(frozen.backward)) == (1, 1)
    assert (len(peft.forward), len(peft.backward)) == (5, 7)
    x, W, factor, S = 8192 * 4096 * 2, 4096 * 4096 * 2, 4096 * 16 * 2, 8192 * 16 * 2
    assert frozen.bytes == 2 * (2 * x + W)
    # Forward: x A, S B, its scaling, the sum. Backward: scaling; dB, dS, dA, dS A; the sum.
    forward = (x + factor + S) + (S + factor + x) + 2 * x + 3 * x
    backward = 2 * x + 2 * (x + S + factor) + (S + factor + x) * 2 + 3 * x
    assert peft.bytes - frozen.bytes == forward + backward
    assert peft.saved_bytes == x + S


@pytest.mark.parametrize(("weight", "launches"), [("dense", (1, 1)), ("nf4", (4, 4))])
def test_decoding_takes_bitsandbytes_three_launches(weight: str, launches: tuple[int, int]) -> None:
    step = contestants.stock(Case(LINEAR, 2048, 16, weight, 0.0), "frozen")
    assert (len(step.forward), len(step.backward)) == launches
    assert step.flops == 4 * 2048 * 4096 * 4096


def test_a_layer_sums_the_gradients_of_its_shared_inputs() -> None:
    step = contestants.stock(Case(LLAMA, 512, 16, "dense", 0.0), "frozen")
    names = [operation.name for operation in step.backward]
    assert names.count("aten::mm") == 7
    assert len(names) - 7 == 3  # q + k + v, gate + up


@pytest.mark.parametrize(
    ("graph", "shape", "launches", "extra_mb"),
    [
        (unsloth_graph, LINEAR, (3, 7), 674),
        (lorafusion_graph, LINEAR, (2, 7), 207),
        (unsloth_graph, LLAMA, (21, 49), 6333),
        (lorafusion_graph, LLAMA, (14, 52), 2024),
    ],
)
def test_the_models_of_others_have_the_size_of_their_graphs(
    graph: Any, shape: layers.Shape, launches: tuple[int, int], extra_mb: int
) -> None:
    step = graph.step(shape, 8192, 16, "dense", 0.0)
    frozen = contestants.stock(Case(shape, 8192, 16, "dense", 0.0), "frozen")
    assert (len(step.forward), len(step.backward)) == launches
    assert round((step.bytes - frozen.bytes) / MB) == extra_mb


def test_what_others_do_not_fuse_is_left_out() -> None:
    assert unsloth_graph.step(LINEAR, 64, 16, "dense", 0.1) is None
    assert lorafusion_graph.step(LINEAR, 64, 16, "nf4", 0.0) is None


def test_what_cublas_adds_its_product_to_is_noted() -> None:
    """Not with beta = 0, and of a bias, which it reads again for each row, its own bytes alone."""
    out, a, b, bias = meta(4, 16), meta(4, 8), meta(8, 16), meta(16)
    operations = counted(
        lambda: (out.addmm_(a, b), out.addmm_(a, b, beta=0), torch.addmm(bias, a, b), a @ b)
    )
    assert [op.added_to for op in operations] == [128, 0, 32, 0]


def test_loops_are_timed_at_the_clock_of_the_data_sheet() -> None:
    for arch, per_cycle in ((80, 2048), (89, 512), (90, 4096), (100, 8192), (120, 512)):
        assert issue.tensor_per_cycle(arch) == per_cycle
    assert issue.cycles_per_second(90) == 132 * 1.83e9


KEPT: dict[str, Any] = {
    "about": {},
    "counts": [
        {
            **dict.fromkeys(counting.COLUMNS, 1),
            **{"who": "lora_fast", "arch": 90, "layer": "L", "launches_backward": 3, "bytes": 100},
        }
    ],
    "launches": [{"arch": 90, "M": 16, "weight": "nf4", "forward": 1, "backward": 3}],
    "kernels": [
        {
            "kernel": "sm_90 forward r16",
            "spilled_bytes": 0,
            "mma": ["HGMMA"],
            "ctas_per_sm": 2,
            "instructions": 1000,
            "main_loop": 0,
            "loops": [{"mma": 4, "integer": 96}],
        }
    ],
    "whole_layers": [{"layer": "L", "who": "lora_fast", "saved_bytes": 1}],
    "activated": [],
}


@pytest.mark.parametrize(
    ("part", "name", "value", "line"),
    [
        ("counts", "launches_backward", 4, "4 launches backward, 3 before"),
        ("counts", "saved_bytes", 2, "2 bytes saved for backward, 1 before"),
        ("counts", "bytes", 101, "101 bytes moved, 100 before"),
        ("counts", "M", 2, "not in the kept results"),
        ("launches", "forward", 2, "sm_90 M=16 nf4: 2 launches forward, 1 before"),
        ("kernels", "spilled_bytes", 8, "spills 8 bytes, 0 before"),
        ("kernels", "mma", [], r"multiplies by \[\], by \['HGMMA'\] before"),
        ("kernels", "ctas_per_sm", 1, "1 CTAs on a multiprocessor, 2 before"),
        ("kernels", "instructions", 1051, "1051 instructions, 1000 before"),
        ("kernels", "loops", [{"integer": 106}], "106 instructions in the main loop, 100 before"),
    ],
)
def test_what_became_worse_is_one_line(part: str, name: str, value: Any, line: str) -> None:
    new = copy.deepcopy(KEPT)
    new[part][0][name] = value
    (found,) = regression.regressions(new, KEPT)
    assert re.search(line, found)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("counts", "launches_backward", 2),
        ("counts", "bytes", 99),
        ("kernels", "instructions", 1050),
        ("kernels", "ctas_per_sm", 3),
    ],
)
def test_what_became_better_is_no_regression_but_a_difference(
    part: str, name: str, value: Any
) -> None:
    new = copy.deepcopy(KEPT)
    assert regression.differences(new, KEPT) == 0
    new[part][0][name] = value
    assert regression.regressions(new, KEPT) == []
    assert regression.differences(new, KEPT) == 1


def test_of_a_kernel_that_is_not_kept_yet_a_spill_is_a_regression() -> None:
    new = copy.deepcopy(KEPT)
    new["kernels"][0] |= {"kernel": "sm_90 other", "instructions": 2000}
    assert regression.regressions(new, KEPT) == []
    assert regression.not_kept(new, KEPT) == ["sm_90 other"]
    new["kernels"][0]["spilled_bytes"] = 8
    assert regression.regressions(new, KEPT) == ["sm_90 other: spills 8 bytes, 0 before"]


def test_results_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / command.FILE
    command._write(path, KEPT)
    assert command._load(path) == {**KEPT, "columns": list(counting.COLUMNS)}
    assert json.loads(path.read_text())["counts"][0][0] == "L"


def test_a_check_without_kept_results_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"run python -m bench\.offline first"):
        command.main(["--check", "--out", str(tmp_path)])


def test_fast_results_never_replace_the_full_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--fast"])
    assert "--fast must come with" in capsys.readouterr().err


def _kernel(name: str, **values: Any) -> dict[str, Any]:
    row = {
        **KEPT["kernels"][0],
        "kernel": name,
        "config": "M128 N128 K64 R16 w8 s3",
        "main_loop_mma": ["HGMMA"],
    }
    return {**row, **values}


MET: list[dict[str, Any]] = [
    _kernel("sm_120 nf4_decode", instructions_per_weight=7.5),
    _kernel("sm_90 forward NF4 r16", loops=[{"integer": 250}]),
    _kernel("sm_90 forward r16"),
    _kernel("sm_90 forward r16 up to 16 rows", config="M16 N32 K256", main_loop_mma=["HMMA"]),
    _kernel("sm_100 forward r16", main_loop_mma=["UTCHMMA"]),
]
LAUNCHES = [
    {
        "arch": 90,
        "M": M,
        "weight": weight,
        "forward": 1 + (M > 64) * (weight == "nf4"),
        "backward": 3,
    }
    for M in (16, 8192)
    for weight in ("dense", "nf4")
]


def _missed(launches: list[dict[str, Any]], kernels: list[dict[str, Any]]) -> list[str]:
    lines = tables.targets([], launches, kernels).splitlines()
    return [line for line in lines if line.endswith("| NO  |")]


def test_a_target_that_is_missed_says_so() -> None:
    assert _missed(LAUNCHES, MET) == []
    for index, values, words in (
        (0, {"instructions_per_weight": 7.75}, "instructions per weight"),
        (1, {"loops": [{"integer": 251}]}, "instructions in the K-loop"),
        (1, {"ctas_per_sm": 1}, "without 2 CTAs"),
        (2, {"main_loop_mma": ["HMMA"]}, "do not multiply by HGMMA"),
        (4, {"main_loop_mma": []}, "do not multiply by UTCHMMA"),
        (4, {"spilled_bytes": 8}, "kernels that spill"),
    ):
        kernels = [{**row, **values} if i == index else row for i, row in enumerate(MET)]
        (line,) = _missed(LAUNCHES, kernels)
        assert words in line
    decoded = [{**row, "forward": 2} if row["weight"] == "nf4" else row for row in LAUNCHES]
    (line,) = _missed(decoded, MET)
    assert "launches that NF4 adds forward" in line


def test_the_committed_tables_are_those_of_the_committed_results() -> None:
    kept = command._load(command.RESULTS / command.FILE)
    text = (command.RESULTS / "tables.md").read_text()
    assert tables.targets(kept["counts"], kept.get("launches", []), kept["kernels"]) in text
    assert tables.summary(kept["counts"]) in text
    assert tables.routes(kept["counts"]) in text
    short = tables.in_short(kept["counts"], kept["whole_layers"])
    assert short in text
    assert short in (Path(__file__).parents[3] / "README.md").read_text()
    for name in {row["layer"] for row in kept["counts"]}:
        assert tables._layer(kept["counts"], name) in text


def test_a_slower_triton_slows_what_triton_multiplies() -> None:
    h100 = BY_ARCH[90]
    product = Operation("x W + S B", int(h100.flops), 0, 0, tile=lorafusion_graph.TILE)
    strips = Operation("strips", 0, int(h100.bytes), 0)
    frozen = Step([replace(product, tile=None)])
    both = Step([product], [strips])
    at_once, slower = (band.over_frozen(both, frozen, [h100], e)["H100"] for e in (1.0, 0.5))
    assert slower - at_once == pytest.approx(1.0, rel=1e-3)
    theirs = Step([replace(product, tile=None)], [strips])
    same = [band.over_frozen(theirs, frozen, [h100], e)["H100"] for e in (1.0, 0.5)]
    assert same[0] == same[1] == pytest.approx(at_once, rel=1e-3)


def test_the_activation_counts_on_both_sides() -> None:
    """14 passes over 8192 × 14336 elements of 2 bytes, 3.3 GB, beside 8.96 ms of products."""
    case = Case(LLAMA, 8192, 16, "dense", 0.0)
    assert band.with_activation(case, 1.0, "H100") == 1.0
    share = (band.with_activation(case, 2.0, "H100") - 1.0) ** -1
    assert share == pytest.approx(1 + 1.1 / 9.0, rel=0.02)


def test_the_default_route_is_no_slower_than_hybrid_at_worst() -> None:
    """Of the committed results: cuBLAS multiplies many rows with every W, so e changes nothing, and
    the kernels alone take longer at the lower end."""
    counts = command._load(command.RESULTS / command.FILE)["counts"]
    ours = [row for row in counts if row["who"] == "lora_fast" and row["M"] >= 2048]
    assert ours and all(row["over_frozen"] == row["over_frozen_slow"] for row in ours)


def test_the_picture_of_a_training_step_has_the_counted_numbers() -> None:
    root = Path(__file__).parents[3]
    picture = (root / "docs" / "training_step.svg").read_text()
    kept = command._load(command.RESULTS / command.FILE)
    of_main = tables._select(kept["counts"], tables.LINEAR, "dense", 0.0)
    for who, name in (("peft", "PEFT"), ("lora_fast fused", "lora_fast, fused")):
        row = next(row for row in of_main if row["who"] == who and row["arch"] in (None, 90))
        launches = row["launches_forward"] + row["launches_backward"]
        assert f">{name}: {launches} launches, {row['bytes'] / MB:.0f} MB<" in picture
    each = [
        f">{op.bytes / MB:.0f} MB<" for op in contestants.stock(counting.MAIN, "peft").operations
    ]
    assert re.findall(r">\d+ MB<", picture) == each
    ours = re.findall(r", (\d+) MB<", picture[picture.index("lora_fast, fused: 4") :])
    assert sum(map(int, ours[1:])) == pytest.approx(int(ours[0]), abs=2)


def test_the_readme_tells_the_worst_case() -> None:
    counts = command._load(command.RESULTS / command.FILE)["counts"]
    case = ("layer", "M", "R", "weight", "p")
    of = {(row["who"], *(row[n] for n in case)): row for row in counts if row["arch"] in (None, 90)}
    times = {
        key[1:]: (row["over_frozen"]["H100"], of["peft", *key[1:]]["over_frozen"]["H100"])
        for key, row in of.items()
        if key[0] == "lora_fast"
    }
    (layer, M, R, *_), (ours, peft) = max(times.items(), key=lambda item: item[1][0] / item[1][1])
    readme = " ".join((command.RESULTS.parents[2] / "README.md").read_text().split())
    assert f"for a {layer}, M = {M}, r = {R}, it is modelled at {ours:.2f}" in readme
    assert f"where PEFT is at {peft:.2f}" in readme
