"""What lies between the two projections of an expert, and its derivative from a rebuilt input.

gated      h = act(gate) ⊙ up         [gate | up] = rows of the first projection
own        h = any function of the rows [M, P] → [M, I], such as a clamped gate of a model
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..gated import ACTIVATIONS, Activation
from .torch_gated import activated, activation_gradient
from .torch_products import wide_dtype

Vjp = Callable[[Tensor], Tensor]


class Gate(Protocol):
    """A function of rows, each row by itself, without parameters that train."""

    def forward(self, rows: Tensor) -> Tensor:
        """h [M, I] of the first projection's rows [M, P]."""

    def rebuilt(self, rows: Tensor) -> tuple[Tensor, Vjp]:
        """h again, and the function that makes the rows' gradient [M, P] of that of h."""


class ConcatenatedGate:
    """h = act(gate) ⊙ up for rows [gate | up], in float32 at least and rounded once."""

    def __init__(self, activation: Activation) -> None:
        self._activation: Activation = activation

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = rows.to(wide_dtype(rows.dtype)).chunk(2, dim=-1)
        return activated(gate, self._activation).mul_(up).to(rows.dtype)

    def rebuilt(self, rows: Tensor) -> tuple[Tensor, Vjp]:
        gate, up = rows.to(wide_dtype(rows.dtype)).chunk(2, dim=-1)
        acted = activated(gate, self._activation)

        def vjp(dh: Tensor) -> Tensor:
            found = torch.empty_like(rows, dtype=gate.dtype)
            d_gate, d_up = found.chunk(2, dim=-1)
            torch.mul(dh, acted, out=d_up)
            d_gate.copy_(activation_gradient(dh * up, gate, self._activation))
            return found.to(rows.dtype)

        return (acted * up).to(rows.dtype), vjp


class OwnGate:
    """Any function, which runs again under autograd for its derivative."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def forward(self, rows: Tensor) -> Tensor:
        return self._function(rows)

    def rebuilt(self, rows: Tensor) -> tuple[Tensor, Vjp]:
        with torch.enable_grad():
            read = rows.detach().requires_grad_()
            h = self._function(read)

        def vjp(dh: Tensor) -> Tensor:
            return torch.autograd.grad(h, read, dh.to(h.dtype))[0]

        return h.detach(), vjp


def gate_of(
    activation: Activation | Callable[[Tensor], Tensor],
    *,
    gated: bool = True,
    interleaved: bool = False,
) -> Gate:
    """The gate of an activation by its name, or of a function of all rows.

    Raises ValueError for a name that is not in :data:`ACTIVATIONS`, TypeError for anything else.
    """
    if callable(activation):
        return OwnGate(activation)
    if not isinstance(activation, str):
        raise TypeError(
            "activation must be a name or a function of the rows [M, P], got "
            f"{type(activation).__name__}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if not gated:
        return OwnGate(lambda rows: activated(rows, activation))
    if interleaved:
        return OwnGate(lambda rows: activated(rows[..., ::2], activation) * rows[..., 1::2])
    return ConcatenatedGate(activation)
