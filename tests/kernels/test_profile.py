"""What a profiler shows of each kernel: a name with the tile sizes, its FLOPs and its bytes."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import lora_fast.kernels
from lora_fast.kernels import (
    dropout,
    expand,
    expert_gate_backward,
    expert_gate_forward,
    expert_gate_gradients,
    expert_sums,
    gated_backward,
    gated_forward,
    gated_gradients,
    nf4_decode,
    row_norms,
    scaling,
    shrink,
    strips,
    ticketed_gemm,
    weight_update,
)
from lora_fast.kernels.dropout import Dropout
from lora_fast.kernels.expert_gate_tiles import ExpertMember, Glu
from lora_fast.kernels.gated_tiles import Member as GatedMember
from lora_fast.kernels.scaling import Shrunk
from lora_fast.kernels.ticketed_gemm import Layer
from lora_fast.kernels.tiles import Gains
from triton import knobs

import lora_fast
from bench.instruments import stub_driver, traffic

pytestmark = pytest.mark.offline

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
M, N, K, R = 256, 1024, 512, 16


@contextlib.contextmanager
def profiling(arch: int = 90) -> Iterator[tuple[stub_driver.Log, list[dict[str, Any]]]]:
    """The launches of a block, and what Triton tells a profiler of each."""
    told: list[dict[str, Any]] = []

    def enter(metadata: Any) -> None:
        shown = metadata.get()
        told.append({name: shown[name] for name in shown if name not in ("function", "stream")})

    hooks = knobs.runtime.launch_enter_hook
    hooks.add(enter)
    try:
        with stub_driver.recording(arch) as log:
            yield log, told
    finally:
        hooks.remove(enter)
    assert len(told) == len(log.launches)
    assert [one["name"] for one in told] == [launch.kernel.name for launch in log.launches]


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def once(launch: stub_driver.Launch) -> int:
    """The bytes of bench.traffic, those that several passes of a launch move counted once."""
    most: Counter[str] = Counter()
    for part in traffic.traffic(launch):
        most |= part.read | part.written
    return most.total()


def check(log: stub_driver.Log, told: list[dict[str, Any]], bits: int) -> None:
    for launch, one in zip(log.launches, told, strict=False):
        flops = sum(part.flops for part in traffic.traffic(launch))
        assert (one[f"flops{bits}"], one["bytes"]) == (flops, once(launch)), one["name"]


# As a kernel is launched: kernel[grid](…), or launch(kernel, grid, …), which plans may repeat.
LAUNCH = r"^ +(?:launch\(\s*(?=\w+, \()|(?=\w+\[.+\]\())(\w+)"


def test_every_kernel_says_what_it_is() -> None:
    launched = {}
    for path in sorted(Path(lora_fast.kernels.__file__).parent.glob("*.py")):
        for name in re.findall(LAUNCH, path.read_text(), re.MULTILINE):
            module = importlib.import_module(f"lora_fast.kernels.{path.stem}")
            launched[name] = getattr(module, name)
    assert len(launched) == 20
    for name, kernel in launched.items():
        assert kernel.launch_metadata is not None, name
        assert kernel._repr is not None, name


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_training_step(dtype: torch.dtype) -> None:
    x, W, dY = meta(M, K, dtype=dtype), meta(N, K, dtype=dtype), meta(M, N, dtype=dtype)
    A, B, S = meta(R, K, dtype=FP32), meta(N, R, dtype=FP32), meta(M, R, dtype=dtype)
    with profiling() as (log, told):
        ticketed_gemm.forward(x, W, A, B, 2.0)
        wanted = strips.Wanted(B=True)
        _, parts = strips.grad_expand(dY, B, 2.0, wanted=wanted, S=S, stores_dS=True)
        _, dS = ticketed_gemm.grad_input([Layer(dY, W, A, B, 2.0, parts)])
        strips.grad_shrink(x, dS, FP32)
    assert [one["name"] for one in told] == [
        "ticketed_gemm_forward_128x128x64_r16",
        "strips_dB_dS_64x256_r16",
        "ticketed_gemm_dX_128x128x64_r16",
        "strips_dA_64x256_r16",
    ]
    check(log, told, bits=16)
    assert told[0]["flops16"] == 2 * M * (N * K + R * K + N * R)


def test_groups_and_launches_that_compute_a_part() -> None:
    """q and k by one dX; S that is there already; dS alone; a weight without an adapter."""
    x, S = meta(M, K), meta(M, R)
    layers = [
        Layer(meta(M, n), meta(n, K), meta(R, K), meta(n, R), 2.0, meta(4, M, R, dtype=FP32))
        for n in (N, N // 2)
    ]
    with profiling() as (log, told):
        ticketed_gemm.grad_input(layers)
        ticketed_gemm.forward(x, meta(N, K), meta(R, K), meta(N, R), 2.0, S=S)
        ticketed_gemm.grad_input([layers[0]._replace(partials=None)], wants_dX=False)
        ticketed_gemm.forward(x, meta(N, K))
    check(log, told, bits=16)
    assert told[3] == {
        "name": "ticketed_gemm_forward_128x128x64",
        "flops16": 2 * M * N * K,
        "bytes": 2 * (M * K + N * K + M * N),
    }


def test_gains_biases_and_their_gradients_count() -> None:
    dY, V, vector = meta(M, N, dtype=FP32), meta(M, N, dtype=FP32), meta(N, dtype=FP32)
    wanted = strips.Wanted(g=True, bias=True)
    with profiling() as (_, told):
        gains = Gains(g=vector)
        strips.grad_expand(dY, wanted=wanted, V=V, bias=vector, gains=gains)
        ticketed_gemm.forward(dY.T, meta(K, M, dtype=FP32), bias=vector[:K], saves_V=True)
    assert [one["name"].rsplit("_", 2)[0] for one in told] == ["strips_sums", "ticketed_gemm"]
    assert told[0]["flops32"] == 0
    # dY, V and g read, dbias and dg written; the sums of as many ranges of rows.
    assert (told[0]["bytes"] - 4 * (2 * M * N + 3 * N)) % (4 * 2 * N) == 0
    assert told[1]["bytes"] == 4 * (M * N + K * M + 2 * N * K + K)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_nf4(nested: bool) -> None:
    weight = lora_fast.NF4Weight.from_dense(torch.randn(N, K), double_quant=nested)
    layer = lora_fast.kernels.nf4_tile.Nf4Operand(weight.packed, weight.quant_state)
    with profiling() as (log, told):
        nf4_decode.decode(weight.packed, weight.quant_state, BF16)
        ticketed_gemm.forward(torch.empty(16, K, dtype=BF16), layer)
    names = ["nf4_decode_128x64", "ticketed_gemm_forward_nf4_16x32x256"]
    assert [one["name"] for one in told] == names
    assert "flops16" not in told[0]
    assert [one["bytes"] for one in told] == [once(launch) for launch in log.launches]


def test_routes_of_cublas() -> None:
    x, A, B = meta(M, K), meta(R, K, dtype=FP32), meta(N, R, dtype=FP32)
    weight = lora_fast.NF4Weight.from_dense(torch.randn(N, K))
    with profiling() as (log, told):
        S = shrink.of_rows(x, [A[: R // 2], A[R // 2 :]])
        shrink.beside_rows(x, [A], saves_S=True)
        layers = [expand.Layer(B, 2.0, meta(N)), expand.Layer(B[: N // 2], 2.0)]
        expand.outputs(meta(M, 2 * R), BF16, layers)
        expand.input_gradient(Shrunk(S), BF16, [A])
        nf4_decode.augmented(weight.packed, weight.quant_state, BF16, B, columns=R)
    assert [one["name"] for one in told] == [
        "shrink_16x64_r16",
        "shrink_beside_x_16x64_r16",
        "expand_y_64x128_r16",
        "expand_dX_64x128_r16",
        "nf4_decode_augmented_8x64",
    ]
    check(log, told[:-1], bits=16)
    assert told[0]["flops16"] == 2 * M * K * R
    assert told[-1]["bytes"] == once(log.launches[-1])


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_gated_mlp(dtype: torch.dtype) -> None:
    gate, up, dh = (meta(M, N, dtype=dtype) for _ in range(3))
    A, B = meta(R, N, dtype=FP32), meta(N, R, dtype=FP32)
    members = [GatedMember(base, meta(M, R, dtype=dtype), B, 2.0) for base in (gate, up)]
    dS = scaling.new_gradient(dh, R, 64)
    with profiling() as (log, told):
        gated_forward.activate(*members, "silu", A)
        if dtype == BF16:
            wanted, outs = gated_backward.Wanted(True, True, True, True), (gate, up)
            gated_backward.gradients(*members, dh, "silu", dS, A, wanted=wanted, outs=outs)
        else:
            gated_gradients.gradients(*members, dh, "gelu", dS, A, outs=(gate, up), stores_h=True)
    backward = "backward_silu_64x32x4_r16" if dtype == BF16 else "gradients_gelu_64x64_r16"
    assert [one["name"] for one in told] == ["gated_forward_silu_64x64_r16", f"gated_{backward}"]
    check(log, told, bits=16)
    assert told[0]["flops16"] == 3 * 2 * M * N * R
    assert told[1]["flops16"] == (8 if dtype == BF16 else 3) * 2 * M * N * R


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_gate_of_experts(dtype: torch.dtype) -> None:
    E, P, L = 4, M, N // 2
    base, v, S = (meta(P, columns, dtype=dtype) for columns in (N, L, R))
    A, B = meta(E, R, L, dtype=FP32), meta(E, N, R, dtype=FP32)
    offsets, order = meta(E, dtype=torch.int32), meta(P, dtype=torch.int64)
    w, member, glu = meta(P, dtype=FP32), ExpertMember(base, S, B, None, 2.0), Glu("gelu", True)
    with profiling() as (log, told):
        expert_gate_forward.activate(member, offsets, glu, A)
        if dtype == BF16:
            wanted = expert_gate_backward.Wanted(True, True, True, True)
            found = expert_gate_backward.gradients(
                member, v, w, order, offsets, glu, S, A, wanted=wanted, out=base
            )
            expert_sums.sums(offsets, order, found.dS, found.dw, dtype=BF16, w=w)
        else:
            expert_gate_gradients.gradients(
                member, v, w, order, offsets, glu, S, A, out=base, stores_h=True, needs_w=True
            )
    backward = ["backward_gelu_interleaved_64x32x3_r16"]
    if dtype == FP16:
        backward = ["gradients_gelu_interleaved_64x32_r16"]
    names = [f"expert_gate_{name}" for name in ["forward_gelu_interleaved_64x32_r16", *backward]]
    assert [one["name"] for one in told] == [*names, *["expert_sums_dS_dw_64"] * (dtype == BF16)]
    assert told[0]["flops16"] == 3 * 2 * P * L * R
    assert told[1]["flops16"] == (8 if dtype == BF16 else 3) * 2 * P * L * R
    # u, S1 and S2, A and B; and h and the parts of S2.
    operands = 2 * P * (2 * L + 2 * R) + 4 * E * (R * L + N * R) + 4 * E
    ranges = log.launches[0].grid[0]
    assert told[0]["bytes"] == operands + 2 * P * L + 4 * ranges * P * R
    if dtype == FP16:
        # v, w, order, du and the parts of dw.
        assert told[1]["bytes"] == operands + 2 * P * 3 * L + 12 * P + 4 * ranges * P


def test_passes_over_a_weight() -> None:
    W, A, B, g = meta(N, K), meta(R, K, dtype=FP32), meta(N, R, dtype=FP32), meta(N, dtype=FP32)
    with profiling() as (_, told):
        row_norms.norms_of(W, A, B, 0.5)
        weight_update.update(W, W, A, B, Gains(g=g), 0.5)
    flops, factors = 2 * N * K * R, 4 * R * (N + K)
    assert told == [
        {"name": "row_norms_32x64_r16", "flops16": flops, "bytes": 2 * N * K + factors + 4 * N},
        {"name": "weight_update_32x128_r16", "flops32": flops}
        | {"bytes": 2 * 2 * N * K + factors + 4 * N},
    ]


def test_the_mask_of_dropout() -> None:
    with profiling() as (_, told):
        dropout.dropout_mask(M, K, Dropout(0.1), torch.device("meta"))
    assert told == [{"name": "store_keep_mask_32x64", "bytes": M * K}]


def test_nothing_is_counted_while_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "element_size", lambda tensor: pytest.fail("counted"))
    with stub_driver.recording(90) as log:
        weight_update.update(meta(N, K), meta(N, K), None, None, Gains(g=meta(N)), 1.0)
    assert len(log.launches) == 1
