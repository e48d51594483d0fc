"""The Triton backend with launch plans: operations on operands of a geometry that was seen before
repeat the launches of the earlier call (kernels/launch_plans.py).

Nothing of a plan belongs to a layer or a tensor: operands of equal geometry, in any layer, use the
same one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..factors import Factors, Gradients, Needs, Saved
from ..four_bit.decoded import Decoded, bytes_saved
from ..gated import Activation, GatedGradients, GatedLinears, GatedNeeds, GatedSaved
from ..geometry import Geometry, Numbered, Numbers, of_any, tensors_of
from ..kernels import launch_plans
from ..nf4 import NF4Weight
from ..tuning.plans import Plan
from .torch_dropout import is_capturing
from .triton_gated import takes
from .triton_ops import TritonBackend

# Geometries whose plans are kept; a run with more of them begins anew.
_MOST_PLANS = 4096
PLAIN_TENSORS = (Tensor, nn.Parameter)
_SEEN, _NO_PLAN, NO_SEED = object(), object(), (0, 0)
_of_gradients = Numbers()
# By geometry, the gradients that are required, and whether cuBLAS may multiply.
_plans: dict[Any, Any] = {}


class PlannedTritonBackend(TritonBackend):
    """:class:`TritonBackend`, whose calls are repeated by plans."""

    def forward(
        self,
        x: Tensor,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
        plan: Plan | None = None,
        numbered: Numbered | None = None,
    ) -> tuple[list[Tensor], Saved]:
        geometry: Geometry
        operands: list[Any]
        if numbered is not None:
            geometry, operands = numbered
        elif plan is not None or type(x) not in PLAIN_TENSORS:
            launch_plans.give_up()
            return super().forward(x, fs, needs, plan)
        elif _remembering(fs):
            return self.forward_remembering(x, fs, needs)
        else:
            geometry = of_any((x,), fs)
            operands = [x, *tensors_of(fs)]
        key = (geometry, tuple(needs), self._cublas)
        seed = NO_SEED if fs[0][7][1] == 0.0 else _seed_words(fs[0])
        found: Any = _plans.get(key)
        if type(found) is launch_plans.Plan:
            result = found.run(operands, seed)
            if result is not None:
                return result
        return _recorded(key, operands, seed, super().forward, x, fs, needs)

    def forward_remembering(
        self,
        x: Tensor,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
        numbered: Numbered | None = None,
    ) -> tuple[list[Tensor], Saved]:
        """`forward` of NF4 weights some of which remember W, by a plan that gives W as well."""
        geometry: Geometry
        operands: list[Any]
        fs = _with_room(x, fs)
        remembering = _remembering(fs)
        if not remembering:
            return self.forward(x, fs, needs, None, numbered)
        if numbered is not None:
            geometry, operands = numbered
        else:
            geometry, operands = of_any((x,), fs), [x, *tensors_of(fs)]
        key = (geometry, tuple(needs), self._cublas, remembering)
        seed = NO_SEED if fs[0][7][1] == 0.0 else _seed_words(fs[0])
        found: Any = _plans.get(key)
        result = found.run(operands, seed) if type(found) is launch_plans.Plan else None
        if result is None:
            compute = super().forward

            def with_weights() -> Any:
                collecting = _collecting(fs)
                return compute(x, collecting, needs), _weights_of(collecting)

            result = _recorded(key, operands, seed, with_weights)
        outputs, weights = result
        _offer(fs, weights)
        return outputs

    def backward(
        self,
        dYs: Sequence[Tensor],
        x: Tensor | None,
        saved: Saved,
        fs: Sequence[Factors],
        needs: Sequence[Needs],
        plan: Plan | None = None,
        number: int | None = None,
    ) -> list[Gradients]:
        if plan is not None or type(dYs[0]) is not Tensor:
            launch_plans.give_up()
            return super().backward(dYs, x, saved, fs, needs, plan)
        if _remembering(fs):
            fs = _with_dense(fs)
        geometry: Geometry
        operands: list[Any]
        S, V = saved
        if number is not None:
            beside, tensors = (x is None, S is None), [*dYs]
            for t in (x, S):
                if t is not None:
                    tensors.append(t)
            geometry, operands = _of_gradients.find(beside, tensors, fs, number)
            geometry = geometry or _of_gradients.add(beside, tensors, fs, number)
        else:
            geometry, operands = of_any((*dYs, x, S, V), fs), [*dYs, x, S, V, *tensors_of(fs)]
        key = (geometry, tuple(needs), self._cublas)
        seed = NO_SEED if fs[0][7][1] == 0.0 else _seed_words(fs[0])
        found: Any = _plans.get(key)
        if type(found) is launch_plans.Plan:
            result = found.run(operands, seed)
            if result is not None:
                return result
        return _recorded(key, operands, seed, super().backward, dYs, x, saved, fs, needs)

    def gated_forward(
        self, x: Tensor | None, linears: GatedLinears, activation: Activation, needs: GatedNeeds
    ) -> tuple[Tensor, GatedSaved]:
        kept = (x, *(f for f in linears[:2] if isinstance(f, Tensor)))
        remembering = _remembering(linears)
        if remembering:
            linears = GatedLinears(*_with_room(next(t for t in kept if t is not None), linears))
            remembering = _remembering(linears)
        collecting = GatedLinears(*_collecting(linears)) if remembering else linears
        compute = functools.partial(super().gated_forward, x, collecting, activation, needs)
        if not remembering:
            return self._repeated(("forward", activation, needs), kept, linears, compute)

        def with_weights() -> Any:
            return compute(), _weights_of(collecting)

        key = ("forward", activation, needs, remembering)
        outputs, weights = self._repeated(key, kept, collecting, with_weights)
        _offer(linears, weights)
        return outputs

    def gated_backward(
        self,
        dY: Tensor,
        x: Tensor | None,
        saved: GatedSaved,
        linears: GatedLinears,
        activation: Activation,
        needs: GatedNeeds,
        *,
        in_place: bool,
    ) -> GatedGradients:
        if _remembering(linears):
            linears = GatedLinears(*_with_dense(linears))
        arguments = (dY, x, saved, linears, activation, needs)
        compute = functools.partial(super().gated_backward, *arguments, in_place=in_place)
        key = ("backward", activation, needs, in_place)
        return self._repeated(key, (dY, x, *saved), linears, compute)

    def _repeated(
        self, key: Any, tensors: Sequence[Tensor | None], linears: GatedLinears, compute: Any
    ) -> Any:
        """compute() of a gated MLP, or what a plan of it gives."""
        fs = [f for f in linears if isinstance(f, Factors)]
        given = [t for t in tensors if t is not None]
        if not _is_plannable(given, linears):
            launch_plans.give_up()
            return compute()
        of_linears = tuple(map(type, linears)), tuple([t is None for t in tensors])
        # A plan tells seeds apart by their values, so it is one of calls with the same equal ones.
        words = [_seed_words(f) for f in fs]
        equal, seeds = tuple(map(words.index, words)), tuple(itertools.chain(*words))
        whole = (key, of_linears, of_any(given, fs), self._cublas, equal)
        operands = [*given, *tensors_of(fs)]
        return repeated(whole, operands, seeds, compute)


def repeated(key: Any, operands: list[Any], seeds: tuple[int, ...], compute: Any) -> Any:
    """compute(), or what a plan of it gives; the first operand is a tensor."""
    found: Any = _plans.get(key)
    if type(found) is launch_plans.Plan:
        result = found.run(operands, seeds)
        if result is not None:
            return result
    return _recorded(key, operands, seeds, compute)


def _recorded(key: Any, operands: list[Any], seed: Any, compute: Any, *arguments: Any) -> Any:
    """compute(*arguments), of which the second call for a geometry is recorded."""
    found = _plans.get(key)
    # While a graph is captured the tuner times nothing, and takes what may not be its choice.
    impossible = is_capturing(operands[0].device) or not launch_plans.are_possible()
    if found is None or found is _NO_PLAN or impossible:
        if found is None:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            _plans[key] = _SEEN
        return compute(*arguments)
    with launch_plans.Recorder(operands, seed) as recorder:
        result = compute(*arguments)
    _plans[key] = recorder.plan(result) or _NO_PLAN
    return result


def forget() -> None:
    """Forget all plans."""
    _plans.clear()


def _is_plannable(tensors: Sequence[Tensor], linears: GatedLinears) -> bool:
    """Whether a gated MLP runs in kernels of its own."""
    return all(type(t) in PLAIN_TENSORS for t in tensors) and takes(tensors[0], linears)


class _Collected(Decoded):
    """W for a caller who decides whether it is saved."""

    def offer(self, W: Tensor) -> None:
        self.dense = W


def _remembering(layers: Sequence[Any]) -> tuple[bool, ...]:
    """Of each layer whether its NF4 weight remembers W, or is to; nothing if none does."""
    for f in layers:
        # A comprehension, or a call for each, takes longer.
        if type(f) is Factors and type(f[0]) is NF4Weight and f[0].decoded is not None:
            return tuple(map(_remembers, layers))
    return ()


def _remembers(f: Any) -> bool:
    return type(f) is Factors and type(f[0]) is NF4Weight and f[0].decoded is not None


def _with_room(x: Tensor, layers: Sequence[Any]) -> list[Any]:
    """The layers, of which as many remember W as may be saved, in the dtype of x."""
    count, found = 0, [*layers]
    for i, f in enumerate(layers):
        if not _remembers(f):
            continue
        N, K = f.weight.quant_state.shape
        more = N * K * x.element_size()
        if bytes_saved.has_room(count + more):
            count += more
        else:
            found[i] = f._replace(weight=replace(f.weight, decoded=None))
    return found


def _collecting(layers: Sequence[Any]) -> list[Any]:
    """The layers, of which those that remember W give it to this call."""
    return [
        f._replace(weight=replace(f.weight, decoded=_Collected())) if remembers else f
        for f, remembers in zip(layers, _remembering(layers), strict=True)
    ]


def _weights_of(layers: Sequence[Any]) -> list[Tensor | None]:
    """W where it is remembered."""
    return [
        f.weight.decoded.dense if remembers else None
        for f, remembers in zip(layers, _remembering(layers), strict=True)
    ]


def _offer(layers: Sequence[Any], weights: Sequence[Tensor | None]) -> None:
    for f, W in zip(layers, weights, strict=True):
        if W is not None:
            f.weight.decoded.offer(W)


def _with_dense(layers: Sequence[Any]) -> list[Any]:
    """The layers with W in place of an NF4 weight that remembers it: then they are dense ones."""
    found = [*layers]
    for i, f in enumerate(layers):
        if _remembers(f) and f.weight.decoded.dense is not None:
            found[i] = Factors(f.weight.decoded.dense, *f[1:])
    return found


def _seed_words(f: Factors) -> tuple[int, int]:
    _, p, seed, _ = f.constants
    if p == 0.0 or not isinstance(seed, int):
        return NO_SEED
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return (low ^ 0x80000000) - 0x80000000, (high ^ 0x80000000) - 0x80000000
