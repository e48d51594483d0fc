"""What a forward does that no gated MLP does, and the reason that is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gated_models import Parts, linears_of
from torch import Tensor

from lora_fast.gated_mlps.discovery import prove

COUNTS = {"calls": 0}
SEEN: list[Any] = []


class Counts(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class CountsGlobally(Parts):
    def forward(self, x: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return super().forward(x)


class Appends(Parts):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(1)
        return super().forward(x)


class Prints(Parts):
    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        return super().forward(x)


class Catches(Parts):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = x + 1
        except Exception:
            y = x
        return super().forward(y)


class ChangesX(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x *= x
        return super().forward(x)


class InPlace(Parts):
    def forward(self, x: Tensor) -> Tensor:
        F.silu(x, inplace=True)
        return super().forward(x)


class OtherHalf(Parts):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class OtherDim(Parts):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=1)
        return self.down(F.silu(gate) * up)


class Thirds(Parts):
    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        return self.down(F.silu(both[..., :4]) * both[..., 4:])


class CallsTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.up(x)
        return super().forward(x)


class GateOfGate(Parts):
    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        return self.down(self.act(g) * g)


class ActivatesTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.act(self.up(x)))


class Adds(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Branches(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class InTuple(Parts):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class ReadsWeight(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.down(F.silu(F.linear(x, self.gate.weight)) * self.up(x))


class Draws(Parts):
    def forward(self, x: Tensor) -> Any:
        torch.rand(3)
        return super().forward(x)


class Drops(Parts):
    def forward(self, x: Tensor) -> Any:
        return self.down(F.dropout(self.act(self.gate(x)) * self.up(x), 0.1, self.training))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Counts, "changes calls"),
        (CountsGlobally, "changes a value"),
        (Appends, "SEEN"),
        (Prints, "calls print"),
        (Catches, "calls add"),
        (ChangesX, "calls imul"),
        (InPlace, "in place"),
        (OtherHalf, "not down"),
        (OtherDim, "chunk"),
        (Thirds, "no half"),
        (CallsTwice, "more than once"),
        (GateOfGate, "not down"),
        (ActivatesTwice, "not down"),
        (Adds, "calls"),
        (Branches, "reads sum"),
        (InTuple, "not down"),
        (ReadsWeight, "reads weight of gate"),
        (Draws, "calls rand"),
        (Drops, "drops elements"),
    ],
)
def test_what_is_no_gated_mlp(cls: type[Parts], reason: str) -> None:
    module = cls()
    proof = prove(module, linears_of(module))
    assert proof.mlp is None
    assert reason in str(proof.reason)
    assert module.calls == 0
    assert (COUNTS, SEEN) == ({"calls": 0}, [])
