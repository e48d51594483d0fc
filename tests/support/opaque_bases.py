"""Layers whose base computes its output by itself: real ones, and stand-ins for classes whose
packages need a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from lora_models import K, N, Single, lora_config, lora_layers, run
from peft import get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, orders
from lora_fast.backends.torch_ops import TORCH
from lora_fast.base_layer.obstacles import PLAIN_TENSORS
from lora_fast.operation.seeds import draw_seed


class LinearOfSomeoneElse(nn.Linear):
    """A subclass, whose forward may be anything."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def int8(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def subclass(linear: nn.Linear) -> nn.Module:
    linear.__class__ = LinearOfSomeoneElse
    return linear


def hooked(linear: nn.Linear) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    linear.register_forward_hook(lambda module, args, y: y / 3)
    return linear


def replaced(linear: nn.Linear) -> nn.Module:
    forward = linear.forward
    linear.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]
    return linear


# name: how the base is made of a linear layer, and the class of PEFT that wraps it, None if PEFT
# finds it by itself
KINDS: dict[str, tuple[Callable[[nn.Linear], nn.Module], type | None]] = {
    "int8": (int8, None),
    "subclass": (subclass, None),
    "hooks": (hooked, None),
    "forward": (replaced, None),
}


def opaque_model(
    kind: str,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    **config: Any,
) -> Any:
    """A stock PEFT model of one layer on an opaque base, with B ≠ 0."""
    torch.manual_seed(0)
    make, wrapper = KINDS[kind]
    model: Any = Single().to(dtype)
    model.fc = make(model.fc)
    model.is_loaded_in_8bit = kind == "int8"
    if wrapper is None:
        wrapped = get_peft_model(model, lora_config(**config), autocast_adapter_dtype=False)
    else:
        packed, model.fc = model.fc, nn.Linear(K, N)
        wrapped = get_peft_model(model, lora_config(**config), autocast_adapter_dtype=False)
        found: Any = wrapped.base_model.model
        layer = wrapper(packed, "default", config=lora_config(**config), r=5, lora_alpha=8)
        layer.load_state_dict(found.fc.state_dict(), strict=False)
        layer.lora_dropout = found.fc.lora_dropout  # older PEFT does not read it from the config
        found.fc = layer
        assert isinstance(layer, lora.LoraLayer)
        packed.requires_grad_(False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype or dtype)
    return wrapped.train()


def assert_as_stock(stock: Any, x: Tensor, ps: Sequence[float] = (0.0,), fused: Any = None) -> None:
    """The output and all gradients of one layer whose adapters have the dropouts `ps` obey the
    rule, and their dtypes are PEFT's; `fused` is `stock` itself, accelerated, unless given."""
    keeps = _keeps(ps, x)
    expected = run(stock, x)
    ref64 = _plain(stock, x, keeps, torch.float64)
    eager = orders(lambda: _plain(stock, x, keeps, x.dtype))
    torch.manual_seed(3)
    actual = run(lora_fast.accelerate(stock) if fused is None else fused, x)
    assert {k: t.dtype for k, t in actual.items() if t is not None} == {
        k: t.dtype for k, t in expected.items() if t is not None
    }
    assert_all_accurate({k: actual[k] for k in ref64}, ref64, eager, compute_dtype=x.dtype)


def _keeps(ps: Sequence[float], x: Tensor) -> list[Tensor]:
    """The masks that a call after manual_seed(3) draws for adapters with the dropouts `ps`."""
    torch.manual_seed(3)
    found, rows = [], x.numel() // K
    for p in ps:
        keep = torch.ones(rows, K)
        if p:
            keep = TORCH.dropout_mask(draw_seed(x.device), rows, K, p, x.device) / (1 - p)
        found.append(keep.view(x.shape))
    return found


def _base_alone(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the base of a model gives and hands back for `run`'s direction of y."""
    base = lora_layers(model)[0].base_layer
    x = x.clone().requires_grad_()
    y = base(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    (dX,) = torch.autograd.grad(y, x, direction.to(y.dtype))
    return y.detach(), dX


def _plain(model: Any, x: Tensor, keeps: list[Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """What `run` gives for a model whose adapters drop x by `keeps`, the low rank in `dtype`."""
    y, dX = _base_alone(model, x)
    layer, out = lora_layers(model)[0], y.to(torch.promote_types(y.dtype, dtype))
    x = x.to(dtype).requires_grad_()
    factors = {}
    for name, keep in zip(layer.active_adapters, keeps, strict=True):
        pair = [getattr(layer, part)[name].weight for part in ("lora_A", "lora_B")]
        A, B = (t.detach().to(dtype).requires_grad_() for t in pair)
        factors[f"lora_A.{name}"], factors[f"lora_B.{name}"] = A, B
        out = out + (x * keep.to(dtype)) @ A.T @ B.T * layer.scaling[name]
    out = out if dtype is torch.float64 else out.to(y.dtype)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    dx, *grads = torch.autograd.grad(out, [x, *factors.values()], direction.to(out.dtype))
    named = zip(factors, grads, strict=True)
    return {
        "y": out.detach(),
        "x": dx + dX,
        **{f"base_model.model.fc.{name}.weight": grad for name, grad in named},
    }


def saved_bytes(model: Any, rows: int, dtype: torch.dtype) -> int:
    """What a call of a model with x [rows, K] saves for backward."""
    x = torch.randn(rows, K, dtype=dtype, requires_grad=True)
    return bytes_saved(model, lambda: model(x))


def bytes_saved(model: Any, call: Callable[[], Tensor]) -> int:
    """Bytes of all storages that `call` saves for backward, without parameters and buffers."""
    # Weights of a class of their own have no storage.
    plain = [t for t in (*model.parameters(), *model.buffers()) if type(t) in PLAIN_TENSORS]
    known = {t.untyped_storage().data_ptr() for t in plain}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if type(tensor) in PLAIN_TENSORS:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = call()
    assert y.requires_grad
    return sum(storage.nbytes() for storage in found.values())
