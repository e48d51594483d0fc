"""Forwards that call some of their three children conditionally, and which always together."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from forwards import ALL, KV, NONE, QK, QV, Children
from torch import Tensor


class SelfOrCross(Children):
    """One class for both: the argument decides what k and v read."""

    expected = KV

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        source = x if other is None else other
        return self.q(x) + self.k(source) + self.v(source)


class SelfOrCrossByStatements(Children):
    expected = KV

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q = self.q(x)
        if other is not None:
            k = self.k(other)
            v = self.v(other)
        else:
            k = self.k(x)
            v = self.v(x)
        return q + k + v


class Cached(Children):
    expected = KV

    def forward(self, x: Tensor, past: Any = None) -> Tensor:
        q = self.q(x)
        if past is not None and past.is_updated:
            k, v = past.layer
        else:
            k, v = self.k(x), self.v(x)
        return q + k + v


class EarlyReturn(Children):
    expected = KV

    def forward(self, x: Tensor, short: bool) -> Tensor:
        q = self.q(x)
        if short:
            return q
        return q + self.k(x) + self.v(x)


class EarlyReturnDeepInside(Children):
    expected = KV

    def forward(self, x: Tensor, short: bool) -> Tensor:
        q = self.q(x)
        for _ in range(3):
            with torch.no_grad():
                if short:
                    return q
        return q + self.k(x) + self.v(x)


class Raises(Children):
    """A forward that fails has no further calls to keep anything for."""

    expected = ALL

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if q.shape[0] > 3:
            raise ValueError("too many")
        return q + self.k(x) + self.v(x)


class Caught(Children):
    expected = NONE

    def forward(self, x: Tensor) -> Tensor:
        try:
            q = self.q(x)
            q.check()
            return q + self.k(x) + self.v(x)
        except AttributeError:
            return x


class CaughtBetween(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        try:
            q = q.checked()
        except AttributeError:
            return q
        return q + self.k(x) + self.v(x)


class Suppressed(Children):
    expected = NONE

    def forward(self, x: Tensor) -> Tensor:
        with contextlib.suppress(AttributeError):
            q = self.q(x)
            k = self.k(q.checked())
            return self.v(x) + k
        return x


class InABlock(Children):
    expected = QK

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.q(x) + self.k(x)
        return y + self.v(x)


class InALoop(Children):
    expected = ALL

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.norm(x)
            x = self.q(x) + self.k(x) + self.v(x)
        return x


class PartlyInALoop(Children):
    expected = KV

    def forward(self, x: Tensor, rounds: int) -> Tensor:
        y = self.q(x)
        while rounds := rounds - 1:
            y = y + self.k(x) + self.v(x)
        return y


class BrokenLoop(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        for part in x:
            y = self.q(part)
            if y.sum() > 0:
                continue
            y = y + self.k(part) + self.v(part)
        return y


class Conditional(Children):
    expected = QV

    def forward(self, x: Tensor, wants_k: bool) -> Tensor:
        y = self.q(x) + (self.k(x) if wants_k else 0)
        return y + self.v(x)


class ShortCircuit(Children):
    expected = QV

    def forward(self, x: Tensor, wants_k: bool) -> Any:
        return self.q(x), wants_k and self.k(x), self.v(x)
