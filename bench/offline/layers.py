"""The linears of real decoder layers, with LoRA by PEFT, by lora_fast, or frozen.

Modules of real size that compute nothing: on the meta device, or on the CPU in untouched memory.
The parts between the linears (norms, attention) are the same for everybody and are replaced by an
operation without cost, and so is the activation where it is not asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DTYPE = torch.bfloat16
BLOCKSIZE = 64
BLOCKSIZE_OF_ABSMAX = 256


@dataclass(frozen=True)
class Shape:
    """Widths of a decoder layer's linears; q_width is heads × head_dim, kv_width that of K and V.

    ``intermediate`` 0: one linear alone, hidden → q_width.
    """

    name: str
    hidden: int
    q_width: int
    kv_width: int = 0
    intermediate: int = 0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(N, K) by the module's path in a decoder layer."""
        if not self.intermediate:
            return {"self_attn.q_proj": (self.q_width, self.hidden)}
        return {
            "self_attn.q_proj": (self.q_width, self.hidden),
            "self_attn.k_proj": (self.kv_width, self.hidden),
            "self_attn.v_proj": (self.kv_width, self.hidden),
            "self_attn.o_proj": (self.hidden, self.q_width),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }


# Sizes: config.json of meta-llama/Meta-Llama-3-8B, mistralai/Mistral-7B-v0.1, Qwen/Qwen3-8B and
# Qwen/Qwen3-0.6B (16 heads of 128 on 1024 hidden). The first two have the same linears.
SHAPES = (
    Shape("linear 4096x4096", 4096, 4096),
    Shape("Llama-3-8B and Mistral-7B layer", 4096, 4096, 1024, 14336),
    Shape("Qwen3-8B layer", 4096, 4096, 1024, 12288),
    Shape("Qwen3-0.6B layer", 1024, 2048, 1024, 3072),
)


class _Attention(nn.Module):
    """q, k and v of one x, and o, in a forward whose source shows the group."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        mixed = _between(self.shape.q_width, q, k, v)
        return _between(self.shape.hidden, self.o_proj(mixed))


class _Mlp(nn.Module):
    """gate and up of one h, and down."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, h: Tensor) -> Tensor:
        gate = self.gate_proj(h)
        up = self.up_proj(h)
        y: Tensor = self.down_proj(_between(self.shape.intermediate, gate, up))
        return y


class _ActivatedMlp(nn.Module):
    """The MLP with its activation, as Hugging Face's LlamaMLP computes it."""

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.down_proj(functional.silu(self.gate_proj(h)) * self.up_proj(h))
        return y


class Linears(nn.Module):
    """x [1, M, hidden] through the linears in the order and with the inputs of a decoder layer."""

    def __init__(self, shape: Shape, weight: str, device: str, *, activates: bool = False) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _ActivatedMlp() if activates else _Mlp(shape)
        self.shape = shape
        for path, (N, K) in shape.linears.items():
            parent, name = path.split(".")
            layer = linear4bit(N, K, device) if weight == "nf4" else dense(N, K, device)
            getattr(self, parent).add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.shape.intermediate:
            q: Tensor = self.self_attn.q_proj(x)
            return q
        y: Tensor = self.mlp(self.self_attn(x))
        return y


class _Between(torch.autograd.Function):
    """Any function of the linears' outputs: a result and gradients of the right shape."""

    @staticmethod
    def forward(ctx: Any, width: int, *inputs: Tensor) -> Tensor:
        ctx.shapes = [tensor.shape for tensor in inputs]
        return inputs[0].new_empty(*inputs[0].shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(dY.new_empty(shape) for shape in ctx.shapes))


def _between(width: int, *inputs: Tensor) -> Tensor:
    result: Tensor = _Between.apply(width, *inputs)
    return result


def dense(N: int, K: int, device: str) -> nn.Module:
    """A frozen nn.Linear with an uninitialised weight."""
    layer = nn.Linear(K, N, bias=False, device="meta", dtype=DTYPE).requires_grad_(False)
    return layer.to_empty(device=device)


def linear4bit(N: int, K: int, device: str) -> nn.Module:
    """bitsandbytes' Linear4bit in NF4 with double quantisation, nothing quantised in it."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    blocks = N * K // BLOCKSIZE
    outer = QuantState(
        absmax=torch.empty(-(-blocks // BLOCKSIZE_OF_ABSMAX), device=device),
        code=torch.empty(256, device=device),
        blocksize=BLOCKSIZE_OF_ABSMAX,
        dtype=torch.float32,
    )
    state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8, device=device),
        shape=torch.Size((N, K)),
        code=torch.empty(16, device=device),
        blocksize=BLOCKSIZE,
        quant_type="nf4",
        dtype=DTYPE,
        offset=torch.empty((), device=device),
        state2=outer,
    )
    packed = torch.empty(N * K // 2, 1, dtype=torch.uint8, device=device)
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=DTYPE, device="meta")
    layer.weight = bnb.nn.Params4bit(
        packed,
        requires_grad=False,
        quant_type="nf4",
        quant_state=state,
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state
    return layer


def with_lora(
    layers: Linears, R: int, dropout_p: float, device: str, *, adapter_dtype: torch.dtype
) -> Linears:
    """PEFT's LoRA around every linear; bfloat16 adapters, or PEFT's default for them, float32."""
    from peft import LoraConfig, get_peft_model

    model: Any = layers
    model.is_loaded_in_4bit = any(hasattr(m, "quant_state") for m in layers.modules())
    config = LoraConfig(
        r=R,
        lora_alpha=2 * R,
        lora_dropout=dropout_p,
        target_modules=[path.split(".")[1] for path in layers.shape.linears],
    )
    with torch.device(device):
        adapted = get_peft_model(model, config).base_model.model
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype)
            assert "lora_" in name
    trained: Linears = adapted.train()
    return trained


def constants(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and the tensors of quantised weights: not activations."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            if part is not None:
                found += [value for value in vars(part).values() if isinstance(value, Tensor)]
    return found
