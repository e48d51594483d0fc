"""The benchmark tools themselves: no GPU is needed to know that they count and resume rightly."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, linear, llama_layer
from bench.accuracy_table import run_case as accuracy_of
from bench.linear_cases import Case, build, fused_calls
from bench.paired import Timings, measure
from bench.steps import Step, run_steps

CPU = torch.device("cpu")
TINY = Case(M=8, K=128, N=64, R=4, dtype=torch.float32, weight="dense")
TINY_NF4 = Case(M=8, K=128, N=64, R=4, dtype=torch.bfloat16, weight="nf4")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import json, sys, time; {code}", "{json}")


def counting(folder: Path, name: str, limit: float = 60) -> Step:
    """A step that leaves a mark in ``folder`` each time it runs."""
    mark = folder / name
    code = f"open({str(mark)!r}, 'a').write('x'); open(sys.argv[1], 'w').write(json.dumps(7))"
    return Step(name, python(code), limit)


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


@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_llama_layer_runs_every_linear_fused(weight: str) -> None:
    row = llama_layer.run(llama_layer.SMALL, weight, CPU, rounds=1, sample_seconds=1e-4)
    assert set(row["over_frozen"]) == {"peft", "lora_fast"}


def test_steps_resume_where_results_are_missing(tmp_path: Path) -> None:
    out = tmp_path / "results" / "device.json"
    steps = [counting(tmp_path, "first"), counting(tmp_path, "second")]
    assert run_steps(steps[:1], out, {"commit": "a"}, tmp_path, fresh=False)
    assert run_steps(steps, out, {"commit": "b"}, tmp_path, fresh=False)
    results = json.loads(out.read_text())
    assert [results[name]["about"]["commit"] for name in ("first", "second")] == ["a", "b"]
    assert (tmp_path / "first").read_text() == "x"

    assert run_steps(steps[:1], out, {"commit": "c"}, tmp_path, fresh=True)
    results = json.loads(out.read_text())
    assert [results[name]["about"]["commit"] for name in ("first", "second")] == ["c", "b"]
    assert (tmp_path / "first").read_text() == "xx"


@pytest.mark.parametrize(
    ("code", "limit", "reason"),
    [
        ("time.sleep(60)", 1, "not done after 1 s"),
        ("sys.exit(3)", 60, "exit status 3"),
        ("None", 60, "no readable result"),
    ],
)
def test_failed_step_stops_no_other_and_is_tried_again(
    code: str, limit: float, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "device.json"
    steps = [Step("broken", python(code), limit), counting(tmp_path, "sound")]
    assert not run_steps(steps, out, {}, tmp_path, fresh=False)
    assert reason in capfd.readouterr().out
    assert list(json.loads(out.read_text())) == ["sound"]
    assert run_steps([counting(tmp_path, "broken")], out, {}, tmp_path, fresh=False)
    assert sorted(json.loads(out.read_text())) == ["broken", "sound"]


def test_gpu_without_a_gpu_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDA device" in line


def test_result_file_is_named_after_the_device() -> None:
    assert gpu.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
