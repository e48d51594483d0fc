"""A Triton driver whose launches do nothing: what is left of a step is the host's work."""

from __future__ import annotations

from typing import Any

from . import stub_driver

# Triton caches compiled kernels by device, and each of them keeps its launcher.
_OTHER_DEVICES = 500


class Launchless(stub_driver.StubDriver):
    """The stub driver, whose launches are not even recorded."""

    def __init__(self, arch: int) -> None:
        super().__init__(stub_driver.Log(stub_driver.target_of(arch)))
        self.index += _OTHER_DEVICES
        self.launcher_cls = self._launcher

    @staticmethod
    def _launcher(source: Any, metadata: Any) -> Any:
        return _nothing


def _nothing(*arguments: Any) -> None:
    pass
