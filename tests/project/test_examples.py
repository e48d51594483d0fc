"""The examples run offline and end as they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    spec.loader.exec_module(module)
    return module.main()


@pytest.mark.parametrize("name", ["ddp", "fsdp2_qlora"])
def test_those_for_several_processes_say_how_to_start_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=rf"torchrun --nproc_per_node 2 {name}\.py --smoke$"):
        run(name, "--smoke", monkeypatch=monkeypatch)
