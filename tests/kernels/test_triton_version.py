"""The kernels name the Triton that they need before any other error."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("triton")
from lora_fast.kernels.triton_version import SUPPORTED, supported

ROOT = Path(__file__).resolve().parents[2]
# What lora_fast/ imports, but for `workspace`, which needs no Triton.
ENTRIES = ("environment", "dropout", "nf4_decode", "nf4_tile", "out_of_resources",
           "row_norms", "strips", "ticketed_gemm", "weight_update")  # fmt: skip


@pytest.mark.parametrize("version", ["3.5.1", "3.7.1+git0af31", "3.10.0", "3.9.0rc1"])
def test_a_version_in_the_range_is_taken(version: str) -> None:
    supported(version)


@pytest.mark.parametrize("version", ["2.3.1", "3.5.0", "3.5", "4.0.0"])
def test_another_is_refused_with_the_range_and_what_to_install(version: str) -> None:
    told = rf"need triton>=3\.5\.1,<4, got {re.escape(version)}: pip install 'triton>=3\.5\.1,<4'"
    with pytest.raises(ImportError, match=told):
        supported(version)


def test_whatever_the_package_imports_of_the_kernels_checks() -> None:
    code = """if True:
        import importlib, sys, triton
        triton.__version__ = "3.4.0"
        for name in sys.argv[1:]:
            for loaded in [name for name in sys.modules if name.startswith("lora_fast.kernels.")]:
                del sys.modules[loaded]
            try:
                importlib.import_module("lora_fast.kernels." + name)
            except ImportError as error:
                assert "got 3.4.0" in str(error), error
            else:
                raise AssertionError(name)
    """
    subprocess.run([sys.executable, "-c", code, *ENTRIES], cwd=ROOT, check=True)


def test_the_package_asks_for_the_same_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (asked,) = (line for line in project["dependencies"] if line.startswith("triton"))
    first, end = SUPPORTED
    assert asked.startswith("triton>={}.{}.{},<{};".format(*first, end[0]))
