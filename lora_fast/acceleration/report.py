"""Which adapted layers run fused, which do not, and why."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..base_layer.call_counts import CallCounts
from ..base_layer.linear import describe
from ..base_layer.obstacles import environment_obstacle, runs_own_forward
from ..features import switched_off
from ..gated_mlps.status import statuses
from ..modules.adapter_module import AdapterModule
from .expert_summary import about_experts
from .routes import route_of


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer.

    ``obstacle``: why the next call would run the plain path; None if it would run fused, unless
    its input prevents that. ``fused_calls`` and ``fallback_calls`` (by reason) count so far. Calls
    inside torch.compile cannot be counted: ``compiled`` tells whether some of them ran fused; those
    that did not appear as one fallback call. ``counted`` is False for a layer of PEFT's own class,
    whose calls cannot be observed.
    ``route``: how its operations are computed (guide): torch, fused, hybrid or augmented; of
    those met so far, where each is chosen, with what tells them apart where they differ.
    ``folded``: the activation's kernels of a gated MLP carry its low rank. ``opaque base``: the
    base computes its output by itself, and the low rank is added to it.
    ``siblings``: names of the layers that share its input and are computed with it; ``alone``: what
    prevents that, or prevented it in a graph of torch.compile, None for a layer that shares its
    input with no other.
    """

    name: str
    kind: str
    base: str
    obstacle: str | None
    fused_calls: int
    fallback_calls: dict[str, int]
    compiled: bool
    counted: bool = True
    route: str = ""
    siblings: tuple[str, ...] = ()
    alone: str | None = None

    @property
    def fused(self) -> bool:
        return self.obstacle is None


@dataclass(frozen=True)
class MLPReport:
    """One gated MLP with an adapted layer, or a module that has the layers of one.

    ``kind``: its class. ``activation``: silu, gelu, gelu_tanh, relu or relu2, None if its forward
    is not down(act(gate(x)) * up(x)). ``obstacle``: why the next call would run its own forward,
    and so its layers as :class:`LayerReport` says; None if it would run as one operation, unless
    its input prevents that. ``alone``: layers that would run by themselves all the same, and why.
    ``fused_calls`` and ``fallback_calls`` (by reason) count so far; a fused call counts for each of
    its adapted layers as well.
    """

    name: str
    kind: str
    activation: str | None
    obstacle: str | None
    alone: dict[str, str]
    fused_calls: int
    fallback_calls: dict[str, int]

    @property
    def fused(self) -> bool:
        return self.obstacle is None


