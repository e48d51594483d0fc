"""Words that were not zero when a launch started: a trap with a message, or an error before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from equation import Case, fused, make
from lora_fast.kernels import workspace

from tests.ptx_executor import DeviceAssert, PTXError

BF16, FP32 = torch.bfloat16, torch.float32
CASE = Case(M=70, K=64, N=64, R=16, dtype=BF16, adapter_dtype=FP32, factors=("x", "A", "B"))
# The ticket, the count of thread blocks that have left, the flag of the first rows.
TICKET, LEFT, FLAG = 0, 1, 2
CPU = torch.device("cpu")


def _plant(index: int) -> None:
    """A 1 in the words that the next launch of this thread takes."""
    workspace.forget()
    workspace.sync_words(CPU, 10)[index] = 1


def patient_for(rounds: int) -> Callable[[str], str]:
    """The PTX with another bound on waiting; it has the last round's number."""

    def transform(ptx: str) -> str:
        assert ptx.count("16777215") == ptx.count("atom.global.gpu.relaxed")
        return ptx.replace("16777215", str(rounds))

    return transform


def test_a_tile_that_waits_for_ever_traps(ptx_executor):
    """Ticket 0 is never drawn, so the first rows of S are never stored."""
    operands = make(CASE)
    _plant(TICKET)
    with (
        ptx_executor.with_options(transform=patient_for(20)),
        pytest.raises(PTXError, match=r"trap executed.*ticketed_gemm"),
    ):
        fused(operands)


def test_a_launch_for_debugging_says_what_is_wrong(ptx_executor, monkeypatch):
    monkeypatch.setattr(workspace, "DEBUG", True)
    monkeypatch.setattr(workspace, "_check_zero", lambda words: None)
    operands = make(CASE)
    _plant(TICKET)
    with (
        ptx_executor.with_options(transform=patient_for(20)),
        pytest.raises(DeviceAssert, match="words that thread blocks synchronise through"),
    ):
        fused(operands)


@pytest.mark.parametrize("index", [TICKET, LEFT, FLAG])
def test_debugging_refuses_words_that_are_not_zero(typical_executor, monkeypatch, index):
    operands = make(CASE, typical_executor.device)
    expected = fused(operands)
    monkeypatch.setattr(workspace, "DEBUG", True)
    words = workspace.sync_words(typical_executor.device, 10)
    words[index] = 1
    with (
        typical_executor.counting_launches() as names,
        pytest.raises(RuntimeError, match=rf"got 1 that are not, the first words\[{index}\] = 1"),
    ):
        fused(operands)
    assert names == []
    # The words are new after an error, and nothing of the failed call is in the next one.
    results = fused(operands)
    assert all(torch.equal(results[name], value) for name, value in expected.items())


def test_every_launch_is_checked(typical_executor, monkeypatch):
    checked = []
    monkeypatch.setattr(workspace, "DEBUG", True)
    monkeypatch.setattr(workspace, "_check_zero", lambda words: checked.append(words))
    operands = make(CASE, typical_executor.device)
    fused(operands)
    checked.clear()
    with typical_executor.counting_launches() as names:
        fused(operands)
    assert len(checked) == len(names) == 4


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), (None, False)])
def test_the_environment_decides(monkeypatch, value, expected):
    monkeypatch.delenv("LORA_FAST_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("LORA_FAST_DEBUG", value)
    assert workspace._debugs_by_environment() is expected


def test_other_values_are_refused(monkeypatch):
    monkeypatch.setenv("LORA_FAST_DEBUG", "yes")
    with pytest.raises(ValueError, match="LORA_FAST_DEBUG must be 0 or 1, got 'yes'"):
        workspace._debugs_by_environment()
