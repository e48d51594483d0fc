"""The PTX executor runs kernels of every kind as torch computes them, and counts what they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.instruments.accuracy import assert_accurate, assert_same_bits
from tests import ptx_executor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from ptx_kernels import BF16, FP16, FP32, add, execute, softmax, whole_numbers  # noqa: E402

pytestmark = pytest.mark.compiled
DTYPES = [FP32, FP16, pytest.param(BF16, marks=pytest.mark.exhaustive)]


def test_counts_of_a_sum(sm):
    n = 1003
    x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
    add[(triton.cdiv(n, 256),)](x, y, out, n, BLOCK=256)
    assert_same_bits(out, x + y, name="sum")
    report = ptx_executor.report()
    assert report["launches"] == len(ptx_executor.launches()) == 1
    assert report["global_read"] == report["global_read_unique"] == 2 * 4 * n
    assert report["global_written_unique"] == 4 * n
    launch = report["details"][0]
    assert (launch["kernel"], launch["arch"], launch["grid"]) == ("add", sm, (4, 1, 1))
    assert launch["instructions"]["st.global"] >= 4 * 4  # at least one for each warp
    ptx_executor.reset()
    assert ptx_executor.report()["launches"] == 0


def test_nothing_is_left_behind():
    from triton.runtime.driver import driver

    before = driver._active
    with ptx_executor.installed(90) as executor:
        assert driver.active.arch == 90
        executor.install(80)
        assert driver.active.arch == 80
    assert driver._active is before
    with pytest.raises(RuntimeError, match="not installed"):
        ptx_executor.report()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("schedule", "random", "`schedule` must be"),
        ("schedule", "fifo", "`schedule` must be"),
        ("resident", 0, "`resident` must be"),
        ("bounds", "row", "`bounds` must be"),
        ("autotune", "all", "`autotune` must be"),
    ],
)
def test_bad_options(option, value, message):
    with pytest.raises(ValueError, match=message):
        ptx_executor.install(80, **{option: value})
    with pytest.raises(NotImplementedError, match="`arch` must be"):
        ptx_executor.install(120)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(sm, dtype):
    x, out = torch.randn(9, 777).to(dtype), torch.empty(9, 777)
    softmax[(9,)](x, out, 777, BLOCK=1024)
    assert_accurate(out, x.double().softmax(1), x.float().softmax(1), name="softmax")


@triton.jit
def _sums(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.atomic_add(out_ptr, tl.sum(x, 0))
    tl.atomic_add(out_ptr + 1 + offs % 7, x, mask=offs < n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_atomic_sums(sm, dtype):
    n = 1500
    x, out = whole_numbers(n, dtype=dtype, most=1), torch.zeros(8, dtype=dtype)
    _sums[(triton.cdiv(n, 256),)](x, out, n, BLOCK=256)
    expected = torch.zeros(8)
    expected[0] = x.float().sum()
    expected.index_add_(0, 1 + torch.arange(n) % 7, x.float())
    assert_same_bits(out, expected.to(dtype), name="sums")
    assert ptx_executor.report()["global_atomic"] > 0


@triton.jit
def _atomic(x_ptr, out_ptr, old_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    place = out_ptr + offs % 5
    if OP == "add":
        old = tl.atomic_add(place, x, mask=mask)
    elif OP == "max":
        old = tl.atomic_max(place, x, mask=mask)
    elif OP == "min":
        old = tl.atomic_min(place, x, mask=mask)
    elif OP == "and":
        old = tl.atomic_and(place, x, mask=mask)
    elif OP == "or":
        old = tl.atomic_or(place, x, mask=mask)
    else:
        old = tl.atomic_xor(place, x, mask=mask)
    tl.store(old_ptr + offs, old, mask=mask)


OPERATIONS = {
    "add": lambda a, b: a + b,
    "max": max,
    "min": min,
    "and": lambda a, b: int(a) & int(b),
    "or": lambda a, b: int(a) | int(b),
    "xor": lambda a, b: int(a) ^ int(b),
}


def _atomic_cases():
    for dtype in (torch.int32, torch.int64, FP32, torch.uint32):
        for op in OPERATIONS:
            if dtype != FP32 or op in ("add", "max", "min"):
                rest = (dtype, op) not in ((torch.int32, "xor"), (FP32, "max"))
                marks = [pytest.mark.exhaustive] if rest else []
                yield pytest.param(dtype, op, id=f"{dtype}-{op}", marks=marks)


@pytest.mark.parametrize(("dtype", "op"), [*_atomic_cases()])
def test_atomics(sm, dtype, op):
    n = 300
    x = torch.randint(0 if dtype == torch.uint32 else -1000, 1000, (n,)).to(dtype)
    out, old = torch.full((5,), 77).to(dtype), torch.zeros(n).to(dtype)
    _atomic[(3,)](x, out, old, n, op, BLOCK=128)
    expected = [77] * 5
    for i, value in enumerate(x.tolist()):
        expected[i % 5] = OPERATIONS[op](expected[i % 5], value)
    assert out.tolist() == expected


@triton.jit
def _scans(x_ptr, sums_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-1000.0)
    tl.store(sums_ptr + row * n + offs, tl.cumsum(x, 0), mask=offs < n)
    tl.store(out_ptr + 3 * row, tl.argmax(x, 0))
    tl.store(out_ptr + 3 * row + 1, tl.sum(x.to(tl.int32), 0))
    tl.store(out_ptr + 3 * row + 2, tl.max(x.to(tl.int32), 0))


def test_scans_and_reductions(sm):
    n = 1024
    x = whole_numbers(5, n, dtype=FP32, most=50)
    sums, out = torch.empty(5, n), torch.empty(5, 3, dtype=torch.int32)
    _scans[(5,)](x, sums, out, n, BLOCK=1024)
    assert_same_bits(sums, x.cumsum(1), name="sums")
    for row, found in zip(x, out.tolist(), strict=True):
        most = row.max()
        assert found == [int((row == most).nonzero()[0]), int(row.sum()), int(most)]


@triton.jit
def _look_up(codes_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Look 3-bit codes up in a table of 8 bytes with prmt, four at a time."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + offs, mask=offs < n, other=0)
    values = tl.inline_asm_elementwise(
        """
        {
        .reg .b32 sel, t<2>;
        and.b32 sel, $1, 0x07070707;
        shr.u32 t0, sel, 4;
        or.b32 t0, t0, sel;
        and.b32 t1, t0, 0x000000ff;
        shr.u32 t0, t0, 8;
        and.b32 t0, t0, 0x0000ff00;
        or.b32 t1, t1, t0;
        prmt.b32 $0, 0x40302010, 0x80706050, t1;
        }
        """,
        "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
    )  # fmt: skip
    tl.store(out_ptr + offs, values, mask=offs < n)


def test_inline_assembly(sm):
    n = 1000
    codes, out = torch.randint(0, 8, (n,), dtype=torch.int8), torch.empty(n, dtype=torch.int8)
    _look_up[(triton.cdiv(n, 512),)](codes, out, n, BLOCK=512)
    table = torch.tensor([0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80 - 256]).to(torch.int8)
    assert torch.equal(out, table[codes.long()])
    assert ptx_executor.report()["instructions"]["prmt"] > 0


@triton.jit
def _packed(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs, mask=offs < n), tl.load(y_ptr + offs, mask=offs < n)
    out = tl.inline_asm_elementwise(
        "{ .reg .b32 t; mul.bf16x2 t, $1, $2; fma.rn.bf16x2 $0, t, $1, $2; }",
        "=r,r,r", [x, y], dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip
    tl.store(out_ptr + offs, out, mask=offs < n)


def test_pairs_of_bfloat16_round_once():
    x, y = torch.randn(300).to(BF16), torch.randn(300).to(BF16)
    out = torch.empty_like(x)
    with ptx_executor.installed(90):
        _packed[(3,)](x, y, out, 300, BLOCK=128)
    product = (x.float() * y.float()).to(BF16)
    expected = (product.double() * x.double() + y.double()).float().to(BF16)
    assert_same_bits(out, expected, name="fma")


@triton.jit
def _in_turn(x_ptr, out_ptr, lock_ptr, n, BLOCK: tl.constexpr):
    """Programs take turns in the order of their numbers through a spin lock."""
    pid, offs = tl.program_id(0), tl.arange(0, BLOCK)
    while tl.atomic_cas(lock_ptr, pid, pid) != pid:
        pass
    x = tl.load(out_ptr + offs)
    tl.store(out_ptr + offs, x * 2 + tl.load(x_ptr + pid * BLOCK + offs))
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, pid + 1)


def test_spin_lock(sm):
    n, block = 12, 128
    x = whole_numbers(n, block, dtype=FP32)
    out, lock = torch.zeros(block), torch.zeros(1, dtype=torch.int32)
    _in_turn[(n,)](x, out, lock, n, BLOCK=block)
    expected = torch.zeros(block)
    for row in x:
        expected = expected * 2 + row
    assert torch.equal(out, expected) and lock.item() == n


@triton.jit
def _loops(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Trip counts differ between programs, and one returns early."""
    pid = tl.program_id(0)
    if pid == 3:
        return
    total = tl.zeros((BLOCK,), tl.int32)
    for j in range(tl.load(x_ptr + pid)):
        total += j * tl.arange(0, BLOCK)
    tl.store(out_ptr + pid * BLOCK + tl.arange(0, BLOCK), total + tl.sum(total, 0))


