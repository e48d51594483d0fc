"""The parts of the GPU day's steps: contests, stand-ins, other programs, models."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import decoder_layer
from bench.gpu_day import (
    commands,
    device,
    integrations,
    linears,
    report,
    stand_in,
    tables,
    timing,
)
from bench.gpu_day.day import Day, day
from bench.gpu_day.modelled import Modelled

CPU = torch.device("cpu")
ABOUT = {"name": "no GPU", "capability": [9, 0], "rehearsal": True}


@pytest.fixture
def today() -> Iterator[Day]:
    with day(rehearse=True) as made:
        yield made


def test_contestants_that_cannot_run_are_left_out_with_the_reason(today: Day) -> None:
    def broken() -> Callable[[], object]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore")

    makers = {"frozen": lambda: list, "peft": broken}
    row = timing.contest(today, makers, baseline="frozen")
    assert row["ok"] and "graph" in row["contestants"]["frozen"]
    failed = row["contestants"]["peft"]["failed"]
    assert failed == "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"
    row = timing.contest(today, {"frozen": lambda: list, "lora_fast": broken}, baseline="frozen")
    assert row["ok"] is False


def test_a_capture_that_fails_leaves_eager_times_and_a_reason(
    today: Day, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(stand_in.graph, "__enter__", refuse)
    row = timing.contest(today, {"frozen": lambda: list}, baseline="frozen")
    (found,) = row["contestants"].values()
    assert "eager" in found and "graph" not in found
    assert "capturing" in found["graph_failed"]
    assert row["new_process"]
    assert "failed" in tables.contests({"case": row}, Modelled(None))


def test_without_its_floor_a_contest_still_has_times(today: Day) -> None:
    def broken() -> Callable[[], object]:
        raise RuntimeError("no")

    row = timing.contest(today, {"frozen": broken, "peft": lambda: list}, baseline="frozen")
    assert "over_baseline" not in row["contestants"]["peft"]["eager"]
    assert "| case | peft | 1.000" in tables.contests({"case": row}, Modelled(None))


def test_rounds_fill_the_time_within_their_bounds(today: Day) -> None:
    """Stand-ins report one millisecond per call."""
    for seconds, rounds in ((0.0, 3), (0.02, 10), (9.0, 50)):
        longer = dataclasses.replace(today, seconds=seconds, rounds=(3, 50))
        row = timing.contest(longer, {"a": lambda: list, "b": lambda: list}, baseline="a")
        assert row["contestants"]["a"]["eager"]["seconds"]["rounds"] == rounds


@pytest.mark.parametrize(
    "misuse",
    [
        lambda: torch.cuda.Event(no_such_option=True),
        lambda: torch.cuda.synchronize(1, 2),
        lambda: torch.cuda.CUDAGraph().replay(),
        lambda: torch.cuda.stream("main"),
        lambda: torch.cuda.graph(torch.cuda.CUDAGraph(), no_such_option=1),
        lambda: torch.cuda.Event().elapsed_time(torch.cuda.Event()),
    ],
)
def test_stand_ins_refuse_what_torch_refuses(misuse: Callable[[], Any], today: Day) -> None:
    with pytest.raises((TypeError, RuntimeError)):
        misuse()


def test_stand_ins_are_gone_afterwards() -> None:
    before = torch.cuda.Event, torch.cuda.synchronize
    with day(rehearse=True):
        assert torch.cuda.Event is stand_in.Event
    assert (torch.cuda.Event, torch.cuda.synchronize) == before


def executable(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(body))
    path.chmod(0o755)


NCU = """
    print("==PROF== Connected")
    moved = ["dram__bytes_read.sum", "dram__bytes_write.sum"]
    names = ["ID", "Kernel Name", *moved, "gpu__time_duration.sum"]
    print(*('"%s"' % name for name in names), sep=",")
    print('"","","byte","byte","ns"')
    print('"0","ticketed_gemm","1,000","500","2000"')
    print('"1","strips","30","n/a","10"')
