"""Every benchmark report names the device it ran on."""

from __future__ import annotations

import pytest
import torch

from .instruments.device_label import default_device, label, steady


def pytest_configure() -> None:
    steady(default_device())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(label(default_device()))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return default_device()
