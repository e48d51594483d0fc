"""The acceptance run on PEFT's own tests: a part of it, and that it notices what it must."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 - which PEFT's tests import: tests/support/imports.py must see it
import pytest
from pins import is_pinned

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peft_suite"))

import run as suite

FUSED = ["lora.Linear", True, "fused", "", 3]


def arm(name: str, **tests: Any) -> suite.Arm:
    """An arm whose tests are given as (outcome, error, calls)."""
    keys = ("outcome", "error", "calls")
    return suite.Arm(name, {k: dict(zip(keys, v, strict=True)) for k, v in tests.items()}, 1.0)


STOCK = arm("stock", a=("passed", "", []), b=("failed", "OSError: no hub at 0x1", []))


def verdict(a: Any, b: Any = ("failed", "OSError: no hub at 0x2", [])) -> list[str]:
    return suite.verdict(STOCK, arm("accelerated", a=a, b=b))


def test_equal_runs_without_a_broken_promise() -> None:
    assert verdict(("passed", "", [FUSED])) == []
    assert verdict(("passed", "", [FUSED, ["lora.Linear", False, "fallback", "merged", 2]])) == []
    assert verdict(("passed", "", [FUSED, ["lora.Linear", True, "raised", "shape of x", 2]])) == []
    hooks = ["lora.Linear", True, "fallback", "hooks on base layer", 1]
    assert verdict(("passed", "", [FUSED, hooks])) == []


@pytest.mark.parametrize(
    ("a", "b", "problem"),
    [
        (("failed", "AssertionError: 1", [FUSED]), None, "a: passed → failed: AssertionError: 1"),
        (("skipped", "", [FUSED]), None, "a: passed → skipped"),
        (("passed", "", [FUSED]), ("failed", "TypeError: y", []), "OSError: no hub at 0x1 → Type"),
        (("passed", "", []), None, "no call ran fused"),
        (
            ("passed", "", [FUSED, ["vera.Linear", True, "fallback", "merged", 2]]),
            None,
            "a: 2 × vera.Linear: merged",
        ),
    ],
)
def test_what_must_not_be_is_a_problem(a: Any, b: Any, problem: str) -> None:
    (found,) = verdict(a, b) if b else verdict(a)
    assert problem in found


def test_a_test_that_is_missing_is_a_problem() -> None:
    (found,) = suite.changes(STOCK, arm("accelerated", a=("passed", "", [])))
    assert found == "b: ran in one of the runs only"


def test_the_summary_has_both_runs_and_all_calls() -> None:
    merged = ["lora.Linear", False, "fallback", "merged", 2]
    text = suite.summary(STOCK, arm("accelerated", a=("passed", "", [FUSED, merged])))
    assert "passed                 1             1" in text
    assert "failed                 1             0" in text
    assert "calls promised fused: 3 of 3 ran fused (100.00%)" in text
    assert "2 × lora.Linear: merged" in text


def test_a_part_of_it(capfd: pytest.CaptureFixture[str]) -> None:
    """Downloads PEFT's source distribution, once for each environment."""
    code = suite.main(["--files", "vera", "lorafa", "--jobs", "0"])
    printed = capfd.readouterr().out
    assert code == 0, printed
    assert "ran fused (100.00%)" in printed
    # Their number is that of the version that is pinned.
    calls, tests = ("24", "21") if is_pinned("peft") else (r"\d+", r"\d+")
    assert re.search(rf"{calls} × vera.Linear(4bit)?: fused", printed)
    assert re.search(rf"0 problems in {tests} tests", printed)
