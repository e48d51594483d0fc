"""A gated MLP of layers that a backend computes, and an activation in aten calls.

    h = act(gate) ⊙ up          dup = dH ⊙ act(gate)          dgate = dH ⊙ up ⊙ act'(gate)

gate and up are saved with the low rank in them. h is computed again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph
from torch.nn import functional

from ..factors import Factors, Gradients, Needs, Saved
from ..gated import Activation, GatedGradients, GatedLinears, GatedNeeds, GatedSaved
from .torch_low_rank import given
from .torch_products import wide_dtype

_NOTHING = Gradients()
_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}


def gated_forward(
    backend: Any, x: Tensor | None, linears: GatedLinears, activation: Activation, needs: GatedNeeds
) -> tuple[Tensor, GatedSaved]:
    """:meth:`lora_fast.backends.protocol.Backend.gated_forward` by the layers of `backend`."""
    found, S = outputs(backend, x, linears, needs)
    gate, up = halves(*found)
    wide = wide_dtype(gate.dtype)
    h = activated(gate.to(wide), activation).mul_(up).to(gate.dtype)
    saved = GatedSaved(*found, S) if needs.down.x else GatedSaved()
    if linears.down is None:
        return h, saved
    (y,), of_down = backend.forward(h, [linears.down], [needs.down])
    return y, saved._replace(Sd=of_down.S)


def gated_backward(
    backend: Any,
    dY: Tensor,
    x: Tensor | None,
    saved: GatedSaved,
    linears: GatedLinears,
    activation: Activation,
    needs: GatedNeeds,
) -> GatedGradients:
    """:meth:`lora_fast.backends.protocol.Backend.gated_backward` by the layers of `backend`."""
    gate, up = halves(given(saved.gate), saved.up)
    wide_gate = gate.to(wide_dtype(gate.dtype))
    acted, of_down = activated(wide_gate, activation), _NOTHING
    if linears.down is None:
        dH = dY
    else:
        f = linears.down
        h = (acted * up).to(gate.dtype) if needs.down.A else None
        (of_down,) = backend.backward([dY], h, Saved(saved.Sd), [f], [needs.down])
        dH = of_down.x
        if dH is None:
            return GatedGradients(None, _NOTHING, _NOTHING, of_down)
    both = gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1]) if linears.is_fused else None
    if both is None:
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    else:
        dgate, dup = both.chunk(2, dim=-1)
    torch.mul(dH, acted, out=dup)
    dActed = dH * up.to(wide_gate.dtype)
    dgate.copy_(activation_gradient(dActed, wide_gate, activation))
    dYs = (dgate, dup) if both is None else (both, None)
    return _gradients_before(backend, dYs, x, saved.S, linears, needs)._replace(down=of_down)


def activated(gate: Tensor, activation: Activation, out: Tensor | None = None) -> Tensor:
    """act(gate), in new memory and differentiable, or in `out`."""
    if out is not None:
        return _activated_in(out, gate, activation)
    if activation == "silu":
        return functional.silu(gate)
    if activation in _APPROXIMATION:
        return functional.gelu(gate, approximate=_APPROXIMATION[activation])
    rectified = torch.relu(gate)
    return rectified if activation == "relu" else rectified * rectified


def _activated_in(out: Tensor, gate: Tensor, activation: Activation) -> Tensor:
    aten: Any = torch.ops.aten
    if activation == "silu":
        return aten.silu.out(gate, out=out)
    if activation in _APPROXIMATION:
        if not out.is_contiguous():
            # oneDNN computes it, and writes nothing to memory with gaps.
            return out.copy_(functional.gelu(gate, approximate=_APPROXIMATION[activation]))
        return aten.gelu.out(gate, approximate=_APPROXIMATION[activation], out=out)
    aten.relu.out(gate, out=out)
    return out if activation == "relu" else out.mul_(out)


def activation_gradient(
    dActed: Tensor, gate: Tensor, activation: Activation, out: Tensor | None = None
) -> Tensor:
    """dActed ⊙ act'(gate), in `out` if it is given."""
    aten: Any = torch.ops.aten
    if activation == "relu2":
        return torch.mul(torch.relu(gate).mul_(2.0), dActed, out=out)
    operator: Any = aten.silu_backward
    options: dict[str, Any] = {}
    if activation == "relu":
        operator, options = aten.threshold_backward, {"threshold": 0}
    elif activation in _APPROXIMATION:
        operator, options = aten.gelu_backward, {"approximate": _APPROXIMATION[activation]}
    if graph._allow_mutation_on_saved_tensors_enabled:
        # PyTorch then knows no operator that calls its result anything but `out`.
        found = operator.default(dActed, gate, **options)
        return found if out is None else out.copy_(found)
    out = torch.empty_like(dActed) if out is None else out
    return operator.grad_input(dActed, gate, **options, grad_input=out)


def outputs(
    backend: Any, x: Tensor | None, linears: GatedLinears, needs: GatedNeeds
) -> tuple[tuple[Tensor, Tensor | None], Tensor | None]:
    """gate and up, or both in one and None; and the S of those that have an A."""
    found: list[Any] = list(linears[:2])
    S = None
    for places in _groups(linears):
        group = [found[i] for i in places]
        ys, saved = backend.forward(given(x), group, [needs[i] for i in places])
        S = saved.S if saved.S is not None else S
        for i, y in zip(places, ys, strict=True):
            found[i] = y
    return (found[0], found[1]), S


def _gradients_before(
    backend: Any,
    dYs: tuple[Tensor, Tensor | None],
    x: Tensor | None,
    S: Tensor | None,
    linears: GatedLinears,
    needs: GatedNeeds,
) -> GatedGradients:
    """The gradients of gate, up and x for those of gate and up, or of both in one."""
    dX: Tensor | None = None
    found = [Gradients(x=dY if need.x else None) for dY, need in zip(dYs, needs[:2], strict=True)]
    for places in _groups(linears):
        fs: list[Any] = [linears[i] for i in places]
        wanted: list[Needs] = [needs[i] for i in places]
        dY = [given(dYs[i]) for i in places]
        of_saved = Saved(S if fs[0].A is not None else None)
        for i, grads in zip(places, backend.backward(dY, x, of_saved, fs, wanted), strict=True):
            if grads.x is not None:
                dX = grads.x if dX is None else dX.add_(grads.x)
            found[i] = grads._replace(x=None)
    return GatedGradients(dX, found[0], found[1], _NOTHING)


def _groups(linears: GatedLinears) -> list[list[int]]:
    """Which of gate and up are computed together: both, if both have an A."""
    layers = [i for i, f in enumerate(linears[:2]) if isinstance(f, Factors)]
    adapted = [linears[i].A is not None for i in layers]  # type: ignore[union-attr]
    return [layers] if layers and all(adapted) else [[i] for i in layers]


def halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is not None:
        return gate, up
    gate, up = gate.chunk(2, dim=-1)
    return gate, up
