"""A gated MLP as one operation: every result by the rule, and what is saved for backward."""

from __future__ import annotations

import pytest
from gated_checks import BF16, FP16, FP32, MEMBERS, MLP, check

from lora_fast.gated import ACTIVATIONS

DTYPES = [(FP32, None), (BF16, None), (BF16, FP32), (FP16, FP32)]


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype, adapter):
    # In 16 bits a gate close to 0 may round to the other side of the kink, in plain PyTorch too.
    has_kink = activation.startswith("relu") and dtype is not FP32
    check(MLP(dtype, adapter), activation=activation, ready=("gate",) if has_kink else ())


VARIANTS = {
    "biases": {"biased": MEMBERS},
    "fused": {"fused": True, "biased": ("gate",)},
    "fused in nf4": {"fused": True, "nf4": ("gate", "down")},
    "nf4": {"nf4": MEMBERS},
    "only down in nf4": {"nf4": ("down",)},
    "only h": {"alone": True},
    "only h of a fused layer": {"alone": True, "fused": True},
    "dropout": {"p": 0.3},
    "dropout of a fused layer": {"p": 0.3, "fused": True},
    "all dropped": {"p": 1.0},
    "gate computed elsewhere": {"ready": ("gate",)},
    "up computed elsewhere": {"ready": ("up",), "p": 0.3},
    "both computed elsewhere": {"ready": ("gate", "up"), "p": 0.3},
    "both in one, computed elsewhere": {"ready": ("gate",), "fused": True},
    "only an activation": {"ready": ("gate", "up"), "alone": True},
    "gate frozen elsewhere": {"ready": ("gate",), "frozen": ("gate",)},
    "three dimensions": {"lead": (1, 37)},
    "transposed": {"layout": "transposed"},
    "zero strides": {"layout": "zero-stride"},
    "one row": {"M": 1},
    **{f"only {name}": {"adapted": (name,), "p": 0.3} for name in MEMBERS},
    **{f"not {name}": {"adapted": tuple(m for m in MEMBERS if m != name)} for name in MEMBERS},
    "no adapter": {"adapted": ()},
}


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize(("dtype", "adapter"), [(FP32, None), (BF16, FP32)], ids=str)
def test_every_variant(changes, dtype, adapter):
    check(MLP(dtype, adapter), **changes)
