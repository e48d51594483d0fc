"""What operations ask of a backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from lora_fast.backends.protocol import Backend
from lora_fast.backends.selection import backend_for
from lora_fast.operation import autograd, compiled_ops


class Call(NamedTuple):
    """A pass, forward or backward, of so many layers."""

    name: str
    backend: str
    layers: int


class _Telling:
    """A backend that tells of its passes before it makes them."""

    def __init__(self, backend: Backend, told: list[Call]) -> None:
        self._backend, self._told = backend, told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(self, x: Any, fs: Any, needs: Any) -> Any:
        self._told.append(Call("forward", self._backend.name, len(fs)))
        return self._backend.forward(x, fs, needs)

    def backward(self, dYs: Any, *rest: Any) -> Any:
        self._told.append(Call("backward", self._backend.name, len(dYs)))
        return self._backend.backward(dYs, *rest)


def watch(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The passes that operations make from now on, compiled ones included."""
    calls: list[Call] = []
    for module in (autograd, compiled_ops):
        monkeypatch.setattr(
            module, "backend_for", lambda *which: _Telling(backend_for(*which), calls)
        )
    return calls
