"""What the gated MLPs of a model would do at their next call, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..base_layer.call_counts import CallCounts
from ..base_layer.obstacles import environment_obstacle
from .discovery import STATE, GatedMLP, prove
from .fused_mlp import MLPState, observed
from .operands import always_alone, is_adapted, linears_of, may_be_adapted


class MLPStatus(NamedTuple):
    """One module: what its forward is found to compute, why it would run its own forward, and the
    layers that would be computed by themselves, each with the reason."""

    name: str
    kind: str
    mlp: GatedMLP | None
    obstacle: str | None
    alone: dict[str, str]
    calls: CallCounts


def statuses(model: nn.Module) -> Iterator[MLPStatus]:
    """Every gated MLP of `model` with an adapted layer, and every module that has the linear layers
    of one, at any time."""
    for name, module in model.named_modules():
        linears = linears_of(module)
        if not any(map(may_be_adapted, linears.values())):
            continue
        state: MLPState | None = module.__dict__.get(STATE)
        proof = prove(module, linears) if state is None else state.proven(module)
        mlp = proof.mlp
        if mlp is None and state is None and not _resembles_one(linears):
            continue
        names = linears if mlp is None else mlp.names
        if not any(may_be_adapted(linears.get(n)) for n in names):
            continue
        calls = CallCounts() if state is None else state.calls
        found, alone = proof.reason, {}
        if mlp is not None:
            found = "not accelerated" if state is None else environment_obstacle()
            found = found or observed(module, proof)
            children: Any = module._modules
            # What took the place of a linear layer, too.
            alone = {n: reason for n in mlp.names if (reason := always_alone(children.get(n)))}
            if found is None and not any(is_adapted(children.get(n)) for n in mlp.names):
                found = "no adapted layer"
        yield MLPStatus(name, type(module).__name__, mlp, found, alone, calls)


def _resembles_one(linears: dict[str, Any]) -> bool:
    """Whether there are two or three layers with the features of gate, up and down."""
    shapes = [(layer.in_features, layer.out_features) for layer in linears.values()]
    for i, (width, _) in enumerate(shapes):
        others = shapes[:i] + shapes[i + 1 :]
        (K, N), *rest = others or [(0, 0)]
        if width != K and len(set(others)) == 1 and (width if rest else 2 * width) == N:
            return len(rest) < 2
    return False
