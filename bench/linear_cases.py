"""One adapted linear layer in the variants that the benchmarks compare.

    frozen        nn.Linear, nothing to train: the floor that no adapter can be faster than
    bitsandbytes  Linear4bit (NF4, double quantisation), nothing to train
    peft          LoRA around the same frozen layer with stock PEFT
    lora_fast     that PEFT layer after lora_fast.accelerate

x requires a gradient in all of them, as in the middle of a network. Adapters have the dtype that
PEFT gives them by default, or that of the case.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .instruments.paired import Step
from .instruments.saved_tensors import SavedTensors

DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """Shape and kind of the layer: x [M, K], W [N, K], rank R; ``weight`` is dense or nf4.

    ``adapter_dtype`` None: PEFT's default, float32.
    """

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    weight: str
    dropout_p: float = 0.0
    adapter_dtype: torch.dtype | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        if self.weight == "nf4":
            return ("frozen", "bitsandbytes", "peft", "lora_fast")
        return ("frozen", "peft", "lora_fast")

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        dropout = f" p{self.dropout_p:g}" if self.dropout_p else ""
        return f"{self.weight} {dtype} M{self.M} K{self.K} N{self.N} R{self.R}{dropout}"


def cases(device: torch.device) -> list[Case]:
    """Llama-3-8B's linears on a GPU, small layers on a CPU."""
    if device.type == "cuda":
        shapes = [(8192, 4096, 4096), (8192, 4096, 1024), (8192, 4096, 14336), (8192, 14336, 4096)]
        sizes = [(*shape, 16) for shape in shapes]
        sizes += [(8192, 4096, 4096, 64), (512, 4096, 4096, 16)]
        dtypes = (torch.bfloat16, torch.float32)
    else:
        sizes = [(256, 384, 384, 16), (256, 384, 1536, 16)]
        dtypes = (torch.float32, torch.bfloat16)
    return [
        Case(*size, dtype, weight)
        for weight in ("dense", "nf4")
        for dtype in dtypes
        for size in sizes
    ]


@dataclass
class Layer:
    """A variant of a case, ready to run."""

    module: nn.Module
    x: Tensor
    dY: Tensor

    def forward(self) -> Tensor:
        y: Tensor = self.module(self.x)
        return y

    def forward_backward(self) -> tuple[Tensor, ...]:
        wanted = [self.x, *(p for p in self.module.parameters() if p.requires_grad)]
        return torch.autograd.grad(self.forward(), wanted, self.dY)

    def step(self, direction: str) -> Step:
        return self.forward if direction == "forward" else self.forward_backward

    def saved_bytes(self) -> int:
        """Bytes that one forward pass saves for backward, without parameters and x itself."""
        own = [self.x, *self.module.parameters(), *self.module.buffers(), *_quant_tensors(self)]
        with SavedTensors(own) as saved:
            self.forward()
        return saved.bytes


def build(case: Case, device: torch.device) -> dict[str, Layer]:
    """Every variant of ``case``, on the same W, A, B, x and dY."""
    torch.manual_seed(0)
    dense = nn.Linear(case.K, case.N, bias=False, device=device, dtype=case.dtype)
    dense.requires_grad_(False)
    x = torch.randn(case.M, case.K, device=device, dtype=case.dtype, requires_grad=True)
    dY = torch.randn(case.M, case.N, device=device, dtype=case.dtype)
    make: dict[str, Callable[[], nn.Module]] = {
        "frozen": lambda: dense,
        "bitsandbytes": lambda: linear4bit(dense),
        "peft": lambda: _peft(_base(case, dense), case),
        "lora_fast": lambda: _accelerated(_peft(_base(case, dense), case)),
    }
    return {name: Layer(make[name](), x, dY) for name in case.variants}


def fused_calls(layer: Layer) -> int:
    """How often the fused path ran: a benchmark of a fallback would be worthless."""
    import lora_fast

    return lora_fast.report(layer.module).fused_calls


def _base(case: Case, dense: nn.Linear) -> nn.Module:
    return linear4bit(dense) if case.weight == "nf4" else copy.deepcopy(dense)


def linear4bit(dense: nn.Linear) -> nn.Module:
    """NF4 with double quantisation of ``dense``, on its device; no bias."""
    import bitsandbytes as bnb

    from lora_fast.four_bit.layout import forbid_packing

    layer = bnb.nn.Linear4bit(
        dense.in_features,
        dense.out_features,
        bias=False,
        compute_dtype=dense.weight.dtype,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        dense.weight.detach().cpu().clone(), requires_grad=False, quant_type="nf4"
    )
    forbid_packing(layer)
    return layer.to(dense.weight.device)


def _peft(base: nn.Module, case: Case) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model: Any = nn.Sequential(OrderedDict(proj=base))
    model.is_loaded_in_4bit = hasattr(base, "quant_state")
    torch.manual_seed(1)
    config = LoraConfig(
        r=case.R, lora_alpha=2 * case.R, lora_dropout=case.dropout_p, target_modules=["proj"]
    )
    layer: nn.Module = get_peft_model(model, config).base_model.model.proj
    for name, parameter in layer.named_parameters():
        if case.adapter_dtype is not None and "lora_" in name:
            parameter.data = parameter.data.to(case.adapter_dtype)
        if "lora_B" in name:  # zero at first, which would test nothing
            nn.init.normal_(parameter, std=0.02)
    return layer


def _accelerated(layer: nn.Module) -> nn.Module:
    import lora_fast

    return lora_fast.accelerate(nn.ModuleList([layer]))[0]


def _quant_tensors(layer: Layer) -> list[Tensor]:
    """The constants of a quantised weight, which are neither parameters nor activations."""
    found = []
    for module in layer.module.modules():
        state = getattr(module, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                found += [v for v in vars(part).values() if isinstance(v, Tensor)]
    return found
