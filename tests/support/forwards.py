"""Forwards of three children, and which of them they always call together, one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Children(nn.Module):
    """Three children by the names of a group, one more, and attributes to hang conditions on."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(4, 4, bias=False))
        self.norm = nn.LayerNorm(4)
        for name, value in attributes.items():
            setattr(self, name, value)


# What is called together.
ALL, QK, QV, KV, NONE = [("q", "k", "v")], [("q", "k")], [("q", "v")], [("k", "v")], []


class Plain(Children):
    expected = ALL

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) + self.k(x) * self.v(x))


class Chains(Children):
    expected = ALL

    def forward(self, hidden_states: Tensor, shape: tuple[int, ...]) -> Tensor:
        query = self.q(hidden_states).view(shape).transpose(1, 2)
        key = self.norm(self.k(hidden_states)).view(shape)
        return torch.cat([query, key, self.shaped(self.v(hidden_states), -1)])

    def shaped(self, x: Tensor, size: int) -> Tensor:
        return x.view(size)


class TupleAssignment(Children):
    expected = ALL

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return q + k + v


class AnotherName(Children):
    expected = ALL

    def forward(self, x: Tensor) -> Tensor:
        y, z = x, 3
        q = self.q(y)
        w = y
        return q + self.k(x) + self.v(w) + z


class NameOfAnother(Children):
    """The tuple is evaluated before any of its names is set."""

    expected = KV

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = y, x
        q = self.q(x)
        return q + self.k(y) + self.v(y)


class SetBefore(Children):
    expected = ALL

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.q(x) + self.k(x) + self.v(x)


class SetBetween(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x = self.norm(x)
        return q + self.k(x) + self.v(x)


class SetByWalrus(Children):
    """The argument of k is no name, and v's is another value."""

    expected = NONE

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x := self.norm(x)) + self.v(x)


class AddedTo(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        y = x
        q = self.q(x)
        y += 1.0
        return q + self.k(x) + self.v(x)


class WrittenTo(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x[0] = 0.0
        return q + self.k(x) + self.v(x)


class ChangedInPlace(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x.mul_(2.0)
        return q + self.k(x) + self.v(x)


class ChangedAsOutput(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        torch.tanh(q, out=x)
        return q + self.k(x) + self.v(x)


class ChangedThroughData(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        torch.nn.init.zeros_(x.data)
        return q + self.k(x) + self.v(x)


class AnotherInput(Children):
    expected = KV

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.q(x) + self.k(other) + self.v(other)


class ComputedArgument(Children):
    expected = NONE

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x[0]) + self.k(x[0]) + self.v(x.float())


class MoreArguments(Children):
    expected = QK

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x, adapter_names=None)


class ByKeyword(Children):
    expected = QK

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(input=x)


class CalledTwice(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x) + self.q(self.o(x))


class CalledElsewhere(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        later = [self.q(part) for part in x]
        return self.q(x) + self.k(x) + self.v(x) + later[0]


class InAnotherFunction(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        project = lambda y: self.q(y)  # noqa: E731
        return project(x) + self.k(x) + self.v(x)


class HandedOver(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        projection = self.q
        return projection(x) + self.q(x) + self.k(x) + self.v(x)


class ForwardCalled(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        return self.q.forward(x) + self.q(x) + self.k(x) + self.v(x)


class WeightRead(Children):
    expected = ALL

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.q.weight.dtype)
        return self.q(x) + self.k(x) + self.v(x)


class Replaced(Children):
    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        self.q = nn.Identity()
        return y + self.k(x) + self.v(x)


def change(module: Any) -> None:
    pass


class HandedOut(Children):
    """Whoever gets the module may change it."""

    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        change(self)
        return q + self.k(x) + self.v(x)


class OwnFunction(Children):
    expected = KV

    def __init__(self) -> None:
        super().__init__(between=lambda: None)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        self.between()
        return q + self.k(x) + self.v(x)


class FunctionOfTorch(Children):
    expected = ALL

    def __init__(self) -> None:
        super().__init__(act=torch.nn.functional.gelu)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.q(x)) * self.k(x) + self.v(x)


class Detached(Children):
    """Its graph may be gone when k is called, in one mode of autograd alone."""

    expected = KV

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).detach()
        return q + self.k(x) + self.v(x)


class OtherName(Children):
    """The module need not be called self."""

    expected = ALL

    def forward(this, x: Tensor) -> Tensor:
        return this.q(x) + this.k(x) + this.v(x)
