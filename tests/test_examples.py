"""The examples run offline and end as they say."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    spec.loader.exec_module(module)
    return module.main()


def test_sft_with_trl_has_the_losses_of_stock(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("sft_trl", "--smoke", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    # Checkpointing recomputes all layers of a block but the last.
    assert "14 of 14 adapted layers fused; 130 fused calls, 0 fallback calls" in printed
    first, last = re.search(r"^loss (\S+) → (\S+) in one process$", printed, re.MULTILINE).groups()
    assert float(last) < 0.7 * float(first)
    apart = re.search(r"largest relative difference of a step's loss (\S+),", printed).group(1)
    assert float(apart) <= 1e-4


@pytest.mark.parametrize("name", ["ddp", "fsdp2_qlora"])
def test_those_for_several_processes_say_how_to_start_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=rf"torchrun --nproc_per_node 2 {name}\.py --smoke$"):
        run(name, "--smoke", monkeypatch=monkeypatch)
