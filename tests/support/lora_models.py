"""Small models with LoRA adapters, and comparisons of them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import bitsandbytes as bnb
import torch
from four_bit_formula import bitsandbytes_decodes_by_it
from peft import AdaLoraConfig, IA3Config, LoraConfig, VeraConfig, get_peft_model
from peft.tuners import ia3
from peft.tuners.ia3 import Linear4bit as IA3Linear4bit
from peft.tuners.lora import variants
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders

bitsandbytes_decodes_by_it()
K, HIDDEN, N = 24, 40, 20
# A variant of LoRA that PEFT has from 0.20 on, as an argument of LoraConfig.
HAS_MICA, MICA = hasattr(variants, "MiCALinearVariant"), {"init_lora_weights": "mica"}


class Single(nn.Module):
    """One linear layer: what the accuracy rule of one operation is made for."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N, bias=bias)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.fc(x, *args, **kwargs)


class Mlp(nn.Module):
    """fc1 with a bias, fc2 without; ragged sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(K, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


def nf4_linear(
    linear: nn.Linear, compute_dtype: torch.dtype | None = None, **options: Any
) -> bnb.nn.Linear4bit:
    """`linear` in bitsandbytes' 4 bits, by default NF4 with double quantisation."""
    quantised = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        **{"quant_type": "nf4", **options},
    )
    quantised.load_state_dict(linear.state_dict())
    if linear.bias is not None:
        quantised.bias = nn.Parameter(linear.bias.detach().clone())
    # Linear4bit starts in float32; the dtype of the weight is part of what is quantised.
    quantised.weight.data = linear.weight.detach().clone()
    return quantised.to("cpu")


