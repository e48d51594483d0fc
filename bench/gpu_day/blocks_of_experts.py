"""Blocks of experts of real models, dense and NF4, against the frozen block and stock PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.expert_blocks import LAYERS, ROWS, Block, build, check_fused, step_of
from bench.instruments.paired import Step

from .day import Day
from .run_units import Unit
from .timing import contest

_TINY = Block("tiny", 4, 2, 32, 16)
# Two copies of DeepSeek-V3's experts do not fit beside a third on most cards.
_BLOCKS = LAYERS[:3]
_SECONDS = 2.0
_DTYPE = torch.bfloat16


def units(day: Day) -> list[Unit]:
    """Most tokens first."""
    if day.rehearsal:
        return [Unit("tiny × 8", lambda: _measured(day, _TINY, 8))]
    return [
        Unit(f"{block.name} × {tokens}", lambda block=block, M=tokens: _measured(day, block, M))
        for tokens in reversed(ROWS)
        for block in _BLOCKS
    ]


def _measured(day: Day, block: Block, tokens: int) -> dict[str, Any]:
    makers = {name: _maker(day, block, tokens, name) for name in ("frozen", "peft", "lora_fast")}
    makers["lora_fast nf4"] = _maker(day, block, tokens, "lora_fast", quantised=True)
    day = replace(day, seconds=min(day.seconds, _SECONDS))
    row = contest(day, makers, baseline="frozen")
    return {**row, "M": tokens, "E": block.E, "k": block.k, "H": block.H, "I": block.I}


def _maker(
    day: Day, block: Block, tokens: int, name: str, *, quantised: bool = False
) -> Callable[[], Step]:
    """A forward and a backward pass; ours is checked to run fused."""

    def make() -> Step:
        with torch.device(day.device):
            experts = build(block, _DTYPE, quantised=quantised)[name]
        forward, inputs = step_of(experts, block, tokens, _DTYPE, day.device)
        dY = torch.randn(tokens, block.H, device=day.device, dtype=_DTYPE)
        trained = [*inputs, *experts.parameters()]
        wanted = [tensor for tensor in trained if tensor.requires_grad]

        def step() -> object:
            return torch.autograd.grad(forward(), wanted, dY)

        if name == "lora_fast":
            step()
            check_fused(experts)
        return step

    return make
