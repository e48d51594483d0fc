"""The PTX executor's schedules: orders of start, interleavings, few resident CTAs, deadlocks."""

from __future__ import annotations

import pytest
import torch

from tests import ptx_executor
from tests.ptx_executor import Deadlock, GlobalRace

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from ptx_kernels import gemm, whole_numbers  # noqa: E402
from ptx_protocols import (  # noqa: E402
    run_all_meet,
    run_locked_sum,
    run_produced_and_consumed,
)

pytestmark = pytest.mark.compiled
RANDOM = [f"random:{seed}" for seed in range(1, 4)]
SCHEDULES = ["lockstep", "sequential", "reverse", *RANDOM]
USUAL = [
    pytest.param(name, marks=[] if name in ("reverse", RANDOM[0]) else [pytest.mark.exhaustive])
    for name in SCHEDULES
]
RESIDENT = [1, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (None, 2, 3))]
ARCHS = [
    pytest.param(80, id="sm_80"),
    pytest.param(90, id="sm_90", marks=pytest.mark.exhaustive),
    pytest.param(100, id="sm_100", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("resident", RESIDENT)
@pytest.mark.parametrize("schedule", USUAL)
def test_work_by_ticket_never_deadlocks(schedule, resident, arch):
    run_produced_and_consumed(arch, schedule=schedule, resident=resident)


@pytest.mark.parametrize("arch", ARCHS)
def test_work_by_program_id_deadlocks(arch):
    by_id = {"arch": arch, "ticket": False}
    run_produced_and_consumed(**by_id, schedule="sequential", resident=1)
    run_produced_and_consumed(**by_id, schedule="reverse")
    for resident in (1, 3):
        with pytest.raises(Deadlock, match="cannot start"):
            run_produced_and_consumed(**by_id, schedule="reverse", resident=resident)


@pytest.mark.exhaustive
def test_random_schedules_find_it_too():
    def deadlocks(seed):
        try:
            run_produced_and_consumed(80, ticket=False, schedule=f"random:{seed}", resident=1)
        except Deadlock:
            return True
        return False

    assert any(deadlocks(seed) for seed in range(8))


@pytest.mark.parametrize("schedule", USUAL)
def test_mistakes_are_found_under_every_schedule(schedule):
    with pytest.raises(GlobalRace):
        run_produced_and_consumed(80, release="relaxed", schedule=schedule)


@pytest.mark.parametrize("schedule", USUAL)
def test_a_barrier_over_the_grid_needs_all_resident(sm, schedule):
    for resident in (None, 4):
        ptx_executor.install(sm, check_global_race=True, schedule=schedule, resident=resident)
        run_all_meet()
    ptx_executor.install(sm, check_global_race=True, schedule=schedule, resident=3)
    with pytest.raises(Deadlock):
        run_all_meet()


@pytest.mark.parametrize("schedule", USUAL)
def test_a_lock(sm, schedule):
    for resident in (None, 2):
        ptx_executor.install(sm, check_global_race=True, schedule=schedule, resident=resident)
        run_locked_sum()


@triton.jit
def _arrivals(count_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(count_ptr, 1))


def test_order_of_start(sm):
    def order(schedule, **options):
        ptx_executor.install(sm, schedule=schedule, **options)
        count, out = torch.zeros(1, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
        _arrivals[(20,)](count, out)
        return out.tolist()

    up = list(range(20))
    assert order("lockstep") == order("sequential") == up
    assert order("reverse") == up[::-1]
    first, second = order("random:5"), order("random:6")
    assert sorted(first) == up and first == order("random:5")
    assert first != second and first != up
    assert sorted(order("lockstep", resident=3)) == up


@pytest.mark.parametrize("schedule", USUAL)
def test_a_product(sm, schedule):
    M, N, K = 100, 150, 72
    x, w = whole_numbers(M, K), whole_numbers(K, N)
    blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    for resident in (None, 2):
        ptx_executor.install(sm, schedule=schedule, resident=resident)
        y = torch.zeros(M, N)
        gemm[(2, 3)](x, w, y, M, N, K, PRECISION="tf32", **blocks)
        assert torch.equal(y, x.float() @ w.float())


@triton.jit
def _waits_for_ever(flag_ptr, x_ptr):
    while tl.atomic_add(flag_ptr, 0) == 0:
        pass
    tl.store(x_ptr, 1.0)


@pytest.mark.parametrize("schedule", USUAL)
def test_waiting_for_ever_is_noticed(sm, schedule):
    ptx_executor.install(sm, schedule=schedule)
    with pytest.raises(Deadlock, match="no thread makes progress"):
        _waits_for_ever[(5,)](torch.zeros(1, dtype=torch.int32), torch.zeros(1))


@triton.jit
def _waits_for_a_later_one(flag_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Program 0 waits for the last."""
    pid = tl.program_id(0)
    if pid == 0:
        while tl.atomic_add(flag_ptr, 0) == 0:
            pass
    if pid == n - 1:
        tl.atomic_xchg(flag_ptr, 1)
    tl.store(out_ptr + pid * BLOCK + tl.arange(0, BLOCK), pid)


def test_waiting_for_a_later_program(sm):
    ptx_executor.install(sm, batch_lanes=256, slice_blocks=500, max_live=2)
    n = 12
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(n, 128, dtype=torch.int32)
    _waits_for_a_later_one[(n,)](flag, out, n, BLOCK=128)
    assert torch.equal(out[:, 0], torch.arange(n, dtype=torch.int32))
