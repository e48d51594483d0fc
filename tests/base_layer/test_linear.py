"""Obstacles that PEFT models on a test machine do not show, and the bookkeeping of bitsandbytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from lora_models import K, N, nf4_linear
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.instruments.accuracy import assert_accurate, orders
from lora_fast import NF4Weight, reference
from lora_fast.base_layer.linear import adapted, describe, weight_shape
from lora_fast.base_layer.obstacles import (
    CountingMode,
    base_obstacle,
    call_obstacle,
    module_obstacle,
    tensor_obstacle,
)
from lora_fast.functional import adapted_linear

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def test_plain_layers_have_no_obstacle() -> None:
    for base in (nn.Linear(K, N), nf4_linear(nn.Linear(K, N)), _linear_nf4()):
        assert base_obstacle(base) is None
        assert call_obstacle(base, torch.ones(2, K)) is None
        assert weight_shape(base) == (N, K)


def _linear_nf4() -> nn.Module:
    return bnb.nn.LinearNF4(K, N, compute_dtype=F32).to("cpu")


def test_another_device_is_seen() -> None:
    elsewhere: Any = SimpleNamespace(device=torch.device("cuda:1"), dtype=F32)
    base = nn.Linear(K, N)
    assert call_obstacle(base, torch.ones(2, K), elsewhere) == "tensors on different devices"


@pytest.mark.parametrize(
    ("tensor", "obstacle"),
    [
        (None, None),
        (torch.ones(2, 2), None),
        (nn.Parameter(torch.ones(2, 2)), None),
        (torch.ones(2, 2, device="meta"), "x is on the meta device"),
        (torch.eye(2).to_sparse(), "x is torch.sparse_coo"),
        (nn.UninitializedParameter(), "x is UninitializedParameter"),
        (nn.Buffer(torch.ones(2, 2)), None),
    ],
)
def test_tensors(tensor: Any, obstacle: str | None) -> None:
    assert tensor_obstacle(tensor, "x") == obstacle


@pytest.mark.parametrize(
    ("mode", "obstacle"), [(CountingMode, None), (FakeTensorMode, "x is FakeTensor")]
)
def test_fake_tensors_are_ordinary_where_bytes_are_counted(mode: Any, obstacle: str | None) -> None:
    with mode():
        for tensor in (torch.ones(2, 2), nn.Parameter(torch.ones(2, 2))):
            assert tensor_obstacle(tensor, "x") == obstacle


def test_layers_without_features() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        base = nn.Linear(0, N)
    assert call_obstacle(base, torch.ones(2, 0)) == "shape of x"


def test_lazy_and_compiled_layers() -> None:
    layer = nn.Linear(K, N)
    layer.compile(backend="eager")
    assert module_obstacle(layer, "lora_A", nn.Linear) == "forward of lora_A replaced"
    assert module_obstacle(nn.LazyLinear(3), "lora_A", nn.Linear) == "lora_A is LazyLinear"


def test_state_lost_by_fsdp_is_found_on_the_module() -> None:
    """FSDP puts a plain parameter where the Params4bit was; bitsandbytes repairs it in forward."""
    base = nf4_linear(nn.Linear(K, N))
    x = torch.randn(3, K)
    A, B = torch.randn(2, K), torch.randn(N, 2)
    expected = adapted(base, x, A=A, B=B, scaling=1.0, bias=base.bias)
    base.weight = nn.Parameter(base.weight.data.clone(), requires_grad=False)
    assert not hasattr(base.weight, "quant_state")
    assert base_obstacle(base) is None and call_obstacle(base, x) is None
    assert torch.equal(adapted(base, x, A=A, B=B, scaling=1.0, bias=base.bias), expected)


@pytest.mark.parametrize("first", [F32, BF16, F16])
def test_the_first_input_settles_the_compute_dtype(first: torch.dtype) -> None:
    """As in bitsandbytes: float32 and bfloat16 inputs do, float16 leaves it open."""
    ours, theirs = (nf4_linear(nn.Linear(K, N, bias=False)) for _ in range(2))
    A, B = torch.randn(2, K), torch.randn(N, 2)
    for dtype in (first, F32, BF16):
        x = torch.randn(3, K, dtype=dtype)
        y = adapted(ours, x, A=A, B=B, scaling=1.0, bias=None)
        assert y.dtype == theirs(x).dtype == dtype
        assert ours.compute_dtype == theirs.compute_dtype
        assert ours.compute_type_is_set and theirs.compute_type_is_set


@pytest.mark.parametrize("autocast", [None, F16])
def test_four_bit_layers_compute_in_their_dtype(autocast: torch.dtype | None) -> None:
    """In the layer's compute dtype, in autocast's where that is on, and back to x's dtype."""
    base = nf4_linear(nn.Linear(K, N), BF16)
    A, B, x = torch.randn(2, K), torch.randn(N, 2), torch.randn(3, K)
    weight = NF4Weight.from_params4bit(base.weight)
    factors: Any = {"A": A, "B": B, "scaling": 0.7}
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = adapted(base, x, bias=base.bias, **factors)
    expected = adapted_linear(x.to(autocast or BF16), weight, base.bias, **factors)
    assert torch.equal(y, expected.to(F32))


@pytest.mark.parametrize("storage", [torch.uint8, BF16])
@pytest.mark.parametrize("nested", [True, False])
def test_every_four_bit_format(nested: bool, storage: torch.dtype) -> None:
    base = nf4_linear(nn.Linear(K, N), F32, compress_statistics=nested, quant_storage=storage)
    weight = NF4Weight.from_params4bit(base.weight)
    A, B, x = torch.randn(2, K), torch.randn(N, 2), torch.randn(9, K)
    factors: Any = {"A": A, "B": B, "scaling": 0.7}
    assert_accurate(
        adapted(base, x, bias=base.bias, **factors),
        reference.adapted_linear(x.double(), weight, base.bias, **factors),
        orders(lambda: reference.adapted_linear(x, weight, base.bias, **factors)),
        name="y",
    )


def test_describe() -> None:
    assert describe(nn.Linear(K, N).half()) == "float16"
    assert describe(nf4_linear(nn.Linear(K, N))) == "nf4"
    assert describe(bnb.nn.Linear4bit(K, N, quant_type="fp4")) == "fp4"
    assert describe(nn.Identity()) == "unknown"