def quantised(
    model: nn.Module, compute_dtype: torch.dtype | None = None, **options: Any
) -> nn.Module:
    """`model` with every linear layer in 4 bits, marked as PEFT expects it."""
    for parent in list(model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                setattr(parent, name, nf4_linear(linear, compute_dtype, **options))
    model.is_loaded_in_4bit = True
    return model


def peft_model(
    kind: str = "dense",
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    **config: Any,
) -> Any:
    """A stock PEFT model, dense, nf4 or fp4, with B ≠ 0; of one layer unless `model` is given."""
    base = (model or Single()).to(dtype)
    if kind != "dense":
        base = quantised(base, compute_dtype, quant_type=kind)
    wrapped = get_peft_model(base, lora_config(**config), autocast_adapter_dtype=False)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    return wrapped


def lora_config(**config: Any) -> LoraConfig:
    defaults = {
        "r": 5,
        "lora_alpha": 8,
        "target_modules": r"(.*\.)?fc\d?",
        "init_lora_weights": False,
    }
    return LoraConfig(**{**defaults, **config})


def float64_copy(model: Any) -> Any:
    """The same model in float64 on plain nn.Linear, 4-bit weights decoded without rounding."""
    wide = copy.deepcopy(model)
    for layer in tuner_layers(wide):
        if isinstance(layer.base_layer, bnb.nn.Linear4bit):
            layer.base_layer = _decoded(layer.base_layer)
        if isinstance(layer, IA3Linear4bit):
            # The 4-bit layer casts its input to float32.
            layer.__class__, layer.fan_in_fan_out = ia3.Linear, False
    return wide.double()


def _decoded(quantised: bnb.nn.Linear4bit) -> nn.Linear:
    weight = lora_fast.NF4Weight.from_params4bit(quantised.weight).dequantize(torch.float32)
    dense = nn.Linear(*reversed(weight.shape), bias=quantised.bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if quantised.bias is not None:
        dense.bias = nn.Parameter(quantised.bias.detach().clone(), requires_grad=False)
    return dense


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def tuner_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def method_model(
    method: str,
    kind: str = "dense",
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    dropout: float = 0.0,
    adapters: int = 1,
    r: int | None = None,
) -> Any:
    """A stock PEFT model of one of PEFT's methods, every trained number moved off its start."""
    base = (model or Single()).to(dtype)
    if kind != "dense":
        base = quantised(base, compute_dtype, quant_type=kind)
    first = method_config(method, dropout, r)
    wrapped = get_peft_model(base, first, autocast_adapter_dtype=False)
    for number in range(1, adapters):
        config = method_config(method, dropout)
        # PEFT trains one AdaLoRA adapter at a time.
        config.inference_mode = method == "adalora"
        wrapped.add_adapter(f"adapter{number}", config)
    if adapters > 1:
        wrapped.base_model.set_adapter(["default", *(f"adapter{n}" for n in range(1, adapters))])
    generator = torch.Generator().manual_seed(2)
    for layer in tuner_layers(wrapped):
        for name in layer.adapter_layer_names:
            for parameter in getattr(layer, name).parameters():
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.data = (parameter.data + noise).to(adapter_dtype)
        for ranknum in getattr(layer, "ranknum", {}).values():
            ranknum.requires_grad_(False)
    for buffer in (t for n, t in wrapped.named_buffers() if "vera_" in n):
        buffer.data = buffer.data.to(adapter_dtype)
    return wrapped


def method_config(method: str, dropout: float = 0.0, r: int | None = None) -> Any:
    """The config of one of PEFT's methods, for the layers of this file."""
    targets = r"(.*\.)?fc\d?"
    if method in ("lora", "dora"):
        rank = 5 if r is None else r
        # Δ as large as W, whatever the rank.
        alpha = 8 if r is None else r**0.5
        return lora_config(
            r=rank, lora_alpha=alpha, use_dora=method == "dora", lora_dropout=dropout
        )
    if method == "vera":
        return VeraConfig(r=37 if r is None else r, target_modules=targets, vera_dropout=dropout)
    if method == "adalora":
        initial, target = (6, 3) if r is None else (r, max(1, r // 2))
        return AdaLoraConfig(
            init_r=initial, target_r=target, lora_alpha=8, total_step=8, tinit=1, tfinal=2,
            deltaT=1, target_modules=targets, lora_dropout=dropout,
        )  # fmt: skip
    inputs = targets if method == "ia3-feedforward" else []
    return IA3Config(target_modules=targets, feedforward_modules=inputs)


def run(
    model: nn.Module, x: Tensor, autocast: torch.dtype | None = None, **kwargs: Any
) -> dict[str, Tensor | None]:
    """The output, and the gradient of every input and parameter for a fixed direction of y."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = model(x, **kwargs)
    # The same direction, without rounding, in every dtype under test.
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(direction.to(y.dtype))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **gradients}


def compare(
    fused: nn.Module,
    stock: nn.Module,
    x: Tensor,
    *,
    compute_dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    eager_autocast: torch.dtype | None = None,
    layers: int = 1,
) -> None:
    """Outputs and all gradients obey the accuracy rule, and their dtypes are those of stock PEFT.

    The yardstick is the stock model, under autocast where `eager_autocast` says so.
    """
    plain = run(stock, x, autocast)
    eager = orders(lambda: run(stock, x, eager_autocast or autocast))
    ref64 = run(float64_copy(stock), x.double())
    actual = run(fused, x, autocast)
    assert {k: None if t is None else t.dtype for k, t in actual.items()} == {
        k: None if t is None else t.dtype for k, t in plain.items()
    }
    assert_all_accurate(actual, ref64, eager, compute_dtype=compute_dtype, layers=layers)


def assert_equal_runs(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Same keys, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        if tensor is None:
            assert actual[key] is None, key
        else:
            assert_same_bits(actual[key], tensor, name=key)


def accelerated_copy(model: Any) -> Any:
    return lora_fast.accelerate(copy.deepcopy(model))


def counted(model: nn.Module) -> tuple[int, dict[str, int]]:
    """(fused calls, fallback calls by reason) of the model so far."""
    report = lora_fast.report(model)
    return report.fused_calls, report.fallback_calls


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call PEFT's merging, which warns about rounding each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)
