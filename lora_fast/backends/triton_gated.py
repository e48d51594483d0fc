"""A gated MLP on the Triton backend: products with W by cuBLAS, all else in the kernels that the
activation needs anyway.

    forward   S of gate and up · their products · h, S of down · y, as a layer whose S is there
    backward  dB, dS of down · dh = dY Wd · dgate, dup, their dB, dA of down · dS · dX, dA

gate and up are saved without the low rank. A weight that is decoded lives until its product is
enqueued. M × I are gate, up, h and dh alone; dgate and dup, where gate and up must stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..factors import Factors, Gradients, Needs, needs_of_all
from ..gated import Activation, GatedGradients, GatedLinears, GatedNeeds, GatedSaved
from ..kernels import gated_backward as backward_kernel
from ..kernels import gated_forward as forward_kernel
from ..kernels import gated_gradients as gradients_kernel
from ..kernels import gated_policy, nf4_decode, shrink, strips, ticketed_gemm
from ..kernels.dropout import NO_DROPOUT
from ..kernels.gated_tiles import Member
from ..kernels.launch_plans import empty
from ..kernels.scaling import Shrunk
from ..nf4 import NF4Weight
from . import triton_routes
from .protocol import columns_of, shaped_as
from .torch_low_rank import given
from .torch_ops import without_autocast
from .triton_gradients import grad_A, output_side, output_sides
from .triton_operands import Launching, dense, dropout, shape_only, vectors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NOTHING = Gradients()
# Below, a layer is one launch with its weight read once, and the passes over M × I cost nothing.
_FEW_ROWS = 64


def takes(x: Tensor | None, linears: GatedLinears) -> bool:
    """Whether these kernels compute a call with as many rows as x, or the output, has."""
    like: Any = linears.gate if x is None else x
    return like.numel() > _FEW_ROWS * like.shape[-1] and like.dtype in _DTYPES


def gated_forward(
    x: Tensor | None, linears: GatedLinears, activation: Activation, needs: GatedNeeds
) -> tuple[Tensor, GatedSaved]:
    """:meth:`lora_fast.backends.protocol.Backend.gated_forward` of many rows."""
    like: Any = linears.gate if x is None else x
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    with Launching(like), without_autocast(like):
        S = _shrunk(rows, linears)
        bases = [_base(rows, f) for f in linears[:2] if f is not None]
        members = _members(bases, S, linears)
        saved = _saved(bases, S, linears) if needs.down.x else GatedSaved()
        if linears.down is None:
            h, _ = forward_kernel.activate(*members, activation)
            return shaped_as(like, h), saved
        y, Sd = _down(members, linears.down, activation, needs.down)
    return shaped_as(like, y), saved._replace(Sd=Sd)


def gated_backward(
    dY: Tensor,
    x: Tensor | None,
    saved: GatedSaved,
    linears: GatedLinears,
    activation: Activation,
    needs: GatedNeeds,
    *,
    in_place: bool,
) -> GatedGradients:
    """:meth:`lora_fast.backends.protocol.Backend.gated_backward` of many rows."""
    rows = dY.reshape(-1, dY.shape[-1])
    x_rows = None if x is None else x.reshape(-1, x.shape[-1])
    bases = [_as_rows(base) for base in saved[:2] if base is not None]
    members = _members(bases, saved.S, linears)
    with Launching(rows), without_autocast(rows):
        dh, of_down, dS = _before_down(rows, saved.Sd, linears.down, needs.down)
        outs, both = _outputs(members, linears, in_place=in_place)
        found, of_down = _through_activation(
            members, dh, dS, activation, linears, needs, outs, of_down
        )
        dX, grads = _before_activation(_readers(found, both, linears, needs), saved.S, x_rows)
    for i, (f, out) in enumerate(zip(linears[:2], outs, strict=True)):
        if isinstance(f, Tensor) and needs[i].x:
            grads[i] = Gradients(x=out.view(*dY.shape[:-1], out.shape[-1]))
    if dX is not None:
        dX = dX.view(*dY.shape[:-1], dX.shape[-1])
    return GatedGradients(dX, grads[0], grads[1], of_down)


def _as_rows(base: Tensor) -> Tensor:
    """A base product or an output as [M, I], its columns neighbours."""
    rows = base.reshape(-1, base.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _adapted(linears: GatedLinears) -> list[Factors]:
    """The layers with an A among those that read x."""
    return [f for f in linears.read_x if f.A is not None]


def _shrunk(rows: Tensor | None, linears: GatedLinears) -> Tensor | None:
    """S [M, ΣR] of the layers that read x."""
    adapted = _adapted(linears)
    return triton_routes.shrunk(given(rows), adapted) if adapted else None


def _base(rows: Tensor | None, f: Factors | Tensor) -> Tensor:
    """x Wᵀ + bias, or an output that was computed elsewhere, as rows."""
    if isinstance(f, Tensor):
        return _as_rows(f)
    x = given(rows)
    return triton_routes.add_product(None, x, dense(f.weight, x.dtype).T, f.bias)


def _saved(bases: Sequence[Tensor], S: Tensor | None, linears: GatedLinears) -> GatedSaved:
    """Outputs that were computed elsewhere are saved as they came."""
    found = [f if isinstance(f, Tensor) else base for f, base in zip(linears, bases, strict=False)]
    return GatedSaved(found[0], None if linears.is_fused else found[1], S)


def _members(
    bases: Sequence[Tensor], S: Tensor | None, linears: GatedLinears
) -> tuple[Member, Member]:
    """gate and up as the kernels take them."""
    if linears.is_fused:
        f: Any = linears.gate
        halves = bases[0].chunk(2, dim=1)
        if f.A is None:
            return Member(halves[0]), Member(halves[1])
        gate, up = (
            Member(base, S, B, f.constants.scaling)
            for base, B in zip(halves, f.B.chunk(2), strict=True)
        )
        return gate, up
    columns = iter(columns_of(S, _adapted(linears)))
    found = []
    for base, f in zip(bases, linears, strict=False):
        if isinstance(f, Factors) and f.A is not None:
            found.append(Member(base, next(columns), f.B, f.constants.scaling))
        else:
            found.append(Member(base))
    return found[0], found[1]


def _down(
    members: tuple[Member, Member], f: Factors, activation: Activation, need: Needs
) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and S of down, None unless saved."""
    dtype, width = members[0].base.dtype, members[0].base.shape[1]
    if f.A is None:
        h, _ = forward_kernel.activate(*members, activation)
        return triton_routes.add_product(None, h, dense(f.weight, dtype).T, f.bias), None
    drops = dropout(f)
    if isinstance(f.weight, NF4Weight):
        wide, S = forward_kernel.activate(
            *members, activation, f.A, drops, saves_S=need.saves_S, widens=True
        )
        W = nf4_decode.augmented(
            f.weight.packed, f.weight.quant_state, dtype, f.B, f.constants.scaling,
            columns=shrink.padding_of(f.A.shape[0]),
        )  # fmt: skip
        if f.weight.decoded is not None:
            f.weight.decoded.offer(W[:, :width])
        return triton_routes.add_product(None, wide, W.T, f.bias), S
    h, S = forward_kernel.activate(*members, activation, f.A, drops)
    (y,), scale = triton_routes.expanded(given(S), dtype, [f])
    y = triton_routes.add_product(y, h, dense(f.weight, dtype).T, scale=scale)
    return y, S if need.saves_S else None


