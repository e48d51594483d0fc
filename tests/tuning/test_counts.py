"""The counted bytes and FLOPs of a plan, against the launches and operations that really happen.

The kernels' launches are recorded and not compiled; bench.instruments.traffic, which is
tested against what they load and store, counts their bytes. PyTorch's operations run on meta
tensors.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from machines import NATIVE_DTYPES, multiplying
from triton.runtime.jit import JITFunction

from bench.instruments import stub_driver, traffic
from bench.offline.operations import OperationCounter
from lora_fast.backends.triton_ops import TritonBackend
from lora_fast.factors import Constants, Factors, Needs, Saved
from lora_fast.nf4 import NF4Weight
from lora_fast.tuning.counts import works
from lora_fast.tuning.plans import (
    AUGMENTED,
    BACKWARD,
    BACKWARD_GROUP,
    FORWARD,
    FORWARD_GROUP,
    FUSED,
    HYBRID,
    Plan,
    query,
)

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="reads the launches of the compiler's JIT"
    ),
    pytest.mark.usefixtures("allocating_as_users_do"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCH = 90
ALL = Needs(x=True, A=True, B=True)
TRITON = TritonBackend(cublas=False)


def _operands(M, N, K, R, dtype, adapter):
    def meta(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    A, B = meta(R, K, of=adapter), meta(N, R, of=adapter)
    f = Factors(meta(N, K), A=A, B=B, constants=Constants(0.5))
    return meta(M, K), meta(M, N), f


def _launches(monkeypatch, call) -> list[Any]:
    launches: list[Any] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        known = {name: value for name, value in values.items() if name in self.arg_names}
        launches.append(SimpleNamespace(name=self.fn.__name__, grid=(*grid, 1, 1)[:3],
                                        arguments=known, constexprs={}))  # fmt: skip

    monkeypatch.setattr(JITFunction, "run", run)
    with stub_driver.recording(ARCH):
        call()
    return launches


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, FP32), (FP16, FP32)], ids=str)
@pytest.mark.parametrize("R", [16, 64, 200])
@pytest.mark.parametrize("needs", [ALL, Needs(A=True, B=True), Needs(x=True, B=True)], ids=str)
def test_the_fused_bytes_are_those_of_the_launches(monkeypatch, R, dtypes, needs):
    x, dY, f = _operands(2048, 1536, 4096, R, *dtypes)
    forward = _launches(monkeypatch, lambda: TRITON.forward(x, [f], [needs]))
    saved = Saved(x.new_empty(2048, R))
    backward = _launches(monkeypatch, lambda: TRITON.backward([dY], x, saved, [f], [needs]))
    for op, rows, launches in ((FORWARD, x, forward), (BACKWARD, dY, backward)):
        asked = query(op, rows, [f], [needs if op == BACKWARD else Needs()], cublas=True)
        counted = works(FUSED, asked, ARCH)
        passes = [p for launch in launches for p in traffic.traffic(launch)]
        assert sum(work.launches for work in counted) == len(launches), op
        assert sum(work.bytes for work in counted) == sum(p.bytes for p in passes), op
        assert sum(work.flops for work in counted) == sum(p.flops for p in passes), op


@pytest.mark.parametrize(
    ("M", "R", "dtype"), [(2048, 16, BF16), (2048, 64, BF16), (2048, 16, FP16), (16, 16, BF16)]
)
@pytest.mark.parametrize("needs", [ALL, Needs(A=True, B=True), Needs(x=True)], ids=str)
def test_the_fused_bytes_of_a_group_are_those_of_the_launches(monkeypatch, M, R, dtype, needs):
    (x, dY, q), (_, dK, k) = (_operands(M, N, 4096, R, dtype, FP32) for N in (1536, 512))
    fs, wanted, S = [q, k], [needs, needs], x.new_empty(M, 2 * R)
    forward = _launches(monkeypatch, lambda: TRITON.forward(x, fs, wanted))
    backward = _launches(monkeypatch, lambda: TRITON.backward([dY, dK], x, Saved(S), fs, wanted))
    for op, rows, launches in ((FORWARD_GROUP, x, forward), (BACKWARD_GROUP, dY, backward)):
        asked = query(op, rows, fs, wanted if op == BACKWARD_GROUP else [Needs()] * 2, cublas=True)
        counted = works(FUSED, asked, ARCH)
        passes = [p for launch in launches for p in traffic.traffic(launch)]
        assert sum(work.launches for work in counted) == len(launches), op
        assert sum(work.bytes for work in counted) == sum(p.bytes for p in passes), op
        assert sum(work.flops for work in counted) == sum(p.flops for p in passes), op


Counts = tuple[int, int, int]


def _both(monkeypatch: Any, call: Any) -> Counts:
    """Launches, FLOPs and bytes of kernels and of PyTorch's operations together."""
    with multiplying(NATIVE_DTYPES["as cuBLAS"]), OperationCounter(compute=False) as counter:
        launches = _launches(monkeypatch, call)
    passes = [p for launch in launches for p in traffic.traffic(launch)]
    # The words of a stream are allocated once.
    operations = [op for op in counter.operations if op.name != "aten::zeros"]
    found = [*passes, *operations]
    return (
        len(launches) + len(operations), sum(f.flops for f in found),
        sum(f.bytes for f in found),
    )  # fmt: skip


