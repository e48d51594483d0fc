"""Bytes that each method saves for backward, in an accelerated PEFT model.

`pytest -s tests/backends/test_saved_bytes.py` prints the table. Counted are the tensors with a row
for each token; parameters and vectors are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from lora_models import K, N, accelerated_copy, counted, method_model, peft_model
from machines import interpreter, started

from bench.instruments.saved_tensors import SavedTensors

M, R = 64, {"vera": 37, "adalora": 6}
BF16, FP32 = torch.bfloat16, torch.float32
# method: (how it is built, what it saves); x, S and V are in the compute dtype
METHODS = {
    "LoRA": ("lora", "x S"),
    "rsLoRA": ("rslora", "x S"),
    "LoRA+": ("lora", "x S"),
    "Delta-LoRA": ("lora", "x S"),
    "LoRA-FA": ("lora-fa", "S"),
    "AdaLoRA": ("adalora", "x S"),
    "VeRA": ("vera", "S"),
    "DoRA": ("dora", "x S V"),
    "IA3": ("ia3", "V"),
    "BitFit": ("bitfit", ""),
}


def build(method: str, kind: str, p: float) -> torch.nn.Module:
    """One layer on a bfloat16 base with float32 adapters, PEFT's default."""
    options = {"kind": kind, "dtype": BF16, "adapter_dtype": FP32, "compute_dtype": BF16}
    if method in ("lora", "rslora", "lora-fa", "bitfit"):
        model = peft_model(**options, lora_dropout=p, use_rslora=method == "rslora")
        for name, parameter in model.named_parameters():
            if method == "lora-fa" and "lora_A" in name:
                parameter.requires_grad_(False)
            if method == "bitfit":
                parameter.requires_grad_(name.endswith("bias"))
    else:
        model = method_model(method, **options, dropout=p)
    return accelerated_copy(model)


def saved(model: torch.nn.Module) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor with M rows that is saved, each storage once."""
    x = torch.randn(M, K).to(BF16).requires_grad_()
    with SavedTensors([*model.parameters(), *model.buffers()]) as saved:
        model(x)
    return [(shape, dtype) for shape, dtype in saved.shapes if math.prod(shape) >= M]


def expected(method: str, letters: str, p: float) -> list[object]:
    rank = R.get(method, 5)
    tensors: list[object] = [
        {"x": ((M, K), BF16), "S": ((M, rank), BF16), "V": ((M, N), BF16)}[letter]
        for letter in letters.split()
    ]
    if p and method == "dora":
        # PEFT's DoRA drops the input of the base product, too, by a mask of PEFT's own.
        tensors.append(((M, K), BF16))
    return tensors


def check(title: str, kind: str, p: float, backend: str) -> None:
    method, letters = METHODS[title]
    model = build(method, kind, p)
    tensors = saved(model)
    # BitFit's layer has frozen adapters here, which take nothing.
    assert counted(model)[0] == 1
    assert sorted(map(str, tensors)) == sorted(map(str, expected(method, letters, p)))
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors)
    label = f"{backend:7} {title:11} {kind:6} p {p:<4} {letters or '-':6}"
    print(f"\n{label} {total:7} B {total / (M * K * BF16.itemsize):5.2f} x", end="")


def cases() -> Iterator[tuple[str, str, float]]:
    for title, (method, _) in METHODS.items():
        for kind in ("dense", "nf4"):
            for p in (0.0,) if method in ("ia3", "bitfit") else (0.0, 0.1):
                yield title, kind, p


@pytest.mark.parametrize(("title", "kind", "p"), cases())
def test_torch_backend(title: str, kind: str, p: float) -> None:
    check(title, kind, p, "torch")


@pytest.mark.interpreter
def test_triton_backend() -> None:
    with started(interpreter()):
        for title, kind, p in cases():
            check(title, kind, p, "triton")
