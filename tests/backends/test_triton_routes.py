"""The routes that leave W to cuBLAS: launches, memory, and errors beside the fused route's."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from equation import Case, make
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
import lora_fast
from bench.instruments import stub_driver
from lora_fast import NF4Weight
from lora_fast.backends import triton_operands
from lora_fast.backends.triton_ops import TritonBackend
from lora_fast.factors import Constants, Factors, Needs, Saved
from lora_fast.tuning.plans import AUGMENTED, FUSED, HYBRID, Plan

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = TritonBackend(cublas=True)
M, K, R = 256, 512, 16
COLUMNS = (1024, 384, 320)
TRAINED = Needs(x=True, A=True, B=True)


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def layers(nf4: bool, columns: tuple[int, ...] = COLUMNS, **options: Any) -> list[Factors]:
    """Layers of one x with float32 adapters, as PEFT keeps them."""
    constants = Constants(2.0, options.pop("p", 0.0), 3)
    adapter = options.pop("adapter", FP32)
    return [
        Factors(
            NF4Weight.from_dense(torch.zeros(N, K, dtype=BF16)) if nf4 else meta(N, K),
            A=meta(R, K, dtype=adapter),
            B=meta(N, R, dtype=adapter),
            constants=constants,
            **options,
        )
        for N in columns
    ]


class Allocations(TorchDispatchMode):
    """The storages that operations make: their bytes, and the most that lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self.live, self.most = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {storage_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in before:
                self._count(tensor)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_of(tensor)
        if key in self._known:
            return
        self._known.add(key)
        count = storage.nbytes()
        self.made.append(count)
        self.live += count
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._freed, key, count)

    def _freed(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.live -= count

    def of(self, *counts: int) -> dict[int, int]:
        """How many storages of at least the smallest of these bytes were made, by their bytes."""
        large = [count for count in self.made if count >= min(counts)]
        return {count: large.count(count) for count in set(large)}


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def step(fs: list[Factors], plans: tuple[Plan, Plan], M: int = M, arch: int = 90) -> Any:
    """The launches of both passes on meta tensors, and what each allocates."""
    x, dYs = meta(M, fs[0].weight.shape[1]), [meta(M, f.weight.shape[0]) for f in fs]
    needs = [TRAINED] * len(fs)
    with stub_driver.recording(arch) as log:
        with Allocations() as forward:
            _, saved = OPS.forward(x, fs, needs, plans[0])
        ahead = len(log.launches)
        with Allocations() as backward:
            OPS.backward(dYs, x, saved, fs, needs, plans[1])
    return log.names[:ahead], log.names[ahead:], forward, backward


STRIPS = ["strips", "ticketed_gemm"]
DECODES = ["nf4_decode"] * 3


@pytest.mark.offline
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_launches_of_a_group(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shrink and one expand for all, which copy no A, and one strips; W of cuBLAS is no launch
    of ours."""
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("a launch of its own"))
    there, back, *_ = step(layers(False, p=p), (HYBRID, HYBRID))
    assert there == ["shrink", "expand"]
    assert back == [*STRIPS, "expand", "strips"]
    there, back, *_ = step(layers(True, p=p), (HYBRID, HYBRID))
    assert there == ["shrink", "expand", *DECODES]
    assert back == [*STRIPS, "expand", *DECODES, "strips"]
    there, *_ = step(layers(True, p=p), (AUGMENTED, HYBRID))
    assert there == ["shrink", *["nf4_decode_augmented"] * 3]


@pytest.mark.offline
def test_adapters_in_the_dtype_of_x_are_left_to_cublas_as_well() -> None:
    """S, the low-rank parts of y and of dX are plain products, of several layers one launch each,
    which copies no A; dropout makes all of them launches."""
    there, back, *_ = step(layers(False, adapter=BF16)[:1], (HYBRID, HYBRID))
    assert (there, back) == ([], ["strips", "ticketed_gemm", "strips"])
    there, back, *_ = step(layers(False, adapter=BF16), (HYBRID, HYBRID))
    assert (there, back) == (["shrink", "expand"], [*STRIPS, "expand", "strips"])
    there, back, *_ = step(layers(False, adapter=BF16, p=0.1), (HYBRID, HYBRID))
    assert (there, back) == (["shrink", "expand"], [*STRIPS, "expand", "strips"])


@pytest.mark.offline
def test_wide_ranks_are_left_to_cublas_whatever_the_dtype_of_their_factors() -> None:
    """VeRA: x would be read once for every 64 columns of S, and A for every 32 rows of x."""
    (f,) = layers(False, (1024,), b=meta(1024, dtype=FP32), d=meta(256, dtype=FP32))
    f = f._replace(A=meta(256, K, dtype=FP32), B=meta(1024, 256, dtype=FP32))
    need = Needs(x=True, b=True, d=True)
    with stub_driver.recording(90) as log:
        _, saved = OPS.forward(meta(M, K), [f], [need], HYBRID)
        OPS.backward([meta(M, 1024)], None, saved, [f], [need], HYBRID)
    assert log.names == ["strips", "ticketed_gemm"]


@pytest.mark.offline
@pytest.mark.parametrize("adapter", [BF16, FP32], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_nothing_of_the_size_of_x_or_y_is_made_beside_them(p: float, adapter: torch.dtype) -> None:
    """At the sizes of q, k and v of Llama-3-8B: sums over ranges of rows are small there."""
    M, K, columns = 8192, 4096, (4096, 1024, 1024)
    fs = [
        f._replace(weight=meta(N, K), A=meta(R, K, dtype=adapter))
        for f, N in zip(layers(False, columns, p=p, adapter=adapter), columns, strict=True)
    ]
    _, _, forward, backward = step(fs, (HYBRID, HYBRID), M)
    ys = [2 * M * N for N in columns]
    assert forward.of(*ys) == {ys[0]: 1, ys[1]: 2}
    assert backward.of(*ys) == {2 * M * K: 1}


@pytest.mark.offline
def test_augmented_makes_x_and_S_once_and_one_weight_at_a_time() -> None:
    e, padded = 2, K + 3 * R
    wide, ys = e * M * padded, [e * M * N for N in COLUMNS]
    weights = [e * N * padded for N in COLUMNS]
    *_, forward, _ = step(layers(True), (AUGMENTED, HYBRID))
    large = forward.of(*ys, *weights, wide)
    assert large == {count: [*ys, *weights, wide].count(count) for count in [*ys, *weights, wide]}
    assert forward.most <= wide + sum(ys) + max(weights) + e * M * 3 * R


@pytest.mark.offline
def test_a_group_decodes_one_weight_at_a_time() -> None:
    e, ys = 2, [2 * M * N for N in COLUMNS]
    *_, forward, backward = step(layers(True), (HYBRID, HYBRID))
    weights = [e * N * K for N in COLUMNS]
    assert forward.most <= sum(ys) + max(weights) + e * M * 3 * R
    # Beside dX there are S's gradients, their parts and the sums of the strips.
    assert backward.most < e * M * K + weights[0] + weights[1]


@pytest.mark.offline
def test_a_gain_is_applied_in_place_of_V_unless_V_is_saved() -> None:
    y = 2 * M * 1024
    fs = layers(True, (1024,), g=meta(1024, dtype=FP32))
    with stub_driver.recording(90):
        for plan in (HYBRID, AUGMENTED):
            for need, count in ((TRAINED, 1), (TRAINED._replace(g=True), 2)):
                with Allocations() as forward:
                    (result,), saved = OPS.forward(meta(M, K), fs, [need], plan)
                assert forward.made.count(y) == count
                assert (saved.V is None) == (count == 1)
                assert result.shape == (M, 1024)


@pytest.mark.offline
def test_saved_tensors_are_those_of_the_fused_route() -> None:
    fs = layers(True)
    with stub_driver.recording(90):
        saved = [
            OPS.forward(meta(M, K), fs, [TRAINED] * 3, plan)[1]
            for plan in (FUSED, HYBRID, AUGMENTED)
        ]
    for each in saved:
        assert [None if t is None else (t.shape, t.dtype) for t in each] == [
            ((M, 3 * R), BF16), None,
        ]  # fmt: skip
        assert each.S.untyped_storage().nbytes() == 2 * M * 3 * R


def _errors(case: Case, plans: tuple[Plan, Plan], seed: int) -> dict[str, float]:
    """Relative RMS errors of y and dX; the low rank is scaled to half of the base product's RMS."""
    torch.manual_seed(seed)
    x, dY = torch.randn(case.M, case.K), torch.randn(case.M, case.N)
    W = torch.randn(case.N, case.K)
    weight: Any = NF4Weight.from_dense(W) if case.nf4 else W.to(case.dtype)
    W = weight.dequantize(case.dtype) if case.nf4 else weight
    A = torch.randn(case.R, case.K) * case.K**-0.5
    B = torch.randn(case.N, case.R) * (case.K / case.R) ** 0.5
    x, dY, A, B = (t.to(case.dtype) for t in (x, dY, A, B))
    s = 0.5
    f = Factors(weight, A=A, B=B, constants=Constants(s))
    (y,), saved = OPS.forward(x, [f], [TRAINED], plans[0])
    dX = OPS.backward([dY], x, saved, [f], [TRAINED], plans[1])[0].x
    wide = [t.double() for t in (x, dY, W, A, B)]
    x64, dY64, W64, A64, B64 = wide
    base, low_rank = x64 @ W64.T, s * (x64 @ A64.T) @ B64.T
    assert 0.4 < _rms(low_rank) / _rms(base) < 0.6
    back, low_back = dY64 @ W64, s * (dY64 @ B64) @ A64
    return {
        "y": _rms(y.double() - base - low_rank) / _rms(base + low_rank),
        "dX": _rms(dX.double() - back - low_back) / _rms(back + low_back),
    }


def _rms(t: torch.Tensor) -> float:
    return float(t.square().mean().sqrt())


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_errors_are_hardly_larger_than_those_of_the_fused_route(dtype: torch.dtype) -> None:
    """Hybrid rounds the low-rank part once more, augmented nothing."""
    case = Case(M=160, K=128, N=192, R=16, dtype=dtype, nf4=True)
    with lora_fast.set_backend("triton"):
        fused, hybrid, augmented = (
            _errors(case, plans, seed=1)
            for plans in ((FUSED, FUSED), (HYBRID, HYBRID), (AUGMENTED, HYBRID))
        )
    assert augmented["y"] <= 1.1 * fused["y"]
    for name in ("y", "dX"):
        assert fused[name] < hybrid[name] <= 1.15 * fused[name]


@pytest.mark.interpreter
@pytest.mark.parametrize("plan", [HYBRID, AUGMENTED], ids=lambda plan: plan.name)
def test_an_empty_batch(plan: Plan) -> None:
    o = make(Case(M=0, nf4=True, dtype=BF16))
    t = o.tensors
    f = Factors(o.weight, t["bias"], t["A"], t["B"])
    with torch.no_grad():
        (y,), saved = OPS.forward(t["x"], [f], [TRAINED], plan)
    assert y.shape == (0, 88)
    assert saved.S is not None and saved.S.shape == (0, 5)
    grads = OPS.backward([y], t["x"], Saved(saved.S), [f], [TRAINED], HYBRID)[0]
    assert grads.A is not None and not grads.A.any()


@pytest.mark.interpreter
def test_a_dense_weight_is_not_augmented() -> None:
    """Its rows are the model's own: the route is hybrid, with the same bits."""
    o = make(Case(M=40, R=16, dtype=BF16))
    t = o.tensors
    f = Factors(o.weight, t["bias"], t["A"], t["B"])
    with torch.no_grad():
        ys = [OPS.forward(t["x"], [f], [TRAINED], plan)[0][0] for plan in (HYBRID, AUGMENTED)]
    assert torch.equal(*ys)


@pytest.mark.parametrize(
    "A",
    [
        [torch.zeros(33, 8).t(), torch.zeros(8, 33).bfloat16()],
        [torch.zeros(33, 1).t(), torch.zeros(8, 33)],
        [torch.zeros(8, 66)[:, ::2], torch.zeros(4, 33)],
    ],
    ids=["dtypes", "one row", "gaps"],
)
def test_one_launch_reads_every_A_with_the_strides_of_the_first(A: list[torch.Tensor]) -> None:
    fs = [Factors(torch.zeros(4, 33), A=a, B=torch.zeros(4, a.shape[0])) for a in A]
    found = triton_operands.alike_A(fs)
    assert [a.stride() for a in found] == [(33, 1)] * 2
    assert {a.dtype for a in found} == {torch.float32}
