"""The linears of a gated MLP, gradients and saved tensors, as every backend takes them.

h = act(gate) ⊙ up     gate = x Wgᵀ + s Sg Bgᵀ     up = x Wuᵀ + s Su Buᵀ     y = h Wdᵀ + s Sd Bdᵀ
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from .factors import Factors, Gradients, Needs

# gelu is the one with the error function; relu2 is relu(gate)².
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


class GatedLinears(NamedTuple):
    """The three linears of a gated MLP.

    gate, up: a layer [I, H] that reads x, or its output [..., I] if it was computed elsewhere. up
    is None where gate is both in one: a layer [2I, H], the rows of gate first. down: a layer [H, I]
    that reads h; None if h is the result.

    A layer is plain: W frozen, A and B or neither, perhaps a bias, no b, d, g or rank_spans, and a
    scaling that is a number. Layers with an A that read x share one dropout.
    """

    gate: Factors | Tensor
    up: Factors | Tensor | None
    down: Factors | None

    @property
    def read_x(self) -> list[Factors]:
        """The layers among gate and up that are computed from x."""
        return [f for f in self[:2] if isinstance(f, Factors)]

    @property
    def is_fused(self) -> bool:
        """Whether gate and up are one layer."""
        return self.up is None

    @property
    def width(self) -> int:
        """I."""
        if not isinstance(self.gate, Factors):
            return self.gate.shape[-1]
        N = self.gate.weight.shape[0]
        return N // 2 if self.is_fused else N


class GatedNeeds(NamedTuple):
    """The gradients that are required of each linear.

    `x` of gate and of up is that of x, or that of the output where it was computed elsewhere. `x`
    of down is that of h: whether any of gate and up requires a gradient.
    """

    gate: Needs
    up: Needs
    down: Needs


NO_NEEDS = GatedNeeds(Needs(), Needs(), Needs())


class GatedSaved(NamedTuple):
    """Tensors saved for backward, beside x and the factors. h is not: it is computed again.

    gate, up: products [M, I] with W, the low rank and the bias in them or not as the backend likes,
    or outputs that were computed elsewhere · S: those of gate and up side by side [M, Rg + Ru] ·
    Sd = drop(h) Adᵀ [M, Rd].
    """

    gate: Tensor | None = None
    up: Tensor | None = None
    S: Tensor | None = None
    Sd: Tensor | None = None


class GatedGradients(NamedTuple):
    """The gradient of x, and those of each linear, whose `x` is that of an output that was computed
    elsewhere."""

    x: Tensor | None
    gate: Gradients
    up: Gradients
    down: Gradients
