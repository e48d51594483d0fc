"""The fused forward that all PEFT layers share: find obstacles, count, compute."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..base_layer.call_counts import CallCounts
from ..base_layer.obstacles import environment_obstacle
from ..replaced import own

# The method of PEFT's layers that casts x to the dtype of an adapter.
CAST = "_cast_input_dtype"


class FusedForward:
    """Mixin before a PEFT layer class: the fused forward, or PEFT's own if there is an obstacle.

    A subclass defines the layer's current state (:meth:`active`), the obstacles of an input
    (:meth:`input_obstacle`) and the computation (:meth:`fused`).
    """

    _lora_fast_calls: CallCounts
    # The group of layers that share their input, and the index of this one in it.
    _lora_fast_group: tuple[Any, int] | None = None
    # PEFT's class, its forward, and its cast of x, which somebody may replace for all layers of
    # that class.
    _lora_fast_stock: ClassVar[Any] = None
    _lora_fast_stock_forward: ClassVar[Any] = None
    _lora_fast_stock_cast: ClassVar[Any] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Which comes after this mixin, whatever a wrapper puts before it.
        stock: Any = cls.__mro__[cls.__mro__.index(FusedForward) + 1]
        cls._lora_fast_stock = stock
        cls._lora_fast_stock_forward = own(getattr(stock, "forward", None), "peft")
        cls._lora_fast_stock_cast = own(getattr(stock, CAST, None), "peft")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls = self._lora_fast_calls
        state: Any = None
        found = environment_obstacle() or self.replaced_forward()
        if found is None and (args or kwargs):
            found = self.arguments_obstacle(args, kwargs)
        elif found is None and self._lora_fast_group is not None and self._lora_fast_group[1]:
            kept = self.kept(x)
            if kept is not None:
                calls.add_fused()
                return kept
        if found is None:
            state, found = self.active(**kwargs)
        if found is None:
            found = self.input_obstacle(state, x)
        if found is not None:
            calls.add_fallback(found)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        y = self.fused(state, x)
        calls.add_fused()
        return y

    def replaced_forward(self) -> str | None:
        """Whether the forward of PEFT's class, or its cast of x, is not PEFT's any more."""
        kind = type(self)
        if kind._lora_fast_stock.forward is not kind._lora_fast_stock_forward:
            return f"forward of {kind._lora_fast_stock.__name__} replaced"
        if getattr(kind, CAST, None) is not kind._lora_fast_stock_cast or CAST in self.__dict__:
            return f"cast of the input of {kind._lora_fast_stock.__name__} replaced"
        return None

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """PEFT's, which writes W through ``.data``, while a fused forward may have saved W."""
        super().merge(*args, **kwargs)  # type: ignore[misc]
        _note_changes(self)

    def unmerge(self) -> None:
        super().unmerge()  # type: ignore[misc]
        _note_changes(self)

    def active(self, **kwargs: Any) -> tuple[Any, str | None]:
        """The active adapters, and why PEFT's own forward must run for any input, or None."""
        raise NotImplementedError

    def input_obstacle(self, state: Any, x: Any) -> str | None:
        """Why x does not fit; if PEFT would raise for x, its own forward runs to do so."""
        raise NotImplementedError

    def fused(self, state: Any, x: Tensor) -> Tensor:
        """The layer's result, from what :meth:`active` returned."""
        raise NotImplementedError

    def kept(self, x: Any) -> Tensor | None:
        """The result for x, if a layer of the same group has computed it and nothing has
        changed."""
        return None

    def arguments_obstacle(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why the other arguments of a call cannot be honoured; PEFT passes them to the base."""
        return "extra arguments"

    def _get_name(self) -> str:
        return type(self).__bases__[-1].__name__


def _note_changes(layer: Any) -> None:
    """Let a backward pass that needs the base layer as it was raise, and not take the new one."""
    found = layer.get_base_layer().parameters(recurse=False)
    torch.autograd.graph.increment_version([t for t in found if not t.is_inference()])


def switched_off(layer: Any) -> str | None:
    """Why no adapter of a PEFT layer takes part in its forward; None if one does."""
    if layer.disable_adapters:
        return "adapters disabled"
    return "merged" if layer.merged else None


def rate_of(dropout: nn.Module) -> float:
    """The current p of PEFT's dropout, an nn.Dropout or nn.Identity."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def casts_input(layer: Any) -> bool:
    """Whether PEFT casts x to the adapter's dtype, or multiplies x as it is."""
    return bool(getattr(layer, "cast_input_dtype_enabled", True))