def test_programs_that_part(sm):
    x, out = torch.randint(0, 9, (12,), dtype=torch.int32), torch.full((12, 64), -1)
    _loops[(12,)](x, out, BLOCK=64)
    for pid, trips in enumerate(x.tolist()):
        total = trips * (trips - 1) // 2 * torch.arange(64)
        expected = total + total.sum() if pid != 3 else torch.full((64,), -1)
        assert torch.equal(out[pid], expected)


@triton.jit
def _hinted(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, eviction_policy="evict_last")
    y = tl.load(y_ptr + offs, mask=offs < n, volatile=True)
    y += tl.load(y_ptr + offs, mask=offs < n, cache_modifier=".cg") * 0
    y += tl.load(y_ptr + offs, mask=offs < n, eviction_policy="evict_first") * 0
    tl.store(out_ptr + offs, x + y, mask=offs < n, cache_modifier=".cs")


def test_cache_hints(sm):
    x, y, out = torch.randn(700), torch.randn(700), torch.empty(700)
    _hinted[(3,)](x, y, out, 700, BLOCK=256)
    assert torch.equal(out, x + y)


@triton.autotune(
    configs=[triton.Config({"BLOCK": b}, num_warps=w) for b, w in ((128, 4), (256, 2))],
    key=["n"],
)
@triton.jit
def _tuned(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs, mask=offs < n), tl.load(y_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x + y, mask=offs < n)


