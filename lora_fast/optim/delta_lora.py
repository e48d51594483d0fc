"""Delta-LoRA: the frozen weight follows its adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..four_bit.layout import forbid_packing
from .delta_layers import DeltaLayer, find_layers, tensors_of

_KEY = "delta_lora"


class DeltaLoRA(torch.optim.Optimizer):
    """Wraps `optimizer`; after each of its steps the weight under every adapter moves, too.

        W_{t+1} = W_t + c · s · (B_{t+1} A_{t+1} − B_t A_t)           from step `start_step` on

    W [N, K] dense or NF4 (bitsandbytes), A [R, K], B [N, R], s the adapter's own scaling (α/R); the
    first `start_step` steps do not change W. The backward pass is unchanged, and each step adds one
    pass over each W. `model`'s layers are ``LoRALinear`` or PEFT's ``lora.Linear`` and
    ``lora.bnb.Linear4bit``, accelerated or not. Learning rate schedulers, accelerate and
    transformers' Trainer accept the wrapper in place of the optimizer.

    One step moves W by far less than a 16-bit number or an NF4 code can resolve, and the rounding
    losses do not cancel. But the differences telescope: as long as only `optimizer` changes A and
    B, W_t = W_start + c · s · (B_t A_t − B_start A_start). With ``keep_start=True`` each update of
    a 16-bit or NF4 weight is computed from W_start, which stays in memory beside W (2 bytes per
    weight, 0.5 for NF4), so W is always one rounding away from the equation. With
    ``keep_start=False`` it is computed from W in place. A float32 or float64 W needs neither: it is
    always updated in place. Measured for W ~ N(0, 0.02²) of 256 × 256, R = 16, s = 2, c = 0.5
    and 300 steps of AdamW (``python -m bench.delta_lora_rounding``): how much of the update
    arrived, its projection on the exact one, and the error relative to the exact update

        ===================  ==================  ==================
        weight               lr 1e-4             lr 1e-3
        ===================  ==================  ==================
        float32              1.00, error 5e-6    1.00, error 3e-7
        bfloat16, kept       1.00, error 0.019   1.00, error 0.002
        bfloat16, in place   0.17, error 0.90    1.00, error 0.045
        float16, kept        1.00, error 0.002   1.00, error 2e-4
        float16, in place    0.90, error 0.31    1.00, error 0.002
        NF4, kept            0.76, error 0.84    1.00, error 0.10
        NF4, in place        0.00, error 1.0     0.01, error 1.0
        ===================  ==================  ==================

    NF4 in place loses everything; even with the start kept, an NF4 weight does not move until its
    update reaches half the gap between codes (after 30 steps at lr 1e-4, 2% had arrived). A dense W
    suits Delta-LoRA best.

    ``state_dict()`` is that of `optimizer` plus one entry with all that a resumed run needs to
    continue bitwise, W included: a checkpoint grows by the size of the adapted weights. Loading it
    sets W, whatever weights the model had and in whichever order the two are loaded. W is part of
    the trained model: save it as well; the adapter alone does not restore it.

    Raises TypeError or ValueError for arguments out of range, for a model without LoRA layers in
    `optimizer`, for dropout before an adapter, merged adapters, a W that is shared or trained;
    NotImplementedError for variants of LoRA (DoRA, AdaLoRA, VeRA, …), other layers than linear
    ones, and optimizers with separate weights for evaluation. A step with adapters merged or
    switched since raises RuntimeError.
    Source: Delta-LoRA (Zi et al. 2023, eq. 6 and algorithm 1; c is λ there, start_step is K).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        c: float,
        start_step: int = 0,
        keep_start: bool = True,
    ) -> None:
        _check_arguments(optimizer, model, c, start_step, keep_start)
        self.optimizer = optimizer
        self.c, self.start_step, self.keep_start = float(c), start_step, keep_start
        self.steps = 0
        self._layers = find_layers(
            model,
            (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad),
        )
        forbid_packing(model)
        # The hooks that torch.optim.Optimizer.__init__ makes, without its parameter groups.
        super().__setstate__({})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the wrapped optimizer, then the update of every W; returns its loss."""
        updates = self.steps >= self.start_step
        if updates:
            for layer in self._layers:
                layer.check()
            for layer in self._layers:
                layer.drop_anchor(self._keeps_start(layer))
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self.steps += 1
        if updates:
            for layer in self._layers:
                layer.update(self.c)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the wrapped optimizer; adapters among them do not move their W."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's, plus under "delta_lora" all that W depends on; tensors are not
        copied."""
        layers = {layer.name: _layer_state(layer) for layer in self._layers if layer.anchor}
        own = {"c": self.c, "start_step": self.start_step, "steps": self.steps, "layers": layers}
        return {**self.optimizer.state_dict(), _KEY: own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, W included.

        Raises ValueError, before anything is changed, if it is not that of a DeltaLoRA with the
        same c, start_step and layers.
        """
        inner = dict(state_dict)
        own = inner.pop(_KEY, None)
        self._check_state(own)
        self.optimizer.load_state_dict(inner)
        self.steps = own["steps"]
        for layer in self._layers:
            _load_layer(layer, own["layers"].get(layer.name), self.c)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler sets its own `step` on the instance, which cannot be pickled.
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def _keeps_start(self, layer: DeltaLayer) -> bool:
        return self.keep_start and layer.rounds

    def _check_state(self, own: Any) -> None:
        if not isinstance(own, dict):
            raise ValueError(f"state_dict must be that of a DeltaLoRA, got none for {_KEY!r}")
        for name in ("c", "start_step"):
            if own[name] != getattr(self, name):
                raise ValueError(
                    f"state_dict must have {name} = {getattr(self, name)}, got {own[name]}"
                )
        started, expected = own["layers"], {layer.name: layer for layer in self._layers}
        if started and started.keys() != expected.keys():
            differing = sorted(started.keys() ^ expected.keys())
            raise ValueError(f"state_dict must have the layers of the model, got other {differing}")
        for name, layer in expected.items():
            if not started:
                if layer.anchor and layer.start is None:
                    raise ValueError(
                        f"state_dict must be of a run that has started, got one from before: the "
                        f"first weight under {name!r} is not kept"
                    )
                continue
            _check_layer_state(layer, started[name], self._keeps_start(layer))


def _layer_state(layer: DeltaLayer) -> dict[str, Any]:
    weight = layer.weight if layer.start is None else layer.start
    return {
        "kept": layer.start is not None,
        "weight": list(tensors_of(weight)),
        "anchor": [list(pair) for pair in layer.anchor],
        "now": [[A, B] for A, B, _ in layer.adapters()],
    }


def _check_layer_state(layer: DeltaLayer, state: dict[str, Any], keeps_start: bool) -> None:
    if state["kept"] is not keeps_start:
        raise ValueError(
            f"state_dict must be of keep_start={keeps_start} for {layer.name!r}, "
            f"got {state['kept']}"
        )
    expected = [_geometry(t) for t in tensors_of(layer.weight)]
    expected += [_geometry(t)[:1] for A, B, _ in layer.adapters() for t in (A, B)]
    actual = [_geometry(t) for t in state["weight"]]
    actual += [_geometry(t)[:1] for pair in state["now"] for t in pair]
    if actual != expected:
        raise ValueError(
            f"state_dict must have tensors of {expected} for {layer.name!r}, got {actual}"
        )


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype


def _load_layer(layer: DeltaLayer, state: dict[str, Any] | None, c: float) -> None:
    if state is None:
        if layer.start is not None:
            _copy_all(tensors_of(layer.weight), tensors_of(layer.start))
            layer.start = None
        layer.anchor = []
        return
    device = layer.base.weight.device
    now = [[t.to(device) for t in pair] for pair in state["now"]]
    anchor = [(A.to(device, copy=True), B.to(device, copy=True)) for A, B in state["anchor"]]
    if state["kept"]:
        layer.drop_anchor(keep_start=True)
        assert layer.start is not None
        _copy_all(tensors_of(layer.start), state["weight"])
        layer.anchor = anchor
        layer.update(c, now)
    else:
        layer.anchor = anchor
        _copy_all(tensors_of(layer.weight), state["weight"])


def _copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        if target.data_ptr() != source.data_ptr():
            target.copy_(source)


def _check_arguments(optimizer: Any, model: Any, c: Any, start_step: Any, keep_start: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, DeltaLoRA):
        raise ValueError("optimizer must not be wrapped yet, got a DeltaLoRA")
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise NotImplementedError(
            f"optimizer must keep one set of weights, got {type(optimizer).__name__}, which swaps "
            "them for evaluation"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(c, bool) or not isinstance(c, (int, float)):
        raise TypeError(f"c must be a number, got {type(c).__name__}")
    if not math.isfinite(c):
        raise ValueError(f"c must be finite, got {c}")
    if isinstance(start_step, bool) or not isinstance(start_step, int):
        raise TypeError(f"start_step must be an int, got {type(start_step).__name__}")
    if start_step < 0:
        raise ValueError(f"start_step must be at least 0, got {start_step}")
    if not isinstance(keep_start, bool):
        raise TypeError(f"keep_start must be a bool, got {type(keep_start).__name__}")
