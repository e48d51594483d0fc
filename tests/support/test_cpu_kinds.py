"""The kind of CPU that tests force takes effect in the code they run."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from cpu_kinds import KINDS, VARIABLE, bitsandbytes_packs, force_for_good, forced
from cpu_kinds import _for_good as for_good

from lora_fast.backends import torch_products


def packs() -> bool:
    return bool(bnb.nn.Linear4bit(32, 32).support_avx512bf16_for_cpu)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_kind(kind: str) -> None:
    before = torch_products.native_dtypes()
    with forced(kind):
        assert torch_products.native_dtypes() == ((torch.bfloat16,) if kind == "packed" else ())
        assert not bitsandbytes_packs() or packs() == (kind == "packed")
    assert torch_products.native_dtypes() == before


def test_both_kinds_run(cpu_kind: str, pytestconfig: pytest.Config) -> None:
    assert cpu_kind in (told := pytestconfig.getoption("cpu_kind"), *KINDS)
    assert told in (None, cpu_kind)
    assert bool(torch_products.native_dtypes()) == (cpu_kind == "packed")


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_goes_on_as_its_parent(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, kind)
    with for_good:
        force_for_good()
        assert bool(torch_products.native_dtypes()) == (kind == "packed")
