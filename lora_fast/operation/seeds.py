"""Seeds of dropout's masks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import torch_dropout


def draw_seed(device: torch.device) -> int | Tensor:
    """A seed from torch's generator of `device`, whose state advances; does not wait for CUDA.

    A number, or, while a CUDA graph is captured, a tensor [1] that every replay draws anew.
    """
    if torch_dropout.is_capturing(device):
        return seed_tensor(None, device)
    if device.type != "cuda":
        return int(torch.randint(2**62, (), device=device))
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return (generator.initial_seed() * 0x9E3779B97F4A7C15 + offset) % 2**62


def seed_tensor(dropout_seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed [1] of dropout in a graph, which draws it from torch's generator of `device` unless
    it is given."""
    if dropout_seed is None:
        return torch.randint(2**62, (1,), device=device)
    if isinstance(dropout_seed, Tensor):
        return dropout_seed
    return torch.full((1,), dropout_seed, dtype=torch.int64, device=device)
