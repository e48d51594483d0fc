"""4-bit parameters of a module of experts.

    module._parameters["gate_up_proj"]     the packed bytes [n / 2, 1], uint8
    module.__dict__["_lora_fast_nf4"]      bitsandbytes' description of each, its ``quant_state``

The class of the module becomes one derived from it, whose attribute is the parameter in its own
shape and dtype: decoded once for a call while the module is called, otherwise a tensor that is
decoded when something computes with it and refuses to be changed, because PEFT's merge would add to
a copy. PEFT finds, wraps and parametrizes such a parameter as it does a dense one.

Saved keys are those of ``bitsandbytes.nn.parametrize``: ``gate_up_proj`` and, beside it,
``gate_up_proj.absmax``, ``gate_up_proj.quant_state.bitsandbytes__nf4``, …; here they can be loaded,
too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from .nf4_experts import NF4Experts

_STATES = "_lora_fast_nf4"
_STATE_KEY = "quant_state.bitsandbytes__"
# What has been decoded for the calls that are running in this thread or task, by module and name.
_decoded: ContextVar[dict[tuple[int, str], Tensor] | None] = ContextVar("decoded", default=None)


def packed_experts(module: nn.Module, name: str) -> tuple[Tensor, Any] | None:
    """The packed bytes and the ``quant_state`` of a 4-bit parameter; None for any other, while PEFT
    adds an adapter to it, and while an engine holds a part of it alone."""
    state, packed = states_of(module).get(name), module._parameters.get(name)
    if state is None or packed is None or hasattr(packed, "placements"):  # of a DTensor
        return None
    if state.absmax.device != packed.device and not packed.is_meta:
        state.to(packed.device)  # module.to() moved the bytes alone
    return packed, state


def packed_parameters(module: nn.Module) -> list[str]:
    """The names of the 4-bit parameters of a module."""
    return [name for name in states_of(module) if module._parameters.get(name) is not None]


def decoded_bytes(module: nn.Module) -> int:
    """What the 4-bit parameters of a module take once they are decoded."""
    states = [state for name, state in states_of(module).items() if name in module._parameters]
    return sum(math.prod(state.shape) * state.dtype.itemsize for state in states)


def store_packed(module: nn.Module, name: str, packed: Tensor, state: Any) -> None:
    """Give a parameter, dense or packed, these bytes."""
    module._parameters[name] = nn.Parameter(packed, requires_grad=False)
    module.__dict__.setdefault(_STATES, {})[name] = state
    if not isinstance(module, PackedExperts):
        module.__class__ = packed_class(type(module), module.__dict__[_STATES].keys())
    elif not isinstance(getattr(type(module), name, None), property):
        cls: Any = type(module)
        module.__class__ = packed_class(cls.__bases__[1], module.__dict__[_STATES].keys())


def unpack_parameters(module: nn.Module, dense: Callable[[Any], Tensor]) -> None:
    """Make the 4-bit parameters of a module what `dense` makes of their ``quant_state``."""
    if not isinstance(module, PackedExperts):
        return
    for name in packed_parameters(module):
        made = dense(module.__dict__[_STATES].pop(name))
        module._parameters[name] = nn.Parameter(made, requires_grad=False)
    module.__class__ = _packed_type(module).__bases__[1]


def states_of(module: nn.Module) -> dict[str, Any]:
    """The ``quant_state`` of every 4-bit parameter of a module."""
    found: dict[str, Any] = module.__dict__.get(_STATES, {})
    return found


def undecorated(forward: Any) -> Any:
    """The forward below the one that decodes parameters once for a call."""
    return forward.__wrapped__ if getattr(forward, "__code__", None) is _DECODES_ONCE else forward


def _decoding_once(forward: Callable[..., Any]) -> Any:
    @functools.wraps(forward)
    def decodes_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = _decoded.set({})
        try:
            return forward(self, *args, **kwargs)
        finally:
            _decoded.reset(token)

    return decodes_once


_DECODES_ONCE = _decoding_once(lambda self: None).__code__


class PackedExperts(nn.Module):
    """Mixin before a module of experts whose parameters are stored in 4 bits."""

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """As ever, except that a 4-bit parameter which PEFT puts back after a call is one again."""
        if isinstance(tensor, DecodedOnUse):
            self._parameters[name] = tensor._parameter
        else:
            super().register_buffer(name, tensor, persistent)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in packed_parameters(self):
            for key, value in self.__dict__[_STATES][name].as_dict(packed=True).items():
                destination[f"{prefix}{name}.{key}"] = value

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in packed_parameters(self):
            _read_state(self, state_dict, prefix, name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = _packed_type(self)
        names = tuple(self.__dict__[_STATES])
        return _made_again, (cls.__bases__[1], names), self.__dict__.copy()

    def _get_name(self) -> str:
        return type(self).__name__


def _packed_type(module: nn.Module) -> Any:
    return next(c for c in type(module).__mro__ if c.__dict__.get("_is_packed"))


def packed_class(cls: Any, names: Any) -> Any:
    """The class derived from `cls` whose attributes `names` are decoded."""
    return _packed_class(cls, tuple(names))


@functools.cache
def _packed_class(cls: Any, names: tuple[str, ...]) -> Any:
    members: dict[str, Any] = {
        name: property(functools.partial(_attribute, name)) for name in names
    }
    members |= {"forward": _decoding_once(cls.forward), "_is_packed": True}
    members |= {"__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (PackedExperts, cls), members)


def _made_again(cls: type[nn.Module], names: tuple[str, ...]) -> Any:
    made = packed_class(cls, names)
    return made.__new__(made)


def _attribute(name: str, module: Any) -> Tensor:
    packed = module._parameters.get(name)
    if packed is None:
        raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")
    found = packed_experts(module, name)
    if found is None:  # another parameter of that name has replaced it, or parts of it have
        return packed
    cache = _decoded.get()
    if cache is None:
        return DecodedOnUse(packed, found[1])
    key = (id(module), name)
    if key not in cache:
        with torch.no_grad():
            cache[key] = NF4Experts(*found).dequantize()
    return cache[key]


class DecodedOnUse(Tensor):
    """A 4-bit parameter by its shape and dtype; operations decode it, none may change it."""

    _parameter: Any
    _state: Any

    @staticmethod
    def __new__(cls, parameter: Any, state: Any) -> DecodedOnUse:
        made: Any = Tensor._make_wrapper_subclass(
            cls, tuple(state.shape), dtype=state.dtype, device=parameter.device
        )
        made._parameter, made._state = parameter, state
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._parameter, args[0]._state)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info and argument.alias_info.is_write:
                if func is torch.ops.aten.set_.source_Tensor and args[1] is value:
                    return value
                raise _cannot_change()
        args, kwargs = torch.utils._pytree.tree_map_only(
            cls, lambda t: NF4Experts(t._parameter, t._state).dequantize(), (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DecodedOnUse(shape={tuple(self.shape)}, dtype={self.dtype})"

    @property
    def data(self) -> Any:
        return DecodedOnUse(self._parameter, self._state)

    @data.setter
    def data(self, value: Any) -> None:
        raise _cannot_change()


def _cannot_change() -> RuntimeError:
    return RuntimeError(
        "a parameter that is stored in 4 bits cannot be changed in place; to merge an adapter into "
        "it call lora_fast.accelerate(model) before merging, or run lora-fast merge"
    )


def _read_state(module: nn.Module, state_dict: Any, prefix: str, name: str) -> None:
    """Take the description of the bytes out of a state_dict."""
    key = f"{prefix}{name}"
    if key not in state_dict:
        return
    parts = {k: state_dict.pop(k) for k in list(state_dict) if k.startswith(f"{key}.")}
    packed, now = state_dict[key], module.__dict__[_STATES][name]
    if not any(_STATE_KEY in k for k in parts):
        raise RuntimeError(
            f"{key} must be the 4-bit weight that quantize_experts stores, with its quant_state, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}; load dense weights first and "
            "quantise them then"
        )
    from bitsandbytes.functional import QuantState

    own = {k.removeprefix(f"{key}."): v for k, v in parts.items()}
    state = QuantState.from_dict(own, device=packed.device)
    if tuple(state.shape) != tuple(now.shape):
        raise RuntimeError(f"{key} must have shape {tuple(now.shape)}, got {tuple(state.shape)}")
    module.__dict__[_STATES][name] = state
