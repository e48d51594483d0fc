"""Whole decoder layers against the frozen floor: eager, as CUDA graphs, and their peak memory."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch

import lora_fast
from bench import decoder_layer
from bench.decoder_layer import CONTESTANTS, LLAMA_3_8B, QWEN3_8B, Case, Shape
from bench.instruments.paired import Step

from . import integrations
from .day import Day
from .run_units import Unit
from .timing import contest

_TINY = (
    Shape("tiny Llama", "llama", 64, 64, 2, 1, 32),
    Shape("tiny Qwen3", "qwen3", 64, 64, 2, 1, 32),
)
_LENGTHS = {8192: (4, 2048), 2048: (1, 2048), 512: (1, 512)}
"""Batch and length by the number of tokens."""


def long(day: Day) -> list[Unit]:
    """8192 tokens; the most likely fine-tuning runs come first."""
    if day.rehearsal:
        cases = [Case(shape, weight, 4, p, 1, 8) for shape, weight, p in _rehearsed()]
        return _units(day, cases, cases[:1])
    return _units(day, *_cases((8192,)))


def short(day: Day) -> list[Unit]:
    """512 and 2048 tokens, where launches weigh more."""
    if day.rehearsal:
        return _units(day, [Case(_TINY[0], "dense", 4, 0.0, 1, 4)], [])
    return _units(day, *_cases((2048, 512)))


def _rehearsed() -> list[tuple[Shape, str, float]]:
    return [(_TINY[0], "dense", 0.0), (_TINY[1], "nf4", 0.1)]


def _cases(tokens: tuple[int, ...]) -> tuple[list[Case], list[Case]]:
    """All cases, the usual rank without dropout first; and those with guests."""
    found = [
        Case(shape, weight, R, p, *_LENGTHS[M])
        for R, p, M, shape, weight in itertools.product(
            (16, 64), (0.0, 0.1), tokens, (LLAMA_3_8B, QWEN3_8B), ("dense", "nf4")
        )
    ]
    return found, [c for c in found if _is_usual(c) and c.M >= 2048 and c.shape is LLAMA_3_8B]


def _is_usual(case: Case) -> bool:
    return (case.R, case.dropout_p) == (16, 0.0)


def _units(day: Day, cases: list[Case], with_guests: list[Case]) -> list[Unit]:
    """Guests are slow, and come after the usual cases."""
    usual = [case for case in cases if _is_usual(case)]
    first, last = (
        [Unit(str(case), lambda case=case: measured(day, case)) for case in some]
        for some in (usual, [case for case in cases if case not in usual])
    )
    guests = [
        Unit(f"{case}, {name}", lambda case=case, make=make: make(day, case))
        for case in with_guests
        for name, make in _guests().items()
    ]
    return [*first, *guests, *last]


def _guests() -> dict[str, Callable[[Day, Case], dict[str, Any]]]:
    """Contestants that start slowly or change transformers: each in its own unit."""
    found: dict[str, Callable[[Day, Case], dict[str, Any]]] = {"compiled": _compiled}
    if importlib.util.find_spec("liger_kernel"):
        found["Liger"] = _liger
    if importlib.util.find_spec("unsloth"):
        found["Unsloth"] = _unsloth
    return found


def measured(day: Day, case: Case) -> dict[str, Any]:
    """The row of one layer."""
    return _row(day, case, _makers(day, case, (*CONTESTANTS, "lora_fast fused")))


def _makers(day: Day, case: Case, names: tuple[str, ...]) -> dict[str, Callable[[], Step]]:
    """``lora_fast`` with its defaults, ``lora_fast fused`` with our kernels only."""
    found = decoder_layer.makers(case, day.device, tuple(n.removesuffix(" fused") for n in names))
    if "lora_fast fused" in names:
        make = found["lora_fast"]

        def fused() -> Step:
            with lora_fast.set_backend(day.fused):
                step = make()

            def run() -> object:
                with lora_fast.set_backend(day.fused):
                    return step()

            return run

        found["lora_fast fused"] = fused
    return found


def _compiled(day: Day, case: Case) -> dict[str, Any]:
    backend = "eager" if day.rehearsal else "inductor"

    def make() -> Step:
        return decoder_layer.step_of(
            decoder_layer.build(case, "peft", day.device), case, day.device,
            transform=lambda layer: torch.compile(layer, backend=backend),
        )  # fmt: skip

    makers = decoder_layer.makers(case, day.device, ("frozen", "lora_fast"))
    return {**_row(day, case, {**makers, "peft compiled": make}), "new_process": True}


def _liger(day: Day, case: Case) -> dict[str, Any]:
    """All contestants with Liger's norms, rotations and SwiGLU."""
    makers = {
        name: lambda name=name: integrations.liger(case, name, day.device)
        for name in ("frozen", "peft", "lora_fast")
    }
    return {**_row(day, case, makers), "with": "Liger", "new_process": True}


def _unsloth(day: Day, case: Case) -> dict[str, Any]:
    makers = decoder_layer.makers(case, day.device, ("frozen", "lora_fast"))
    everybody = {**makers, "unsloth": lambda: integrations.unsloth(case, day.device)}
    return {**_row(day, case, everybody), "new_process": True}


def _row(day: Day, case: Case, makers: dict[str, Callable[[], Step]]) -> dict[str, Any]:
    row = contest(day, makers, baseline="frozen")
    linears = [2 * case.M * N * K for N, K in case.shape.linears]
    adapters = [2 * case.M * case.R * (N + K) for N, K in case.shape.linears]
    return {
        **row,
        "layer": case.shape.name,
        "weight": case.weight,
        "M": case.M,
        "R": case.R,
        "p": case.dropout_p,
        # Products of the linears: y and dX of the base, five of the adapters.
        "flops": {"frozen": 2 * sum(linears), "adapted": 2 * sum(linears) + 3 * sum(adapters)},
    }