def _modelled(plan: Plan, op: str, rows: Any, fs: Any, needs: Any) -> Counts:
    asked = query(op, rows, fs, needs, cublas=True)._replace(M=rows.shape[0])
    counted = works(plan, asked, ARCH)
    return (
        sum(w.launches for w in counted), sum(w.flops for w in counted),
        sum(w.bytes for w in counted),
    )  # fmt: skip


@pytest.mark.parametrize("adapter", [BF16, FP32], ids=str)
@pytest.mark.parametrize("R", [16, 200])
@pytest.mark.parametrize("needs", [ALL, Needs(A=True, B=True), Needs(x=True)], ids=str)
def test_the_hybrid_bytes_are_those_of_launches_and_operations(monkeypatch, R, needs, adapter):
    x, dY, f = _operands(2048, 1536, 4096, R, BF16, adapter)
    saved = Saved(x.new_empty(2048, R) if needs.saves_S else None)
    forward = _both(monkeypatch, lambda: TRITON.forward(x, [f], [needs], HYBRID))
    assert forward == _modelled(HYBRID, FORWARD, x, [f], [Needs()])
    backward = _both(monkeypatch, lambda: TRITON.backward([dY], x, saved, [f], [needs], HYBRID))
    assert backward == _modelled(HYBRID, BACKWARD, dY, [f], [needs])


@pytest.mark.parametrize("adapter", [BF16, FP32], ids=str)
def test_the_hybrid_bytes_of_a_group_are_those_of_launches_and_operations(monkeypatch, adapter):
    (x, dY, q), (_, dK, k) = (_operands(2048, N, 4096, 16, BF16, adapter) for N in (1536, 512))
    fs, needs, S = [q, k], [ALL, ALL], x.new_empty(2048, 32)
    forward = _both(monkeypatch, lambda: TRITON.forward(x, fs, needs, HYBRID))
    assert forward == _modelled(HYBRID, FORWARD_GROUP, x, fs, [Needs()] * 2)
    backward = _both(monkeypatch, lambda: TRITON.backward([dY, dK], x, Saved(S), fs, needs, HYBRID))
    assert backward == _modelled(HYBRID, BACKWARD_GROUP, dY, fs, needs)


@pytest.mark.parametrize("adapter", [BF16, FP32], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_the_augmented_bytes_are_those_of_launches_and_operations(monkeypatch, layers, adapter):
    fs = []
    for N in (64, 32)[:layers]:
        A, B = torch.zeros(8, 128, dtype=adapter), torch.zeros(N, 8, dtype=adapter)
        weight = NF4Weight.from_dense(torch.randn(N, 128))
        fs.append(Factors(weight, A=A, B=B, constants=Constants(0.5)))
    x = torch.zeros(256, 128, dtype=BF16)
    op = FORWARD if layers == 1 else FORWARD_GROUP
    launches, flops, moved = _both(
        monkeypatch, lambda: TRITON.forward(x, fs, [ALL] * layers, AUGMENTED)
    )
    assert (launches, flops) == _modelled(AUGMENTED, op, x, fs, [Needs()] * layers)[:2]
    # Beside the weights themselves decoding reads tables of a few kilobytes.
    modelled = _modelled(AUGMENTED, op, x, fs, [Needs()] * layers)[2]
    assert 0 <= moved - modelled <= 3000 * layers
