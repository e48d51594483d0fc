"""Compile the kernels of a model before its first step, and time them if timing is on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base_layer.linear import weight_shape
from ..gated_mlps.fused_mlp import FusedMLP
from ..gated_mlps.operands import linears_of
from ..modules.adapter_module import AdapterModule
from .report import adapted_layers, report
from .routes import OPAQUE

Progress = Callable[[int, int, str], None]


class Unit(NamedTuple):
    """What is computed together: siblings that share their input, a gated MLP, or one layer.

    ``alike``: how many units of the model are identical to the kernels; this is the first.
    """

    names: tuple[str, ...]
    layers: tuple[Any, ...]
    alike: int

    def __str__(self) -> str:
        parent = self.names[0].rpartition(".")[0]
        leaves = ", ".join(name.rpartition(".")[2] for name in self.names)
        return f"{parent}.{leaves}" if parent else leaves


def warm_up(
    model: nn.Module, tokens: int | Sequence[int] = 2048, *, progress: Progress | None = None
) -> int:
    """Compile every kernel that the fused layers of `model` launch for `tokens` rows of input.

    `tokens`: rows of x, batch times length, or several such numbers; kernels differ for up to 16,
    up to 64 and more rows, and for NF4 weights that are decoded first. The candidates of each
    operation are timed as well, unless LORA_FAST_AUTOTUNE=0. Identical layers run once, on copies:
    the model does not change, and no random number is drawn. ``progress(done, total, name)`` is
    called before each run. Returns the number of runs; layers that would not run fused are left
    out.

    Raises TypeError or ValueError for tokens that are not positive integers.
    """
    numbers = tokens if isinstance(tokens, Sequence) else (tokens,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"tokens must be integers, got {type(number).__name__}")
        if number < 1:
            raise ValueError(f"tokens must be at least 1, got {number}")
    runs = [(unit, M) for unit in units(model) for M in numbers]
    for done, (unit, M) in enumerate(runs):
        if progress is not None:
            progress(done, len(runs), f"{unit}, {M} rows")
        run(copy.deepcopy(list(unit.layers)), M, training=model.training)
    return len(runs)


def units(model: nn.Module) -> list[Unit]:
    """The distinct units of `model` that would run fused, in the order of its modules."""
    current = report(model)
    # An opaque base has no operation to time.
    fused = {
        line.name for line in current.layers if line.fused and not line.route.startswith(OPAQUE)
    }
    mlps = {mlp.name: model.get_submodule(mlp.name) for mlp in current.mlps if mlp.fused}
    bundles: dict[int, list[tuple[str, Any]]] = {}
    for name, layer in adapted_layers(model):
        parent = name.rpartition(".")[0]
        if parent in mlps:
            bundles[id(mlps[parent])] = [(parent, mlps[parent])]
        # Experts run in PyTorch's operations.
        elif name in fused and not hasattr(layer, "parameter_name"):
            group, _ = _group_of(layer) or (layer, 0)
            bundles.setdefault(id(group), []).append((name, layer))
    found: dict[Any, Unit] = {}
    for bundle in bundles.values():
        names, layers = zip(*bundle, strict=True)
        kind = tuple(map(kind_of, layers))
        known = found.get(kind)
        found[kind] = known._replace(alike=known.alike + 1) if known else Unit(names, layers, 1)
    return list(found.values())


def run(layers: Sequence[Any], M: int, *, training: bool) -> None:
    """Call siblings with the same x [1, M, K], or an MLP: without gradients and, when training,
    with those of inner layers and of the first layer."""
    base = _first_linear(layers[0])
    device: torch.device = base.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        x = torch.randn(1, M, weight_shape(base)[1], device=device).to(compute_dtype(base))
        trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        if training and trained:
            for needs_x in (True, False):
                inputs = [x.detach().requires_grad_(needs_x)]
                ys = _outputs([layer.train() for layer in layers], inputs[0])
                wanted = [*trained, *(inputs if needs_x else [])]
                grads = [torch.ones_like(y) for y in ys]
                torch.autograd.grad(ys, wanted, grads, allow_unused=True)
        with torch.no_grad():
            _outputs([layer.eval() for layer in layers], x)


def base_of(layer: Any) -> Any:
    """The linear layer under an adapter of PEFT or of lora_fast."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer


def _first_linear(layer: Any) -> Any:
    """The linear layer that reads the input of an adapted layer or of a gated MLP."""
    if isinstance(layer, FusedMLP):
        module: Any = layer
        layer = next(iter(linears_of(module).values()))
    return base_of(layer) if hasattr(layer, "base_layer") else layer


def compute_dtype(base: Any) -> torch.dtype:
    """The dtype of the activations around a layer: its weight's, or a 4-bit layer's compute
    dtype."""
    if base.weight.dtype.is_floating_point:
        return base.weight.dtype
    return base.compute_dtype or base.weight.quant_state.dtype


def _outputs(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    if len(layers) == 1:
        return [layers[0](x)]
    from ..peft_layers.shared_input import outputs_together

    return outputs_together(layers, x)


def _group_of(layer: Any) -> tuple[Any, int] | None:
    """The group of a PEFT layer, and its place in it; PEFT need not be installed."""
    if isinstance(layer, AdapterModule):
        return None
    from ..peft_layers.shared_input import GROUP

    return layer.__dict__.get(GROUP)


def kind_of(layer: Any) -> tuple[Any, ...]:
    """The properties that a layer's kernels depend on, beside the number of rows."""
    dropouts = tuple(m.p for m in layer.modules() if isinstance(m, nn.Dropout))
    return type(layer), dropouts, tuple(_tensors(layer))


def _tensors(layer: nn.Module) -> Iterator[tuple[Any, ...]]:
    for name, p in (*layer.named_parameters(), *layer.named_buffers()):
        state = getattr(p, "quant_state", None)
        quantised = None if state is None else (tuple(state.shape), state.blocksize, state.nested)
        yield name, tuple(p.shape), p.dtype, p.requires_grad, quantised
