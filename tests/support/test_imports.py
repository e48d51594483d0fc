"""The test files that a row without the command line leaves out."""

from __future__ import annotations

from pathlib import Path

import imports
import pytest
from imports import ROOT, needs

from tests.matrix import COMMAND_LINE, TRL

FILES = sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two test files, of which one needs lora_fast.cli by way of a support and a bench file."""
    written = {
        "tests/test_near.py": "import lora_fast, bench.fast\nfrom lora_fast import accelerate\n",
        "tests/test_far.py": "def test() -> None:\n    from support import run\n",
        "tests/kernels/support.py": "from bench import slow\n",
        "bench/__init__.py": "",
        "bench/slow.py": "from .deep import f\n",
        "bench/deep.py": "from lora_fast.cli import app\n",
        "bench/fast.py": "import lora_fast.climate\n",
    }
    for name, text in written.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(imports, "ROOT", tmp_path)
    for cached in (imports._closure, imports._imports, imports._own_files):
        cached.cache_clear()
    yield tmp_path
    for cached in (imports._closure, imports._imports, imports._own_files):
        cached.cache_clear()


def test_imports_are_followed(repository: Path) -> None:
    near, far = (repository / "tests" / name for name in ("test_near.py", "test_far.py"))
    assert needs(far, ["lora_fast.cli"])
    assert needs(far, ["absent", "lora_fast"])
    assert not needs(near, ["lora_fast.cli"]), "lora_fast.climate is another module"
    assert needs(near, ["lora_fast.accelerate"]), "what is imported from a package may be a module"
    assert not needs(far, ["absent"])


def test_the_tests_of_the_library_stay() -> None:
    left_out = {_name(file) for file in FILES if needs(file, (*COMMAND_LINE, *TRL))}
    assert {"cli/test_app", "training/test_run", "acceleration/test_callback_trl"} <= left_out
    # One file of each part of the library, those first whose packages differ from row to row.
    stay = {
        "acceleration/test_switch", "acceleration/test_callback", "operation/test_compile",
        "modules/test_conversion", "project/test_distributed", "test_functional",
        "kernels/test_kernels", "base_layer/test_merging", "peft_layers/test_model_families",
        "modules/test_lora", "test_nf4", "optim/test_delta_lora", "project/test_packaging",
        "files/test_peft_files", "peft_layers/test_lora_layers", "acceleration/test_report",
    }  # fmt: skip
    assert stay <= {_name(file) for file in FILES}
    assert not stay & left_out
    trl_alone = left_out - {_name(file) for file in FILES if needs(file, COMMAND_LINE)}
    recipes = {"acceleration/test_callback_trl", "experts/test_guide"}
    assert trl_alone == {*recipes, "project/test_peft_suite"}


def _name(file: Path) -> str:
    return file.relative_to(ROOT / "tests").with_suffix("").as_posix()