"""


def test_ncu_is_read(today: Day, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(tmp_path, "ncu", NCU)
    monkeypatch.setenv("PATH", str(tmp_path))
    dense, _ = commands.profile(today)
    row = dense.run()
    assert row["ok"] and row["bytes"] == 1530
    assert row["kernels"][0] == {
        "kernel": "ticketed_gemm",
        "nanoseconds": 2000.0,
        "bytes_read": 1000.0,
        "bytes_written": 500.0,
    }
    text = tables.profile({"ncu dense": row}, Modelled(90))
    assert "| ncu dense | ticketed_gemm | 2.0 |" in text
    full_size = tables.profile({"ncu dense": {**row, "M": 8192, "K": 4096}}, Modelled(90))
    assert re.search(r"\| ncu dense \| all kernels \| - \| 0\.0 \(counted: 5\d\d\.\d\)", full_size)


@pytest.mark.parametrize(
    ("said", "code", "ok"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= ERROR SUMMARY: 3 errors", 9, False),
        ("Device not supported", 0, False),
    ],
)
def test_the_sanitizer_must_say_that_there_are_no_errors(
    said: str, code: int, ok: bool, today: Day, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path, "compute-sanitizer", f"import sys; print({said!r}); sys.exit({code})")
    monkeypatch.setenv("PATH", str(tmp_path))
    row = commands.sanitizer(today)[0].run()
    assert row["ok"] is ok and said.strip("= ") in row["found"]


def test_failing_tests_are_a_result_with_their_names(
    today: Day, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(command: tuple[str, ...], **env: str) -> subprocess.CompletedProcess[str]:
        counts = [{"passed": 1, "failed": 1, "skipped": 0}]
        Path(command[command.index("--json") + 1]).write_text(json.dumps(counts))
        return subprocess.CompletedProcess(command, 1, "FAILED tests/test_x.py::test_y - no\n..")

    monkeypatch.setattr(commands, "_run", failing)
    row = commands.gpu_tests(today)[0].run()
    assert row["ok"] is False and row["failures"] == ["FAILED tests/test_x.py::test_y - no"]


def test_clocks_are_read_while_the_device_is_busy(
    today: Day, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(
        tmp_path, "nvidia-smi", "import time; time.sleep(0.3); print('1980, 2619, 55, 690.1, P0')"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    calls: list[int] = []
    found = device.clocks_under(lambda: calls.append(1), today)
    assert found is not None and found["clocks.sm"] == "1980" and found["pstate"] == "P0"
    assert len(calls) > 1
    executable(tmp_path, "nvidia-smi", "raise SystemExit(9)")
    assert device.clocks_under(list, today) is None


def test_work_of_a_layer() -> None:
    """W [2, 4], x [3, 4], rank 1, bfloat16."""
    case = linears.Case(3, 4, 2, 1, torch.bfloat16, "dense")
    forward, both = (linears.work(case, way) for way in linears.DIRECTIONS)
    assert forward.flops == 2 * 3 * 4 * 2 + 2 * 3 * (4 + 2)
    assert both.flops == 2 * 2 * 3 * 4 * 2 + 3 * 2 * 3 * (4 + 2)
    assert forward.bytes == 2 * (12 + 6 + 8 + 6)
    assert both.bytes == 2 * (3 * 12 + 2 * 6 + 2 * 8 + 2 * 6)


def measured_layer(**changes: Any) -> dict[str, Any]:
    row = {"layer": "Llama-3-8B", "weight": "dense", "M": 8192, "R": 16, "p": 0.0}
    return {**row, "baseline": "frozen", **changes}


def test_modelled_numbers_are_those_of_the_offline_results() -> None:
    kept = json.loads(
        (Path(report.__file__).parents[1] / "results/offline/results.json").read_text()
    )
    rows = [dict(zip(kept["columns"], row, strict=True)) for row in kept["counts"]]
    (wanted,) = (
        row
        for row in rows
        if row["layer"].startswith("Llama-3-8B") and row["arch"] == 90 and row["who"] == "lora_fast"
        and (row["M"], row["R"], row["weight"], row["p"]) == (8192, 16, "nf4", 0.1)
    )  # fmt: skip
    modelled = Modelled(90)
    nf4 = measured_layer(weight="nf4", p=0.1)
    assert modelled.over_floor(nf4, "lora_fast") == wanted["over_frozen"]["H100"]
    assert modelled.over_floor(nf4, "frozen") == 1.0
    assert modelled.extra_seconds(nf4, "frozen") == 0.0
    extra = modelled.extra_seconds(measured_layer(), "peft")
    assert extra is not None and 1e-3 < extra < 10e-3  # 10.9 GB at 2.8 TB/s are 3.9 ms
    linear = {"K": 4096, "N": 4096, "direction": "forward+backward"}
    assert modelled.over_floor(measured_layer(layer="", **linear), "peft") is not None
    assert modelled.over_floor(measured_layer(layer="", **linear, M=3), "peft") is None
    assert modelled.over_floor(measured_layer(), "peft compiled") is None
    packed = measured_layer(layer="", **linear, weight="nf4", baseline="bitsandbytes")
    assert modelled.over_floor(packed, "bitsandbytes") == 1.0
    assert modelled.over_floor(packed, "frozen") is None
    assert Modelled(75).over_floor(measured_layer(), "peft") is None


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


LAYER = decoder_layer.Case(decoder_layer.SMALL[0], "dense", 4, 0.0, 1, 8, torch.float32)


def test_unsloth_gets_all_projections_and_gives_all_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its functions are replaced by equivalents: the code around them is ours."""
    used = []

    def mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
        used.append("mlp")
        y: torch.Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y

    def qkv(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        used.append("qkv")
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def o(self: Any, x: torch.Tensor) -> torch.Tensor:
        used.append("o")
        y: torch.Tensor = self.o_proj(x)
        return y

    fake_module(monkeypatch, "unsloth")
    fake_module(
        monkeypatch, "unsloth.kernels",
        apply_lora_mlp_swiglu=mlp, apply_lora_qkv=qkv, apply_lora_o=o,
    )  # fmt: skip
    found: Any = integrations.unsloth(LAYER, CPU)()
    assert used == ["qkv", "o", "mlp"]
    peft: Any = decoder_layer.makers(LAYER, CPU)["peft"]()()
    assert len(found) == len(peft)
    sizes = {tuple(sorted(t.shape for t in grads)) for grads in (found, peft)}
    assert len(sizes) == 1
    torch.testing.assert_close(found[0], peft[0])


def test_liger_is_applied_before_the_layer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = []
    fake_module(monkeypatch, "liger_kernel")
    patch = types.SimpleNamespace(
        apply_liger_kernel_to_llama=lambda **options: applied.append(options)
    )
    fake_module(monkeypatch, "liger_kernel.transformers", monkey_patch=patch)
    integrations.liger(LAYER, "lora_fast", CPU)()
    assert applied == [{"cross_entropy": False, "fused_linear_cross_entropy": False}]
