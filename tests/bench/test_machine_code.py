"""``python -m bench.machine_code``, and the section of docs/kernels.md on working on a kernel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")
pytest.importorskip("peft")
from lora_fast.kernels.triton_version import VERSION

from bench import machine_code
from bench.offline import __main__ as offline
from bench.offline import one_case, variants

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "docs" / "kernels.md").read_text().partition("## Working on a kernel\n")[2]
SECTION = SECTION.partition("\n## ")[0]

pytestmark = [pytest.mark.offline, pytest.mark.usefixtures("allocating_as_users_do")]


@pytest.mark.parametrize(
    ("stage", "holds"),
    [
        ("ttir", "tt.dot"),
        ("ttgir", "ttng.warp_group_dot"),
        ("llir", "define"),
        ("ptx", "wgmma.mma_async"),
        ("sass", "HGMMA"),
    ],
)
def test_every_stage_of_a_kernel_is_printed(
    stage: str, holds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert machine_code.main(["forward", "--arch", "90", "--show", stage]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# sm_90 forward r16: ") and holds in shown


def test_the_counts_are_those_of_the_machine_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert machine_code.main(["ticketed_gemm"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^# (.*):", shown, re.MULTILINE) == ["sm_90 forward r16", "sm_90 dX r16"]
    (total, _) = map(int, re.findall(r"^instructions +(\d+)$", shown, re.MULTILINE))
    assert machine_code.main(["forward", "--show", "sass"]) == 0
    assert total == len(
        re.findall(r"^ +/\*[0-9a-f]{4,}\*/ ", capsys.readouterr().out, re.MULTILINE)
    )


@pytest.mark.parametrize("kernel", machine_code.KERNELS)
def test_every_kernel_of_the_library_has_a_name(
    kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert machine_code.main([kernel]) == 0
    assert capsys.readouterr().out.startswith("# sm_90 ")


def test_no_kernel_is_missing() -> None:
    """Those with names of their own in a profile are launched; the others are called by them."""
    launched = re.compile(r"@triton\.jit\([^\n]*shown_as[^\n]*\)\ndef (\w+)\(")
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    found = [name for source in sources for name in launched.findall(source)]
    # Dropout's mask, and the kernels of gated MLPs and of experts, are not in a step of one layer.
    others = ("expert", "gated", "store_keep_mask")
    elsewhere = {name for name in found if name.startswith(others)}
    assert set(found) - elsewhere == set(machine_code.KERNELS)


def test_what_a_case_does_not_launch_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert machine_code.main(["nf4_decode", "--rows", "16"]) == 1
    assert "no nf4_decode is launched for this case" in capsys.readouterr().err
    for wrong in ("BLOCK_Q=1", "BLOCK_N=x", "BLOCK_N"):
        with pytest.raises(SystemExit):
            machine_code.main(["forward", "--tile", wrong])
        assert "tile must be NAME=N" in capsys.readouterr().err


def test_the_commands_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"python -m bench\.machine_code ([^#`\n]+)", SECTION)
    assert len(commands) >= 5
    for command in commands:
        assert machine_code.main(command.split()) == 0, command
    assert "sm_90 nf4_decode" in capsys.readouterr().out


@pytest.mark.pinned
def test_the_page_tells_the_instructions_of_the_two_loops(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ((fewer, more),) = re.findall(r"The (\d+) and (\d+) instructions above", SECTION)
    for tile, count in (("descriptors=1", fewer), ("descriptors=0", more)):
        assert machine_code.main(["forward", "--tile", tile]) == 0
        assert f"(main)           {count} instructions" in capsys.readouterr().out


@pytest.mark.skipif(
    VERSION < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton before 3.7 interprets no bounds of a range with NumPy 2.4",
)
def test_the_code_of_the_page_runs_in_the_interpreter(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
    script = tmp_path / "one_layer.py"
    script.write_text(f"{block}\nimport sys\nassert 'lora_fast.kernels.strips' in sys.modules\n")
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "LORA_FAST_BACKEND": "triton"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.pinned
def test_one_case_is_counted_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert offline.main(["--case", "linear,8192,16,dense", "--arch", "90", "--check"]) == 0
    shown = capsys.readouterr().out
    assert "# linear 4096x4096 M8192 r16 dense p=0.0, sm_90: counted and modelled" in shown
    assert "| lora_fast" in shown and "| sm_90 forward r16" in shown
    assert shown.endswith("7 counts, 4 kernels: 0 regressions\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear,8192,16", "case must be LAYER,M,R,WEIGHT"),
        ("layer,8192,16,dense", "the layer must be a part of one of"),
        ("linear,8192,16,int8", "the weight must be dense or nf4"),
        ("linear,many,16,nf4", "M and R must be integers"),
        ("linear,0,16,nf4", "M and R must be positive"),
    ],
)
def test_a_case_is_checked(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        one_case.parse(text)


def test_a_case_is_found_by_a_part_of_its_name() -> None:
    case = one_case.parse("Qwen3-8B, 512, 64, nf4, 0.1")
    assert str(case) == "Qwen3-8B layer M512 r64 nf4 p=0.1"
    assert variants.LINEAR is one_case.parse("linear,1,1,dense").shape
