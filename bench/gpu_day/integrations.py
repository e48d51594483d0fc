"""Fast paths of other libraries around the same decoder layer, if they are installed.

Both change classes of transformers for the whole process, which is not reused.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from bench import decoder_layer
from bench.decoder_layer import Case
from bench.instruments.paired import Step


def liger(case: Case, contestant: str, device: torch.device) -> Step:
    """A contestant whose norms, rotary embedding and SwiGLU are Liger's (liger_kernel 0.8).

    The classes are exchanged before the layer is made; existing instances stay as they are.
    """
    from liger_kernel.transformers import monkey_patch

    patch = getattr(monkey_patch, f"apply_liger_kernel_to_{case.shape.family}")
    patch(cross_entropy=False, fused_linear_cross_entropy=False)
    return decoder_layer.makers(case, device, (contestant,))[contestant]()


def unsloth(case: Case, device: torch.device) -> Step:
    """PEFT's layer with Unsloth's kernels for the MLP, q/k/v and o (unsloth.kernels.fast_lora)."""
    import unsloth  # noqa: F401 - has to come before what it changes
    from unsloth.kernels import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

    model: Any = decoder_layer.build(case, "peft", device)
    (layer,) = model.base_model.model.layers
    layer.mlp.forward = types.MethodType(apply_lora_mlp_swiglu, layer.mlp)
    attention = layer.self_attn
    parts = types.SimpleNamespace(
        q_proj=attention.q_proj, k_proj=attention.k_proj, v_proj=attention.v_proj
    )
    first = _First(lambda x: apply_lora_qkv(parts, x))
    attention.q_proj, attention.k_proj = first, _Next(first, 1)
    attention.v_proj = _Next(first, 2)
    output = types.SimpleNamespace(o_proj=attention.o_proj)
    attention.o_proj = _First(lambda x: (apply_lora_o(output, x),))
    trained = [p for part in vars(parts).values() for p in part.parameters() if p.requires_grad]
    trained += [p for p in output.o_proj.parameters() if p.requires_grad]
    trained += [p for p in layer.mlp.parameters() if p.requires_grad]
    return decoder_layer.step_of(model, case, device, trained=trained)


class _First(nn.Module):
    """Replaces the first of some projections: computes all, returns its own."""

    def __init__(self, compute: Any) -> None:
        super().__init__()
        self._compute = compute
        self.results: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.results = self._compute(x)
        return self.results[0]


class _Next(nn.Module):
    """Replaces another of them: returns what the first one computed."""

    def __init__(self, first: _First, place: int) -> None:
        super().__init__()
        self._first, self._place = [first], place  # in a list, so that it is not a child

    def forward(self, x: Tensor) -> Tensor:
        return self._first[0].results[self._place]