def _before_down(
    dY: Tensor, S: Tensor | None, f: Factors | None, need: Needs
) -> tuple[Tensor, Gradients, Shrunk]:
    """The base product dY Wd [M, I] of dh, the gradients of B and the bias of down, and its dS."""
    if f is None:
        return (dY if dY.stride(1) == 1 else dY.contiguous()), _NOTHING, Shrunk(None)
    grads, dS = _NOTHING, Shrunk(None)
    bias, gains = vectors(f)
    grads, partials = output_side(dY, S, None, f, bias, gains, need, f.A is not None)
    if f.A is not None:
        layer = ticketed_gemm.Layer(
            dY, shape_only(f.weight, dY), f.A, f.B, f.constants.scaling, partials
        )
        _, dS = ticketed_gemm.grad_input([layer], dropout(f), wants_dX=False)
    dh = triton_routes.add_product(None, dY, dense(f.weight, dY.dtype))
    return dh, grads, dS


def _outputs(
    members: tuple[Member, Member], linears: GatedLinears, *, in_place: bool
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """The memory of dgate and dup [M, I], and of both side by side if gate and up are one layer."""
    gate, up = (member.base for member in members)
    if linears.is_fused:
        both = gate.as_strided((gate.shape[0], 2 * gate.shape[1]), gate.stride())
        if not in_place:
            both = empty(gate, *both.shape)
        dgate, dup = both.chunk(2, dim=1)
        return (dgate, dup), both
    found = [
        base if in_place and isinstance(f, Factors) else empty(base, *base.shape)
        for base, f in zip((gate, up), linears[:2], strict=True)
    ]
    return (found[0], found[1]), None


def _through_activation(
    members: tuple[Member, Member],
    dh: Tensor,
    dS: Shrunk,
    activation: Activation,
    linears: GatedLinears,
    needs: GatedNeeds,
    outs: tuple[Tensor, Tensor],
    of_down: Gradients,
) -> tuple[backward_kernel.Found, Gradients]:
    """dgate and dup, the gradients of the B of gate and up, and those of down with that of A."""
    f = linears.down
    A = None if f is None else f.A
    drops = NO_DROPOUT if f is None else dropout(f)
    narrow = members[0].S, members[1].S, dS.values
    ranks = [0 if values is None else values.shape[1] for values in narrow]
    up_need = needs.gate if linears.is_fused else needs.up
    wants_dS = any(
        isinstance(f, Factors) and f.A is not None and (need.x or need.A)
        for f, need in zip(linears[:2], needs[:2], strict=True)
    )
    if gated_policy.fits_registers(dh.dtype, ranks, drops=drops.p > 0.0):
        wanted = backward_kernel.Wanted(needs.gate.B, up_need.B, needs.down.A, wants_dS)
        found = backward_kernel.gradients(
            *members, dh, activation, dS, A, drops, wanted=wanted, outs=outs,
            joined=linears.is_fused,
        )  # fmt: skip
        return found, of_down._replace(A=found.down_A)
    gradients_kernel.gradients(
        *members, dh, activation, dS, A, drops, outs=outs, stores_h=needs.down.A
    )
    if needs.down.A:
        of_down = of_down._replace(A=strips.grad_shrink(dh, dS, given(A).dtype, drops))
    return backward_kernel.Found(*outs), of_down


class _Reader(NamedTuple):
    """A layer that reads x, with what is known of its gradients when those of its output are."""

    place: int
    f: Factors
    need: Needs
    dY: Tensor
    dB: Tensor | None
    partials: Tensor | None


def _readers(
    found: backward_kernel.Found,
    both: Tensor | None,
    linears: GatedLinears,
    needs: GatedNeeds,
) -> list[_Reader]:
    """The layers that read x; those without an adapter last, since dropout is that of the first."""
    dYs = [found.dgate if both is None else both, found.dup]
    kept = [(found.gate_B, found.gate_dS), (found.up_B, found.up_dS)]
    readers = [
        _Reader(i, f, needs[i], dYs[i], *kept[i])
        for i, f in enumerate(linears[:2])
        if isinstance(f, Factors)
    ]
    return sorted(readers, key=lambda reader: reader.f.A is None)


def _before_activation(
    readers: Sequence[_Reader], S: Tensor | None, x: Tensor | None
) -> tuple[Tensor | None, list[Gradients]]:
    """dX [M, K], and the gradients of gate and up for dgate and dup."""
    grads, layers, dX, dS = [_NOTHING, _NOTHING], [], None, Shrunk(None)
    if not readers:
        return dX, grads
    need = needs_of_all([reader.need for reader in readers])
    needs_dS = need.x or need.A
    fs, dYs = [reader.f for reader in readers], [reader.dY for reader in readers]
    others = [reader.need._replace(B=reader.need.B and reader.dB is None) for reader in readers]
    sides = output_sides(dYs, S, fs, others, needs_dS)
    for (place, f, _, dY, dB, partials), (of_output, parts) in zip(readers, sides, strict=True):
        grads[place] = of_output if dB is None else of_output._replace(B=dB)
        if f.A is not None:
            scaling, parts = f.constants.scaling, parts if partials is None else partials
            weight = shape_only(f.weight, dY)
            layers.append(ticketed_gemm.Layer(dY, weight, f.A, f.B, scaling, parts))
    drops = dropout(fs[0])
    if layers and needs_dS:
        _, dS = ticketed_gemm.grad_input(layers, drops, wants_dX=False)
    if need.x:
        dX = triton_routes.input_gradient(dYs, dS, fs)
    if need.A:
        for reader, dA in zip(readers, grad_A(given(x), dS, fs[: len(layers)]), strict=False):
            if reader.need.A:
                grads[reader.place] = grads[reader.place]._replace(A=dA)
    return dX, grads
