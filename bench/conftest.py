"""Every benchmark report says what it ran on."""

from __future__ import annotations

import pytest
import torch

from .device_label import default_device, label, steady


def pytest_report_header() -> str:
    return label(steady(default_device()))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return default_device()
