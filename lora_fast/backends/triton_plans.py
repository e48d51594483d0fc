"""The Triton backend with launch plans: operations on operands of a geometry that was seen before
repeat the launches of the earlier call (kernels/launch_plans.py).

Nothing of a plan belongs to a layer or a tensor: operands of equal geometry, in any layer, use the
same one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..factors import Factors, Gradients, Needs, Saved
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
        elif plan is not None or type(x) not in PLAIN_TENSORS or _has_decoded(fs):
            launch_plans.give_up()
            return super().forward(x, fs, needs, plan)
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
        if plan is not None or type(dYs[0]) is not Tensor or _has_decoded(fs):
            launch_plans.give_up()
            return super().backward(dYs, x, saved, fs, needs, plan)
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
        compute = functools.partial(super().gated_forward, x, linears, activation, needs)
        kept = (x, *(f for f in linears[:2] if isinstance(f, Tensor)))
        key = ("forward", activation, needs)
        return self._repeated(key, kept, linears, compute)

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
        if not _is_plannable(given, linears, fs):
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


def _is_plannable(tensors: Sequence[Tensor], linears: GatedLinears, fs: Sequence[Factors]) -> bool:
    """Whether a gated MLP runs in kernels of its own."""
    plain = all(type(t) in PLAIN_TENSORS for t in tensors)
    return plain and not _has_decoded(fs) and takes(tensors[0], linears)


def _has_decoded(fs: Sequence[Factors]) -> bool:
    """Whether W of an NF4 weight may be there already: that differs from call to call."""
    for f in fs:  # noqa: SIM110 - a generator takes longer
        if isinstance(f[0], NF4Weight) and f[0].decoded is not None:
            return True
    return False


def _seed_words(f: Factors) -> tuple[int, int]:
    _, p, seed, _ = f.constants
    if p == 0.0 or not isinstance(seed, int):
        return NO_SEED
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    return (low ^ 0x80000000) - 0x80000000, (high ^ 0x80000000) - 0x80000000
