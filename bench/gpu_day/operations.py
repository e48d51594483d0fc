"""Operations other than one LoRA linear: groups, other methods, kernels around training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lora_fast
from bench.instruments.paired import Step
from bench.linear_cases import linear4bit

from .day import Day
from .run_units import Unit
from .timing import contest

_SECONDS = 1.0
_DTYPE = torch.bfloat16
_Makers = dict[str, Callable[[], Step]]


def units(day: Day) -> list[Unit]:
    """Each operation beside its counterpart in PEFT, bitsandbytes or PyTorch."""
    M, K, N, small = (8, 64, 64, 64) if day.rehearsal else (8192, 4096, 14336, 1024)
    return [
        Unit("q, k and v", lambda: _group(day, M, K, {"q": K, "k": small, "v": small})),
        Unit("gate and up", lambda: _group(day, M, K, {"gate": N, "up": N})),
        Unit("DoRA", lambda: _method(day, M, K, "dora")),
        Unit("VeRA", lambda: _method(day, M, K, "vera")),
        Unit("NF4 decoding", lambda: _decoding(day, N, K)),
        Unit("row norms", lambda: _row_norms(day, N, K)),
        Unit("merging", lambda: _merging(day, N, K)),
    ]


def _contest(day: Day, makers: _Makers, baseline: str, **about: Any) -> dict[str, Any]:
    row = contest(replace(day, seconds=min(day.seconds, _SECONDS)), makers, baseline=baseline)
    return {**row, **about}


class _Siblings(nn.Module):
    """Linears that read the same x, under the names that decoder layers give them."""

    def __init__(self, K: int, widths: dict[str, int], device: torch.device) -> None:
        super().__init__()
        self.names = [f"{name}_proj" for name in widths]
        for name, N in zip(self.names, widths.values(), strict=True):
            layer = nn.Linear(K, N, bias=False, device=device, dtype=_DTYPE)
            setattr(self, name, layer.requires_grad_(False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in self.names)


def _group(day: Day, M: int, K: int, widths: dict[str, int]) -> dict[str, Any]:
    from peft import LoraConfig

    x, *dYs = _random(day, (M, K), *((M, N) for N in widths.values()))
    x.requires_grad_()

    def model(adapt: str) -> Any:
        siblings = _Siblings(K, widths, day.device)
        if adapt == "frozen":
            return siblings
        names = siblings.names
        config = LoraConfig(r=4 if day.rehearsal else 16, lora_alpha=32, target_modules=names)
        adapted = _adapted(siblings, config)
        if adapt == "peft":
            return adapted
        return lora_fast.accelerate(adapted, group_shared_inputs=adapt == "lora_fast")

    makers = {
        name: _maker(model, name, x, dYs)
        for name in ("frozen", "peft", "lora_fast", "lora_fast, one by one")
    }
    return _contest(day, makers, "frozen", M=M, K=K, N=list(widths.values()))


def _method(day: Day, M: int, K: int, method: str) -> dict[str, Any]:
    from peft import LoraConfig, VeraConfig

    x, dY = _random(day, (M, K), (M, K))
    x.requires_grad_()
    R = 4 if day.rehearsal else {"dora": 16, "vera": 256}[method]

    def model(adapt: str) -> Any:
        siblings = _Siblings(K, {"q": K}, day.device)
        config = (
            LoraConfig(r=R, lora_alpha=2 * R, target_modules=["q_proj"], use_dora=True)
            if method == "dora"
            else VeraConfig(r=R, target_modules=["q_proj"], projection_prng_key=0)
        )
        if adapt == "frozen":
            return siblings
        adapted = _adapted(siblings, config)
        return adapted if adapt == "peft" else lora_fast.accelerate(adapted)

    names = ("frozen", "peft", "lora_fast")
    makers = {name: _maker(model, name, x, [dY]) for name in names}
    return _contest(day, makers, "frozen", M=M, K=K, N=K, R=R)


def _adapted(model: nn.Module, config: Any) -> Any:
    """PEFT's model with non-zero adapters; LoRA's in the dtype of the layers.

    VeRA's projections are float32 in PEFT, so its vectors must be, too.
    """
    from peft import get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            if config.peft_type == "LORA":
                parameter.data = parameter.data.to(_DTYPE)
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return adapted.train()


def _maker(build: Any, name: str, x: Tensor, dYs: list[Tensor]) -> Callable[[], Step]:
    """A forward and a backward pass; ours is checked to run fused."""

    def make() -> Step:
        model = build(name)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

        def step() -> object:
            return torch.autograd.grad(model(x), wanted, dYs)

        if name.startswith("lora_fast"):
            step()
            report = lora_fast.report(model)
            if not report.all_fused or report.fused_calls == 0:
                raise RuntimeError(f"not every adapted linear ran fused:\n{report}")
        return step

    return make


def _decoding(day: Day, N: int, K: int) -> dict[str, Any]:
    import bitsandbytes.functional as bnb

    layer: Any = linear4bit(nn.Linear(K, N, bias=False, device=day.device, dtype=_DTYPE))
    packed = lora_fast.NF4Weight.from_params4bit(layer.weight)
    makers: _Makers = {
        "bitsandbytes": lambda: (
            lambda: bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        ),
        "lora_fast": lambda: lambda: _decoded(packed, day.device),
    }
    absmax = N * K // 64
    return _contest(
        day, makers, "bitsandbytes", N=N, K=K,
        work={"flops": 0, "bytes": N * K // 2 + absmax + 2 * N * K},
    )  # fmt: skip


def _decoded(weight: lora_fast.NF4Weight, device: torch.device) -> Tensor:
    """W as our kernel decodes it; as bitsandbytes does on the torch backend."""
    from lora_fast.backends.choice import uses_triton

    if not uses_triton(device):
        return weight.dequantize(_DTYPE)
    from lora_fast.kernels import nf4_decode

    return nf4_decode.decode(weight.packed, weight.quant_state, _DTYPE)


def _row_norms(day: Day, N: int, K: int) -> dict[str, Any]:
    from lora_fast.backends.selection import backend_for

    W, A, B = _factors(day, N, K)
    makers: _Makers = {
        "PyTorch": lambda: lambda: torch.linalg.vector_norm(W + 2.0 * (B @ A), dim=1),
        "lora_fast": lambda: lambda: backend_for(W.device).row_norms(W, A, B, 2.0),
    }
    work = {"flops": 2 * N * K * A.shape[0], "bytes": 2 * N * K}
    return _contest(day, makers, "PyTorch", N=N, K=K, R=A.shape[0], work=work)


def _merging(day: Day, N: int, K: int) -> dict[str, Any]:
    from lora_fast.backends.selection import backend_for

    W, A, B = _factors(day, N, K)
    out = torch.empty_like(W)
    makers: _Makers = {
        "PyTorch": lambda: lambda: out.copy_(W.float() + 2.0 * (B.float() @ A.float())),
        "lora_fast": lambda: (
            lambda: backend_for(W.device).update_weight(W, out, A=A, B=B, scaling=2.0)
        ),
    }
    work = {"flops": 2 * N * K * A.shape[0], "bytes": 4 * N * K}
    return _contest(day, makers, "PyTorch", N=N, K=K, R=A.shape[0], work=work)


def _factors(day: Day, N: int, K: int) -> list[Tensor]:
    R = 4 if day.rehearsal else 16
    return _random(day, (N, K), (R, K), (N, R))


def _random(day: Day, *shapes: tuple[int, int]) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(shape, device=day.device, dtype=_DTYPE) for shape in shapes]
