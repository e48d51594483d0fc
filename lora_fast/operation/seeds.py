"""Seeds of dropout's masks."""

from __future__ import annotations

import torch


def draw_seed(device: torch.device) -> int:
    """A seed from torch's generator of `device`, whose state advances; does not wait for CUDA."""
    if device.type != "cuda":
        return int(torch.randint(2**62, (), device=device))
    if torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "dropout_p must be 0 while a CUDA graph is captured, or dropout_seed given: "
            "every replay would use the same mask"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return (generator.initial_seed() * 0x9E3779B97F4A7C15 + offset) % 2**62


def seed_tensor(dropout_seed: int | None) -> torch.Tensor:
    """The seed of dropout in a compiled graph, which draws it from torch's generator of the CPU
    unless it is given."""
    return torch.randint(2**62, ()) if dropout_seed is None else torch.tensor(dropout_seed)
