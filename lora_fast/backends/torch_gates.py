"""What lies between the two projections of an expert, and its derivative from a rebuilt input.

GluGate    h = act(gate) ⊙ up, of halves of the rows or of pairs of columns, perhaps with limits
OwnGate    h = any function of the rows [M, P] → [M, I]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

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


class GluForm(NamedTuple):
    """h = act(α gate) / α ⊙ (up + shift), gate at most `limit` and up within ± limit if there is
    one; gate and up are halves of a row, or `interleaved`."""

    activation: Activation
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.0
    shift: float = 0.0


class GluGate:
    """A gate of that form, in float32 at least and rounded once."""

    def __init__(self, form: GluForm) -> None:
        self.form = form

    def forward(self, rows: Tensor) -> Tensor:
        gate, up = self._parts(rows.to(wide_dtype(rows.dtype)))
        return self._acted(self._argument(gate)).mul_(self._factor(up)).to(rows.dtype)

    def rebuilt(self, rows: Tensor) -> tuple[Tensor, Vjp]:
        form = self.form
        gate, up = self._parts(rows.to(wide_dtype(rows.dtype)))
        argument, factor = self._argument(gate), self._factor(up)
        acted = self._acted(argument)

        def vjp(dh: Tensor) -> Tensor:
            found = torch.empty_like(rows, dtype=gate.dtype)
            d_gate, d_up = self._parts(found)
            torch.mul(dh, acted, out=d_up)
            d_gate.copy_(activation_gradient(dh * factor, argument, form.activation))
            if form.limit is not None:
                d_up.masked_fill_(up.abs() > form.limit, 0.0)
                d_gate.masked_fill_(gate > form.limit, 0.0)
            return found.to(rows.dtype)

        return (acted * factor).to(rows.dtype), vjp

    def _parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.form.interleaved:
            return rows[..., ::2], rows[..., 1::2]
        gate, up = rows.chunk(2, dim=-1)
        return gate, up

    def _argument(self, gate: Tensor) -> Tensor:
        if self.form.limit is not None:
            gate = gate.clamp(max=self.form.limit)
        return gate if self.form.alpha == 1.0 else gate * self.form.alpha

    def _acted(self, argument: Tensor) -> Tensor:
        acted = activated(argument, self.form.activation)
        return acted if self.form.alpha == 1.0 else acted.div_(self.form.alpha)

    def _factor(self, up: Tensor) -> Tensor:
        if self.form.limit is not None:
            up = up.clamp(-self.form.limit, self.form.limit)
        return up if self.form.shift == 0.0 else up + self.form.shift


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
    activation: Activation | GluForm | Callable[[Tensor], Tensor],
    *,
    gated: bool = True,
    interleaved: bool = False,
) -> Gate:
    """The gate of an activation by its name, of a form, or of a function of all rows.

    Raises ValueError for a name that is not in :data:`ACTIVATIONS`, TypeError for anything else.
    """
    if callable(activation):
        return OwnGate(activation)
    if isinstance(activation, GluForm):
        if interleaved or not gated:
            raise ValueError(
                "activation, a GluForm, must have halves or pairs as it says itself, got "
                f"gated={gated} and interleaved={interleaved}"
            )
        _check_name(activation.activation)
        return GluGate(activation)
    if not isinstance(activation, str):
        raise TypeError(
            "activation must be a name, a GluForm or a function of the rows [M, P], got "
            f"{type(activation).__name__}"
        )
    _check_name(activation)
    if not gated:
        return OwnGate(lambda rows: activated(rows, activation))
    return GluGate(GluForm(activation, interleaved))


def _check_name(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
