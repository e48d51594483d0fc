"""NF4 weights that the GEMM decodes itself: every bit of W, the equation, launches and dispatch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from equation import Case, check, fused, make

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight
from lora_fast.functional import adapted_linear

triton = pytest.importorskip("triton")
from lora_fast.kernels import launch_policy, nf4_codes, nf4_tile, ticketed_gemm  # noqa: E402
from lora_fast.kernels.ticketed_gemm import Layer  # noqa: E402
from lora_fast.kernels.tiles import Gains, Target  # noqa: E402
from triton import language as tl  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def quantised(N, K, *, blocksize=64, nested=True, device="cpu"):
    """A weight whose packed bytes take every value at each of 16 neighbouring positions."""
    weight = NF4Weight.from_dense(
        torch.randn(N, K, device=device), blocksize=blocksize, double_quant=nested
    )
    index = torch.arange(weight.packed.numel(), device=device)
    weight.packed[:] = (index // 16 + index // 4096).to(torch.uint8)
    return weight


def through_the_gemm(weight, dtype, *, is_grad, g=None):
    """W as the kernel sees it: the product with the identity, which rounds nothing."""
    N, K = weight.shape
    identity = torch.eye(N if is_grad else K, dtype=dtype, device=weight.device)
    operand = nf4_tile.Nf4Operand(weight.packed, weight.quant_state)
    if is_grad:
        return ticketed_gemm.grad_input([Layer(identity, operand)], gains=Gains(g=g))[0]
    return ticketed_gemm.forward(identity, operand, gains=Gains(g=g))[0].T


@triton.jit
def store_decoded_tile(
    packed_ptr, absmax_ptr, code_ptr, w_ptr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    SHARING: tl.constexpr, SHUFFLES: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = 2 * BYTES // SHARING
    rows = tl.arange(0, ROWS)[:, None]
    packed = tl.load(packed_ptr + rows * BYTES + tl.arange(0, BYTES)[None, :])
    absmax = tl.load(absmax_ptr + rows * GROUPS + tl.arange(0, GROUPS)[None, :])
    codes = nf4_codes.load_codes(code_ptr, SHUFFLES)
    w = nf4_tile.decode_tile(
        packed, codes, absmax, SHARING, w_ptr.dtype.element_ty, Target("ieee", SHUFFLES=SHUFFLES)
    )
    columns = tl.arange(0, 2 * BYTES)[None, :]
    tl.store(w_ptr + rows * (2 * BYTES) + columns, w)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_tile_equals_bitsandbytes_for_every_byte_at_every_position(executor, dtype):
    ROWS, BYTES = 128, 32
    for blocksize, num_warps in ((64, 4), (32, 8)):
        weight = quantised(
            ROWS, 2 * BYTES, blocksize=blocksize, nested=False, device=executor.device
        )
        w = torch.empty(weight.shape, dtype=dtype, device=executor.device)
        state = weight.quant_state
        store_decoded_tile[(1,)](
            weight.packed, state.absmax, state.code, w, ROWS=ROWS, BYTES=BYTES, SHARING=blocksize,
            SHUFFLES=executor.arch is not None, num_warps=num_warps,
        )  # fmt: skip
        assert_same_bits(w, weight.dequantize(dtype), name=f"{dtype} {blocksize}")


@pytest.mark.parametrize("is_grad", [False, True], ids=["forward", "gradient"])
def test_the_gemm_decodes_what_bitsandbytes_decodes(executor, is_grad):
    weight = quantised(128, 64, device=executor.device)
    assert len(weight.packed[::16].unique()) == 256
    W = through_the_gemm(weight, BF16, is_grad=is_grad)
    assert_same_bits(W, weight.dequantize(BF16), name="W")


# Rows and blocks that end anywhere: 2, 8 or 32 neighbours share an absmax, blocks span several rows
# and the last one is partial.
SHAPES = [
    (40, 70, 64),
    (24, 72, 32),
    (33, 96, 64),
    (20, 136, 4096),
    (9, 192, 512),
    (3, 2, 32),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_ragged_rows_and_blocks(dtype, nested):
    for N, K, blocksize in SHAPES:
        weight = quantised(N, K, blocksize=blocksize, nested=nested)
        for is_grad in (False, True):
            W = through_the_gemm(weight, dtype, is_grad=is_grad)
            assert_same_bits(W, weight.dequantize(dtype), name=f"{N}x{K} {blocksize} {is_grad}")


@pytest.mark.parametrize("is_grad", [False, True], ids=["forward", "gradient"])
def test_ragged_rows_compiled(ptx_executor, is_grad):
    weight = quantised(40, 70, nested=not is_grad)
    dtype = FP16 if is_grad else FP32
    W = through_the_gemm(weight, dtype, is_grad=is_grad)
    assert_same_bits(W, weight.dequantize(dtype), name="W")


FEW = Case(M=5, K=72, N=88, R=20, dtype=BF16, adapter_dtype=FP32, nf4=True)
GAINS = ("x", "bias", "A", "B", "b", "d", "g")


def test_few_rows_agree_with_the_reference(executor):
    check(replace(FEW, trains=()), executor.device)


@pytest.mark.parametrize(
    "case",
    [
        replace(FEW, M=1, factors=("x", "A", "B"), quant_type="fp4"),
        replace(FEW, M=16, K=256, N=64, nf4=False, dY_layout="transposed"),
        replace(FEW, M=40, x_layout="transposed", factors=GAINS, nested=False, blocksize=128),
        replace(FEW, M=33, p=0.3, R=100, dY_layout="sliced"),
        replace(FEW, M=17, dtype=FP32, adapter_dtype=None, factors=GAINS),
        replace(FEW, M=3, factors=("x", "g"), quant_type="fp4"),
        replace(FEW, M=20, p=0.3, factors=GAINS),
        replace(FEW, M=4, K=71, N=24, dtype=FP16, adapter_dtype=None),
    ],
    ids=str,
)
@pytest.mark.interpreter
def test_few_rows_with_every_factor(case):
    with lora_fast.set_backend("triton"):
        check(case)


def test_a_gain_scales_the_decoded_tile(executor):
    """In registers, between the wait for one product and the start of the next."""
    weight = quantised(256, 64, device=executor.device)
    # Positive: a sum that starts at 0 cannot become −0.
    g = torch.rand(256, device=executor.device).to(BF16)
    W = through_the_gemm(weight, BF16, is_grad=True, g=g)
    expected = (weight.dequantize(BF16).float() * g.float()[:, None]).to(BF16)
    assert_same_bits(W, expected, name="g ⊙ W")


@pytest.mark.interpreter
def test_two_runs_give_the_same_bits():
    with lora_fast.set_backend("triton"):
        operands = make(replace(FEW, M=70))
        first, second = fused(operands), fused(operands)
    for name in first:
        assert_same_bits(first[name], second[name], name=name)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("case", "decodes"),
    [
        (replace(FEW, M=64), False),
        (replace(FEW, M=400), True),
        (replace(FEW, K=71), True),
        (replace(FEW, M=400, nf4=False), False),
    ],
    ids=["few rows", "many rows", "odd K", "dense"],
)
def test_launches(counted_launches, case, decodes):
    names = counted_launches
    with lora_fast.set_backend("triton"):
        fused(make(case))
    decode = ["nf4_decode"] * decodes
    assert names == [*decode, "ticketed_gemm", "strips", *decode, "ticketed_gemm", "strips"]


@pytest.fixture
def counted_launches():
    from machines import Executor

    with Executor("interpreter", torch.device("cpu"), None).counting_launches() as names:
        yield names


@pytest.mark.interpreter
@pytest.mark.parametrize("M", [1, 16, 64])
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("factors", [("x", "bias", "A", "B"), ("x", "bias")], ids=["LoRA", "base"])
def test_one_launch_without_gradients(counted_launches, M, nf4, factors):
    operands = make(replace(FEW, M=M, nf4=nf4, factors=factors))
    t = operands.tensors
    with lora_fast.set_backend("triton"), torch.no_grad():
        adapted_linear(t["x"], operands.weight, t["bias"], A=t.get("A"), B=t.get("B"))
    assert counted_launches == ["ticketed_gemm"]


ARCHS = [None, 80, 86, 89, 90, 100, 103, 120]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_few_rows_are_decoded_in_the_gemm_and_many_are_not(arch, dtype):
    reasons = [launch_policy.why_nf4_workspace(M, 4096, dtype, arch) for M in range(1, 4096, 31)]
    inside = [reason is None for reason in reasons]
    assert inside == sorted(inside, reverse=True), "one crossover"
    assert inside[0] and not inside[-1]
    assert "blocks of rows" in reasons[-1]
    if dtype != FP32:
        assert launch_policy.why_nf4_workspace(64, 4096, dtype, arch) is None


@pytest.mark.parametrize(("arch", "rows"), [(80, 384), (90, 384), (100, 128), (89, 768)])
def test_the_crossover_of_the_cost_model(arch, rows):
    assert launch_policy.why_nf4_workspace(rows, 4096, BF16, arch) is None
    assert launch_policy.why_nf4_workspace(rows + 1, 4096, BF16, arch) is not None


def test_rows_that_start_within_a_byte_are_decoded_first():
    assert "odd length" in launch_policy.why_nf4_workspace(1, 71, BF16, 90)


@pytest.mark.parametrize(
    ("K", "blocksize", "block_columns", "sharing"),
    [
        (4096, 64, 64, 64),
        (4096, 4096, 64, 64),
        (4096, 64, 128, 64),
        (72, 64, 64, 8),
        (70, 64, 32, 2),
    ],
)
def test_neighbours_that_share_an_absmax(K, blocksize, block_columns, sharing):
    state = SimpleNamespace(shape=(8, K), blocksize=blocksize, nested=False)
    switches = nf4_tile.Nf4Operand(torch.empty(0), state).switches(block_columns)
    assert switches["SHARING"] == sharing
    for row in range(8):
        for column in range(0, K, sharing):
            first = row * K + column
            assert first // blocksize == (first + sharing - 1) // blocksize
