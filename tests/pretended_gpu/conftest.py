"""Kernels of the pretended GPU run in the executor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import lora_fast
from tests import ptx_executor
from tests.ptx_executor.launching import driver

from . import device


@pytest.fixture(autouse=True)
def _auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice that users have, on a GPU or on the pretended one."""
    with lora_fast.set_backend("auto"):
        if not device.is_loaded():
            yield
            return
        # The executor's device has the number of its architecture.
        monkeypatch.setattr(driver.PTXDriver, "get_current_device", lambda self: 0)
        reachable = ("cpu", "cuda")
        with ptx_executor.installed(device.ARCH, check_global_race=True, devices=reachable):
            yield