@pytest.mark.parametrize(("mode", "launches"), [("first", 1), ("run", 3)])
def test_autotuning(mode, launches):
    x, y, out = torch.randn(500), torch.randn(500), torch.zeros(500)
    with ptx_executor.installed(80, autotune=mode):
        _tuned.cache.clear()
        _tuned[lambda meta: (triton.cdiv(500, meta["BLOCK"]),)](x, y, out, 500)
        assert ptx_executor.report()["launches"] == launches
    assert torch.equal(out, x + y)


@triton.jit
def _printing(x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.device_print("value", tl.load(x_ptr + offs), offs)


def test_device_print(sm, capsys):
    _printing[(1,)](torch.arange(32).float() / 4, BLOCK=32, num_warps=1)
    printed = capsys.readouterr().out
    assert "value" in printed and "7.75" in printed
    ptx_executor.install(sm, ignore_printf=True)
    _printing[(1,)](torch.arange(32).float() / 4, BLOCK=32, num_warps=1)
    assert capsys.readouterr().out == ""


def test_ptx_by_hand_is_counted():
    out = np.zeros(64, np.uint32)
    counts = execute(
        """
        .version 8.3
        .target sm_80
        .address_size 64
        .visible .entry kern(.param .u64 .ptr .global .align 1 out)
        .reqntid 64
        {
        .reg .b32 %r<4>; .reg .b64 %rd<4>;
        ld.param.b64 %rd0, [out];
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %rd1, %r0, 4;
        add.s64 %rd1, %rd0, %rd1;
        st.global.b32 [%rd1], %r0;
        ret;
        }
        """,
        {"out": out},
        threads=64,
    )
    assert (out == np.arange(64)).all()
    assert counts["instructions"]["st.global"] == 2  # warps
    assert counts["global_written"] == counts["regions"]["out"]["written"] == 256
