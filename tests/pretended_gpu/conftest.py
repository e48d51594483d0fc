"""Kernels of the pretended GPU run in the executor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import lora_fast
from lora_fast.backends import selection
from tests import ptx_executor

from . import device


@pytest.fixture(autouse=True)
def _auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice that users have, on a GPU or on the pretended one."""
    with lora_fast.set_backend("auto"):
        if not device.is_loaded():
            yield
            return
        selection._triton.cache_clear()
        reachable = ("cpu", "cuda")
        with ptx_executor.installed(device.ARCH, check_global_race=True, devices=reachable):
            yield
