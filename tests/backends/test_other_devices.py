"""The torch backend on other devices than a CPU, such as GPUs that the kernels do not support: fake
tensors on the meta device, whose operations refuse operands on two devices."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_fast import NF4Weight
from lora_fast.backends import torch_dropout, torch_grouped
from lora_fast.backends.torch_experts import BlockNeeds, ProjectionNeeds
from lora_fast.backends.torch_gates import GluForm, GluGate
from lora_fast.backends.torch_ops import TORCH
from lora_fast.experts.nf4_experts import NF4Experts
from lora_fast.experts.operands import Projection, sort_by_expert
from lora_fast.factors import Constants, Factors, Needs
from lora_fast.gated import GatedLinears, GatedNeeds

M, K, N, R, E = 80, 64, 48, 8, 4
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN = Needs(x=True, bias=True, A=True, B=True)
WEIGHTS = pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The meta device has no generator; masks that are captured need none."""
    monkeypatch.setattr(torch_dropout, "is_capturing", lambda device: True)
    with FakeTensorMode(), torch.no_grad():
        yield


def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def quantised(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """The bytes of an NF4 weight, with double quantisation, and bitsandbytes' description."""
    elements = torch.Size(shape).numel()
    blocks = elements // 64
    outer = SimpleNamespace(absmax=there(-(-blocks // 256)), code=there(256), blocksize=256)
    state = SimpleNamespace(
        absmax=there(blocks, dtype=torch.uint8),
        code=there(16),
        offset=there(),
        state2=outer,
        nested=True,
        blocksize=64,
        quant_type="nf4",
        dtype=dtype,
        shape=torch.Size(shape),
    )
    return there(elements // 2, dtype=torch.uint8), state


def weight_of(N: int, K: int, dtype: torch.dtype, nf4: bool) -> Tensor | NF4Weight:
    return NF4Weight(*quantised(N, K, dtype=dtype)) if nf4 else there(N, K, dtype=dtype)


def plain(N: int, K: int, dtype: torch.dtype, nf4: bool, p: float = 0.0) -> Factors:
    constants = Constants(2.0, p, there(1, dtype=torch.int64))
    W, bias = weight_of(N, K, dtype, nf4), there(N, dtype=dtype)
    return Factors(W, bias, there(R, K), there(N, R), constants=constants)


def assert_there(found: Any) -> int:
    """The number of tensors in nested tuples and lists, all of which must be there."""
    if isinstance(found, Tensor):
        assert found.device.type == "meta"
        return 1
    return sum(map(assert_there, found or ()))


@WEIGHTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_with_every_factor(dtype: torch.dtype, nf4: bool) -> None:
    needs = Needs(*[True] * len(Needs._fields))._replace(weight=not nf4)
    for rows in (1, M):
        x, spans = there(rows, K, dtype=dtype), there(rows, 2, dtype=torch.int32)
        f = plain(N, K, dtype, nf4, p=0.1)._replace(b=there(N), d=there(R), g=there(N))
        f = f._replace(constants=f.constants._replace(rank_spans=spans))
        ys, saved = TORCH.forward(x, [f], [needs])
        assert assert_there((ys, saved)) == 3
        assert assert_there(TORCH.backward(ys, x, saved, [f], [needs])) == sum(needs)
        assert_there(TORCH.row_norms(f.weight, there(R, K), there(N, R), 2.0))


@WEIGHTS
def test_a_group_and_an_opaque_base(nf4: bool) -> None:
    x, needs = there(M, K, dtype=torch.bfloat16), [PLAIN, PLAIN]
    fs = [plain(N, K, x.dtype, nf4, p=0.1) for _ in needs]
    ys, saved = TORCH.forward(x, fs, needs)
    assert assert_there(TORCH.backward(ys, x, saved, fs, needs)) == 7
    y, saved = TORCH.add_low_rank(ys[0], x, fs[0], PLAIN, in_place=True)
    assert assert_there(TORCH.low_rank_gradients(y, x, saved, fs[0], PLAIN)) == 4


@WEIGHTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_mlp(dtype: torch.dtype, nf4: bool) -> None:
    x = there(M, K, dtype=dtype)
    shapes = ((N, K), (N, K), (K, N))
    linears = GatedLinears(*(plain(*shape, dtype, nf4, p=0.1) for shape in shapes))
    needs = GatedNeeds(PLAIN, PLAIN, PLAIN)
    y, saved = TORCH.gated_forward(x, linears, "silu", needs)
    found = TORCH.gated_backward(y, x, saved, linears, "silu", needs, in_place=True)
    assert assert_there(found) >= 1 + 3 * 3


@WEIGHTS
def test_a_block_of_experts(nf4: bool) -> None:
    dtype = torch.bfloat16

    def projection(N: int, K: int) -> Projection:
        shape = (E, N, K)
        W = NF4Experts(*quantised(*shape, dtype=dtype)) if nf4 else there(*shape, dtype=dtype)
        return Projection(W, there(E, N, dtype=dtype), there(E, R, K), there(E, N, R), 2.0)

    x, w = there(M, K, dtype=dtype), there(M, 2, dtype=dtype)
    routing = sort_by_expert(there(M, 2, dtype=torch.int64), E)
    first, second, gate = projection(2 * N, K), projection(K, N), GluGate(GluForm("silu"))
    of_one = ProjectionNeeds(True, True, True)
    needs = BlockNeeds(True, True, of_one, of_one)
    out, saved = torch_grouped.block_forward(x, w, routing, first, second, gate, needs)
    assert saved is not None
    found = torch_grouped.block_backward(out, x, w, routing, saved, first, second, gate, needs)
    assert assert_there((out, found)) == 1 + 2 + 6
