"""The PTX executor reports deliberate mistakes, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import ptx_executor
from tests.ptx_executor import (
    Deadlock,
    Divergence,
    Misaligned,
    OutOfBounds,
    SharedRace,
    UninitialisedShared,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from ptx_kernels import execute  # noqa: E402

pytestmark = pytest.mark.compiled


@triton.jit
def _beyond(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + 1))


def test_out_of_bounds(sm):
    x, y = torch.zeros(256), torch.zeros(256)
    with pytest.raises(OutOfBounds, match=r"ld\.global.*of kernel _beyond") as caught:
        _beyond[(1,)](x, y, BLOCK=256)
    assert "argument x_ptr" in str(caught.value)
    assert caught.value.addr == x.data_ptr() + 1024
    assert (caught.value.cta, caught.value.thread is None) == ((0, 0, 0), False)


def test_bounds_of_a_view(sm):
    storage, y = torch.zeros(1000), torch.zeros(256)
    _beyond[(1,)](storage[:256], y, BLOCK=256)
    ptx_executor.install(sm, bounds="tensor")
    with pytest.raises(OutOfBounds):
        _beyond[(1,)](storage[:256], y, BLOCK=256)


@triton.jit
def _misaligned(x_ptr, y_ptr, start, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    claimed = tl.max_contiguous(tl.multiple_of(start + offs, 8), 8)
    tl.store(y_ptr + offs, tl.load(x_ptr + claimed))


def test_misaligned(sm):
    x, y = torch.zeros(2048), torch.zeros(1024)
    with pytest.raises(Misaligned, match=r"ld\.global\.v4\.b32"):
        _misaligned[(1,)](x, y, 3, BLOCK=1024)
    _misaligned[(1,)](x, y, 8, BLOCK=1024)


@triton.jit
def _at_an_address(addr, out_ptr):
    tl.store(out_ptr, tl.load(addr.to(tl.pointer_type(tl.int32))))


def test_memory_behind_an_integer_is_registered(sm):
    x, out = torch.full((1,), 5, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(OutOfBounds):
        _at_an_address[(1,)](x.data_ptr(), out)
    ptx_executor.register(x)
    _at_an_address[(1,)](x.data_ptr(), out)
    assert out.item() == 5


@triton.jit
def _overlapping(y_ptr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(y_ptr + pid * (BLOCK - 8) + tl.arange(0, BLOCK), pid + tl.arange(0, BLOCK))


def test_global_races_on_request(sm):
    y = torch.zeros(1024, dtype=torch.int32)
    _overlapping[(3,)](y, BLOCK=256)
    ptx_executor.install(sm, check_global_race=True)
    with pytest.raises(ptx_executor.GlobalRace):
        _overlapping[(3,)](y, BLOCK=256)


@triton.jit
def _asserting(x_ptr, n, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.device_assert(x < n, "value too large")


def test_device_assert(sm):
    x = torch.arange(128, dtype=torch.int32)
    _asserting[(1,)](x, 128, BLOCK=128, debug=True)
    with pytest.raises(ptx_executor.DeviceAssert, match="value too large") as caught:
        _asserting[(1,)](x, 100, BLOCK=128, debug=True)
    assert caught.value.thread == 100


@triton.jit
def _unknown(x_ptr):
    x = tl.inline_asm_elementwise(
        "vadd.s32.s32.s32 $0, $1, $1;",
        "=r,r", [tl.load(x_ptr)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.store(x_ptr, x)


def test_unknown_instructions_are_not_skipped(sm):
    with pytest.raises(NotImplementedError, match=r"vadd\.s32\.s32\.s32.*of kernel _unknown"):
        _unknown[(1,)](torch.zeros(1, dtype=torch.int32))


HEAD = """
.version 8.3
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kern(.param .u64 .ptr .global .align 1 src, .param .u64 .ptr .global .align 1 out)
.reqntid {threads}
{{
.reg .pred %p<20>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
ld.param.b64 %rd0, [src];
ld.param.b64 %rd1, [out];
mov.u32 %r0, %tid.x;
shl.b32 %r1, %r0, 2;
cvt.u64.u32 %rd2, %r1;
add.s64 %rd3, %rd0, %rd2;
add.s64 %rd4, %rd1, %rd2;
mov.b32 %r2, smem;
add.s32 %r3, %r2, %r1;
"""


def run(body, *, threads=64, shared=4096, src=None, **options):
    """What one CTA stores: %rd3 and %rd4 are a thread's words of src and out, %r3 of shared."""
    src = np.arange(threads, dtype=np.uint32) if src is None else src
    out = np.zeros(threads, np.uint32)
    text = HEAD.format(threads=threads) + body + "\nret;\n}\n"
    execute(text, {"src": src, "out": out}, threads=threads, shared=shared, **options)
    return out


def test_a_parameter_by_its_address():
    """What is left of a choice between two parameters."""
    out = run("""
mov.b64 %rd5, src;
mov.b64 %rd6, out;
setp.lt.u32 %p0, %r0, 32;
selp.b64 %rd7, %rd5, %rd6, %p0;
ld.param.b64 %rd8, [%rd7];
sub.s64 %rd9, %rd8, %rd1;
cvt.u32.u64 %r5, %rd9;
st.global.b32 [%rd4], %r5;
""")
    assert len({*out[:32].tolist()}) == 1 and out[0] != 0
    assert not out[32:].any()


EXCHANGE = """
ld.global.b32 %r4, [%rd3];
st.shared.b32 [%r3], %r4;
{barrier}
xor.b32 %r5, %r1, 128;
add.s32 %r5, %r5, %r2;
ld.shared.b32 %r6, [%r5];
st.global.b32 [%rd4], %r6;
"""


def test_shared_race():
    out = run(EXCHANGE.format(barrier="bar.sync 0;"))
    assert (out == np.arange(64) ^ 32).all()
    with pytest.raises(SharedRace, match="no barrier in between"):
        run(EXCHANGE.format(barrier=""))


def test_shared_write_after_read():
    body = EXCHANGE.format(barrier="bar.sync 0;") + "{} st.shared.b32 [%r3], %r0;"
    with pytest.raises(SharedRace, match="write to shared bytes"):
        run(body.format("add.s32 %r0, %r0, 7;"))
    run(body.format("add.s32 %r0, %r0, 7; bar.sync 0;"))


def test_uninitialised_shared():
    body = "ld.shared.b32 %r6, [%r3]; st.global.b32 [%rd4], %r6;"
    with pytest.raises(UninitialisedShared):
        run(body)
    assert (run(body, check_shared=False) == 0x7FDF7FDF).all()


def test_shared_out_of_bounds():
    with pytest.raises(OutOfBounds):
        run("st.shared.b32 [%r3+256], %r0;", shared=256)


COPY = """
cp.async.ca.shared.global [%r3], [%rd3], 4, {read};
cp.async.commit_group;
{wait}
{barrier}
xor.b32 %r5, %r1, {other};
add.s32 %r5, %r5, %r2;
ld.shared.b32 %r6, [%r5];
st.global.b32 [%rd4], %r6;
"""


def copy(*, read=4, wait="cp.async.wait_group 0;", barrier="bar.sync 0;", other=128, src=None):
    return run(COPY.format(read=read, wait=wait, barrier=barrier, other=other), src=src)


def test_asynchronous_copies():
    assert (copy() == np.arange(64) ^ 32).all()
    assert (copy(read=0, wait="cp.async.wait_all;", other=0) == 0).all()
    large = np.arange(64, dtype=np.uint32) + 0x01010100
    assert (copy(read=2, other=0, src=large) == (large & 0xFFFF)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wait": ""}, "in flight"),
        ({"wait": "cp.async.wait_group 1;"}, "in flight"),
        ({"barrier": ""}, "no barrier"),
    ],
)
def test_mistakes_with_asynchronous_copies(changes, message):
    with pytest.raises(SharedRace, match=message):
        copy(**changes)


def test_threads_part_and_meet():
    out = run("""
    mov.b32 %r10, 0;
    mov.b32 %r11, 0;
    and.b32 %r12, %r0, 7;
    LOOP:
    setp.ge.u32 %p0, %r11, %r12;
    @%p0 bra DONE;
    add.s32 %r10, %r10, %r11;
    add.s32 %r11, %r11, 1;
    bra LOOP;
    DONE:
    shfl.sync.bfly.b32 %r13, %r10, 1, 31, -1;
    and.b32 %r14, %r0, 1;
    setp.eq.s32 %p1, %r14, 0;
    @%p1 bra EVEN;
    add.s32 %r13, %r13, 1000;
    bra.uni END;
    EVEN:
    add.s32 %r13, %r13, 2000;
    END:
    bar.sync 0;
    st.global.b32 [%rd4], %r13;
    """)
    thread = np.arange(64)
    trips = (thread ^ 1) & 7
    assert (out == trips * (trips - 1) // 2 + np.where(thread & 1, 1000, 2000)).all()


def test_warps_reach_a_barrier_at_different_instructions():
    out = run("""
    setp.lt.u32 %p0, %r0, 32;
    @%p0 bra A;
    st.shared.b32 [%r3], %r0;
    bar.sync 0;
    bra B;
    A:
    bar.sync 0;
    ld.shared.b32 %r5, [%r3+128];
    st.global.b32 [%rd4], %r5;
    B:
    """)
    assert (out[:32] == np.arange(32, 64)).all()


def test_named_barriers():
    body = """
    setp.lt.u32 %p0, %r0, 64;
    @!%p0 bra OUT;
    st.shared.b32 [%r3], %r0;
    bar.sync 1, {count};
    xor.b32 %r5, %r1, 128;
    add.s32 %r5, %r5, %r2;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd4], %r6;
    OUT:
    """
    out = run(body.format(count=64), threads=128)
    assert (out[:64] == np.arange(64) ^ 32).all()
    with pytest.raises(Deadlock):
        run(body.format(count=96), threads=128)


def test_a_shuffle_of_a_part_of_a_warp():
    body = """
    setp.lt.u32 %p0, %r0, 16;
    @%p0 bra A;
    bra B;
    A:
    shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;
    B:
    """
    with pytest.raises(Divergence):
        run(body, threads=32)
    run(body.replace("-1;", "0xffff;"), threads=32)


def test_an_endless_loop():
    with pytest.raises(Deadlock):
        run("L: bra L;", max_blocks=10000, slice_blocks=2000)


def test_a_loop_that_waits_and_counts():
    with pytest.raises(Deadlock, match="gave up"):
        run(
            "mov.b32 %r10, 0; L: add.u32 %r10, %r10, 1; ld.volatile.global.b32 %r11, [%rd0+128]; "
            "setp.ne.u32 %p0, %r11, 77; @%p0 bra L;",
            max_blocks=20000,
            slice_blocks=3000,
        )
    # Long, but it ends.
    run(
        "mov.b32 %r10, 0; L: add.u32 %r10, %r10, 1; setp.ne.u32 %p0, %r10, 9000; @%p0 bra L;",
        slice_blocks=500,
    )


def test_shared_atomics():
    out = run("""
    mov.b32 %r4, 0;
    st.shared.b32 [%r3], %r4;
    bar.sync 0;
    and.b32 %r5, %r1, 12;
    add.s32 %r5, %r5, %r2;
    atom.shared.add.u32 %r6, [%r5], 1;
    st.global.b32 [%rd4], %r6;
    """)
    for column in range(4):
        assert sorted(out[column::4]) == list(range(16))
