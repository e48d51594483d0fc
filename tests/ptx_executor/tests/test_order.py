"""The PTX executor knows what is ordered between CTAs: release/acquire, fences, barriers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import ptx_executor
from tests.ptx_executor import GlobalRace

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from ptx_kernels import BF16, FP16, add, execute  # noqa: E402
from ptx_protocols import (  # noqa: E402
    run_all_meet,
    run_locked_sum,
    run_produced_and_consumed,
)

pytestmark = pytest.mark.compiled
ARCHS = [
    pytest.param(80, id="sm_80", marks=pytest.mark.exhaustive),
    pytest.param(90, id="sm_90"),
    pytest.param(100, id="sm_100", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(FP16, marks=pytest.mark.exhaustive)], ids=str)
def test_a_flag_between_programs(arch, dtype):
    run_produced_and_consumed(arch, dtype=dtype)
    run_produced_and_consumed(arch, dtype=dtype, release="acq_rel", acquire="acq_rel", warps=8)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "mistake",
    [
        {"release": "relaxed"},
        {"release": "acquire"},
        {"acquire": "relaxed"},
        {"acquire": "release"},
        {"barrier": False},
    ],
    ids=str,
)
def test_mistakes_with_a_flag(arch, mistake):
    with pytest.raises(GlobalRace, match=r"argument low_ptr .*stored"):
        run_produced_and_consumed(arch, **mistake)


def test_a_flag_between_batches():
    """The same when producer and consumer do not run in one batch."""
    options = {"batch_lanes": 128, "slice_blocks": 300}
    run_produced_and_consumed(80, **options)
    with pytest.raises(GlobalRace):
        run_produced_and_consumed(80, acquire="relaxed", **options)


def test_a_barrier_over_the_grid(sm):
    ptx_executor.install(sm, check_global_race=True)
    run_all_meet()
    with pytest.raises(GlobalRace):
        run_all_meet("relaxed")


def test_a_lock(sm):
    ptx_executor.install(sm, check_global_race=True)
    run_locked_sum()


@triton.jit
def _read_then_overwritten(x_ptr, y_ptr, BLOCK: tl.constexpr):
    pid, offs = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(y_ptr + pid * BLOCK + offs, tl.load(x_ptr + offs))
    if pid == 3:
        tl.store(x_ptr + offs, offs.to(tl.float32))


def test_write_after_read(sm):
    x, y = torch.randn(256), torch.zeros(1024)
    ptx_executor.install(sm, check_global_race=True)
    with pytest.raises(GlobalRace, match=r"store touches.*loaded"):
        _read_then_overwritten[(4,)](x, y, BLOCK=256)


def test_the_end_of_a_launch_orders_everything(sm):
    x, z = torch.randn(256), torch.zeros(256)
    ptx_executor.install(sm, check_global_race=True)
    for _ in range(3):
        add[(2,)](x, x, z, 256, BLOCK=128)
        add[(1,)](z, z, x, 256, BLOCK=256)


@triton.jit
def _mixed(y_ptr, count_ptr, PLAIN: tl.constexpr, BLOCK: tl.constexpr):
    pid, offs = tl.program_id(0), tl.arange(0, BLOCK)
    tl.atomic_add(count_ptr + offs, 1)
    if PLAIN and pid == 1:
        tl.store(y_ptr + offs, tl.load(count_ptr + offs))


def test_atomics_against_plain_accesses(sm):
    y, count = torch.zeros(64), torch.zeros(64)
    ptx_executor.install(sm, check_global_race=True)
    _mixed[(5,)](y, count, PLAIN=False, BLOCK=64)
    assert (count == 5).all()
    # What program 0 did is ordered before program 1's load; later programs' atomics are not.
    with pytest.raises(GlobalRace, match=r"changed atomically|loaded"):
        _mixed[(5,)](y, count, PLAIN=True, BLOCK=64)


MESSAGE = """
.version 8.3
.target sm_80
.address_size 64
.visible .entry kern(.param .u64 .ptr .global .align 1 data, .param .u64 .ptr .global .align 1 flag)
.reqntid 64
{{
.reg .pred %p<20>; .reg .b32 %r<40>; .reg .b64 %rd<20>;
ld.param.b64 %rd0, [data];
ld.param.b64 %rd1, [flag];
mov.u32 %r0, %tid.x;
mov.u32 %r9, %ctaid.x;
shl.b32 %r1, %r0, 2;
cvt.u64.u32 %rd2, %r1;
add.s64 %rd3, %rd0, %rd2;
setp.eq.u32 %p0, %r0, 0;
setp.ne.u32 %p9, %r9, 0;
@%p9 bra SPIN;
add.u32 %r2, %r0, 5;
st.global.b32 [%rd3], %r2;
mov.b32 %r3, 1;
{signal}
ret;
SPIN:
mov.b32 %r4, 0;
{wait}
setp.eq.u32 %p1, %r4, 0;
@%p1 bra SPIN;
{after}
ld.global.b32 %r5, [%rd3];
ret;
}}
"""
STORE = "bar.sync 0; @%p0 st.global.release.gpu.b32 [%rd1], %r3;"
ACQUIRE = "ld.global.acquire.gpu.b32 %r4, [%rd1];"
RELAXED = "ld.global.relaxed.gpu.b32 %r4, [%rd1];"
VOLATILE = "ld.volatile.global.b32 %r4, [%rd1];"
FENCED = "bar.sync 0; fence.acq_rel.gpu; @%p0 "
ONE_WARP_ACQUIRES = (
    "@%p0 ld.global.acquire.gpu.b32 %r4, [%rd1]; @%p0 setp.eq.u32 %p3, %r4, 0; "
    "@!%p0 mov.b32 %r4, 1; @%p0 selp.b32 %r4, 0, 1, %p3;"
)
# A read-modify-write of other lanes continues what was released before it.
CONTINUED = (
    "bar.sync 0; @%p0 atom.global.release.gpu.add.u32 %r6, [%rd1], 1; bar.sync 0; "
    "@!%p0 red.global.relaxed.gpu.add.u32 [%rd1], 1;"
)


def pass_message(signal, wait, after=""):
    """CTA 0 writes data and signals; CTA 1 waits and reads the data."""
    data, flag = np.zeros(64, np.uint32), np.zeros(1, np.uint32)
    text = MESSAGE.format(signal=signal, wait=wait, after=after)
    execute(text, {"data": data, "flag": flag}, threads=64, ctas=2, check_global_race=True)


@pytest.mark.parametrize(
    "how",
    [
        (STORE, ACQUIRE),
        (STORE.replace("gpu", "sys"), ACQUIRE.replace("gpu", "sys")),
        (FENCED + "st.global.relaxed.gpu.b32 [%rd1], %r3;", ACQUIRE),
        ("bar.sync 0; membar.gl; @%p0 st.volatile.global.b32 [%rd1], %r3;", VOLATILE, "membar.gl;"),
        (FENCED + "red.global.relaxed.gpu.add.u32 [%rd1], %r3;", RELAXED, "fence.acq_rel.gpu;"),
        (CONTINUED, ACQUIRE),
        (STORE, ONE_WARP_ACQUIRES, "bar.sync 0;"),
    ],
)
def test_a_message_is_passed(how):
    pass_message(*how)


@pytest.mark.parametrize(
    "how",
    [
        (STORE.replace("bar.sync 0;", ""), ACQUIRE),
        (STORE.replace("release", "relaxed"), ACQUIRE),
        (STORE.replace("gpu", "cta"), ACQUIRE),
        (STORE, RELAXED),
        (STORE, ACQUIRE.replace("gpu", "cta")),
        (STORE, RELAXED, "fence.acq_rel.cta;"),
        (STORE, VOLATILE),
        # The fence comes before the barrier that collects the other warp's store.
        ("fence.acq_rel.gpu; bar.sync 0; @%p0 st.global.relaxed.gpu.b32 [%rd1], %r3;", ACQUIRE),
        # A relaxed store ends what was released.
        (STORE + "bar.sync 0; @%p0 st.global.relaxed.gpu.b32 [%rd1], %r3;", ACQUIRE),
        (STORE, ONE_WARP_ACQUIRES),
        # The flag is written or polled with plain accesses.
        (FENCED + "st.global.b32 [%rd1], %r3;", ACQUIRE),
        (STORE, "ld.global.b32 %r4, [%rd1];", "fence.acq_rel.gpu;"),
    ],
)
def test_a_message_is_not_passed(how):
    with pytest.raises(GlobalRace):
        pass_message(*how)


@triton.jit
def _through_global(x_ptr, y_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + offs, tl.load(y_ptr + (BLOCK - 1) - offs))


def test_between_warps_of_a_cta_on_request(sm):
    x, y = torch.randn(128), torch.zeros(128)
    for barrier, check in ((True, "warps"), (False, True)):
        ptx_executor.install(sm, check_global_race=check)
        _through_global[(1,)](x, y, BARRIER=barrier, BLOCK=128)
    ptx_executor.install(sm, check_global_race="warps")
    with pytest.raises(GlobalRace):
        _through_global[(1,)](x, y, BARRIER=False, BLOCK=128)


@triton.jit
def _bulk_store_then_flag(x_ptr, y_ptr, out_ptr, flag_ptr, BLOCK: tl.constexpr):
    y = tl.make_tensor_descriptor(y_ptr, [BLOCK, BLOCK], [BLOCK, 1], [BLOCK, BLOCK])
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if tl.program_id(0) == 0:
        y.store([0, 0], tl.load(x_ptr + offs))
        tl.debug_barrier()
        tl.atomic_add(flag_ptr, 1, sem="release")
    else:
        while tl.atomic_add(flag_ptr, 0, sem="acquire") == 0:
            pass
        tl.store(out_ptr + offs, tl.load(y_ptr + offs))


def _wait_for_the_writes(ptx):
    return ptx.replace("cp.async.bulk.wait_group.read", "cp.async.bulk.wait_group")


@pytest.mark.pinned  # Triton 3.8 waits for the writes itself
def test_a_bulk_store_is_not_released_before_its_completion():
    triton.set_allocator(lambda size, align, stream: torch.zeros(size, dtype=torch.int8))
    x, y, out = torch.randn(32, 32), torch.zeros(32, 32), torch.zeros(32, 32)
    flag = torch.zeros(1, dtype=torch.int32)
    options = {"arch": 90, "check_global_race": True}
    with ptx_executor.installed(**options, transform=_wait_for_the_writes):
        _bulk_store_then_flag[(2,)](x, y, out, flag, BLOCK=32)
    assert torch.equal(out, x)
    y.zero_()
    flag.zero_()
    with ptx_executor.installed(**options), pytest.raises(GlobalRace):
        _bulk_store_then_flag[(2,)](x, y, out, flag, BLOCK=32)