@dataclass(frozen=True)
class Report:
    """Every adapted layer and gated MLP, in the order of ``model.named_modules()``. Prints as
    tables.

    ``switched_off``: features that the installed versions lack and the model would use, and why.
    ``experts``: which experts of a mixture train and which are quantised, in a line; None without
    any.
    """

    layers: tuple[LayerReport, ...]
    switched_off: tuple[str, ...] = ()
    mlps: tuple[MLPReport, ...] = ()
    experts: str | None = None

    @property
    def fused_calls(self) -> int:
        """Forward passes of a layer that ran fused outside torch.compile, over all layers."""
        return sum(layer.fused_calls for layer in self.layers)

    @property
    def fallback_calls(self) -> dict[str, int]:
        """Forward passes of a layer that ran the plain path, by reason, over all layers."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.fallback_calls)
        return dict(total)

    @property
    def all_fused(self) -> bool:
        """Whether there are layers, all would run fused, and every call so far did; in a gated MLP
        or not. Where not, the printed report says which of the two it is."""
        return bool(self.layers) and not self.fallback_calls and all(x.fused for x in self.layers)

    def __str__(self) -> str:
        header = ("layer", "kind", "base", "next call", "route", "fused calls", "fallback calls")
        rows = [header, *map(_row, self.layers)]
        if any(layer.siblings or layer.alone for layer in self.layers):
            together = ["computed with", *map(_siblings_in_words, self.layers)]
            rows = [(*row, last) for row, last in zip(rows, together, strict=True)]
        lines = _aligned(rows)
        fused = sum(layer.fused for layer in self.layers)
        slow = sum(self.fallback_calls.values())
        lines.append(
            f"{fused} of {len(self.layers)} adapted layers fused; "
            f"{self.fused_calls} fused calls, {slow} fallback calls"
        )
        unseen = sum(not layer.counted for layer in self.layers)
        if unseen:
            lines[-1] += f"; calls of the {unseen} that stay PEFT's are not counted"
        lines += [_exceptions(self)] if self.layers and not self.all_fused else []
        if self.mlps:
            titles = ("gated MLP", "kind", "activation", "next call", "fused calls", "own forward")
            lines += ["", *_aligned([titles, *map(_mlp_row, self.mlps)])]
            one = sum(mlp.fused for mlp in self.mlps)
            lines.append(f"{one} of {len(self.mlps)} gated MLPs run as one operation")
        lines += [self.experts] if self.experts else []
        lines += [f"off: {reason}" for reason in self.switched_off]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Report on every adapted layer of `model`, PEFT's and lora_fast's, at any time.

    Before the first call it predicts the path from the current state of each layer.
    PEFT's layers that :func:`lora_fast.accelerate` has not switched, or cannot, are listed as such.

    Raises TypeError if `model` is not a Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules, found_mlps = dict(model.named_modules()), list(statuses(model))
    folded = {
        f"{mlp.name}.{child}".removeprefix(".")
        for mlp in found_mlps
        if mlp.mlp is not None and mlp.obstacle is None
        for child in mlp.mlp.names
        if child not in mlp.alone
    }
    layers = tuple(
        _layer_report(
            name, layer, modules[name.rpartition(".")[0]], _outermost(name, modules),
            is_folded=name in folded,
        )
        for name, layer in adapted_layers(model)
    )  # fmt: skip
    if not layers:
        return Report(layers)
    mlps = tuple(
        MLPReport(
            name=found.name,
            kind=found.kind,
            activation=None if found.mlp is None else found.mlp.activation,
            obstacle=found.obstacle,
            alone=found.alone,
            fused_calls=found.calls.fused,
            fallback_calls=found.calls.by_reason(),
        )
        for found in found_mlps
    )
    return Report(layers, switched_off(model), mlps, about_experts(model))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer of lora_fast and every adapter layer of PEFT in `model`."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    kinds = (AdapterModule,) if peft is None else (AdapterModule, peft.BaseTunerLayer)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def _outermost(name: str, modules: dict[str, nn.Module]) -> Any:
    """The layer that computes `name`: of nested wrappers around parameters the outermost."""
    parent = name.removesuffix(".base_layer")
    if parent != name and hasattr(modules[parent], "parameter_name"):
        return _outermost(parent, modules)
    return modules[name]


def _layer_report(
    name: str, layer: Any, parent: nn.Module, computes: Any, *, is_folded: bool
) -> LayerReport:
    calls = getattr(layer, "_lora_fast_calls", None) or CallCounts()
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer
    siblings, alone = _siblings(layer, parent)
    return LayerReport(
        name=name,
        kind=_kind(layer),
        base=describe(base),
        obstacle=environment_obstacle() or _obstacle(computes),
        fused_calls=calls.fused,
        fallback_calls=calls.by_reason(),
        compiled=calls.compiled,
        counted=hasattr(layer, "_lora_fast_calls"),
        route=route_of(layer, base, together=1 + len(siblings), is_folded=is_folded),
        siblings=siblings,
        alone=alone,
    )


def _obstacle(layer: Any) -> str | None:
    if isinstance(layer, AdapterModule):
        return layer.obstacle()
    from .. import peft_layers

    if isinstance(layer, peft_layers.FusedForward):
        return layer.active()[1]
    if type(layer) not in peft_layers.FUSED_CLASSES:
        return f"{_kind(layer)} has no fused path"
    if not runs_own_forward(layer):
        return "forward of the layer replaced"
    return "not accelerated"


def _siblings(layer: Any, parent: nn.Module) -> tuple[tuple[str, ...], str | None]:
    if "lora_fast.peft_layers" not in sys.modules:
        return (), None
    from ..peft_layers.shared_input import siblings_of

    return siblings_of(layer, parent)


def _kind(layer: nn.Module) -> str:
    """The layer's name in PEFT's repr: lora.Linear, lora.Embedding, adalora.SVDLinear, …"""
    homes = (cls.__module__ for cls in type(layer).__mro__)
    home = next((name for name in homes if name.startswith("peft.tuners.")), None)
    return layer._get_name() if home is None else f"{home.split('.')[2]}.{layer._get_name()}"


def _row(layer: LayerReport) -> tuple[str, ...]:
    slow = ", ".join(f"{count} × {reason}" for reason, count in layer.fallback_calls.items())
    path = "fused" if layer.obstacle is None else f"fallback: {layer.obstacle}"
    fused = f"{layer.fused_calls} + compiled" if layer.compiled else str(layer.fused_calls)
    if not layer.counted:
        fused, slow = "-", "not counted"
    route = layer.route if layer.obstacle is None else "-"
    return (layer.name, layer.kind, layer.base, path, route, fused, slow or "0")


def _exceptions(report: Report) -> str:
    """Why ``all_fused`` is False: layers that would fall back, or calls that did."""
    past = ", ".join(f"{count} × {reason}" for reason, count in report.fallback_calls.items())
    slow = sum(not layer.fused for layer in report.layers)
    if not slow:
        return f"all_fused is False: calls fell back ({past}), though the next would all run fused"
    so_far = f", and calls did ({past})" if past else ""
    return f"all_fused is False: {slow} of {len(report.layers)} layers would fall back{so_far}"


def _mlp_row(mlp: MLPReport) -> tuple[str, ...]:
    path = "one operation" if mlp.obstacle is None else f"own forward: {mlp.obstacle}"
    if mlp.obstacle is None and mlp.alone:
        path += "; alone: " + ", ".join(f"{name} ({why})" for name, why in mlp.alone.items())
    own = ", ".join(f"{count} × {reason}" for reason, count in mlp.fallback_calls.items())
    activation = mlp.activation or "-"
    return (mlp.name, mlp.kind, activation, path, str(mlp.fused_calls), own or "0")


def _siblings_in_words(layer: LayerReport) -> str:
    words = ", ".join(layer.siblings) or "none"
    return f"{words}: {layer.alone}" if layer.alone else words


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
