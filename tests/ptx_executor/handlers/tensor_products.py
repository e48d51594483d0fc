"""tcgen05.mma and commit: products of the tensor core of sm_100, in order within a CTA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import OutOfBounds, PTXError, SharedRace, UninitialisedShared, Unsupported
from ..memory.clocks import Clock, join
from ..memory.layout import PENDING, SHARED_BASE
from ..memory.tensor_memory import (
    CELLS,
    COLUMNS,
    Product,
    check_allocated,
    known,
    race,
    tensor_memory_of,
)
from ..numbers.float_formats import F32, to_f16
from ..numbers.integers import U32
from .addressing import addresser
from .matrix_operands import ELEMENT_SIZE, decode, swizzle, tile_offsets

_TYPES = {"f16": {0: "f16", 1: "bf16"}, "tf32": {2: "tf32"}, "f8f6f4": {0: "e4m3", 1: "e5m2"}}
_PATTERNS = {0: 16, 2: 128, 4: 64, 6: 32}  # bytes of the swizzle


@dataclass(frozen=True)
class _Form:
    """The fields of an instruction descriptor."""

    M: int
    N: int
    a_type: str
    b_type: str
    sign: int
    transposes_a: bool
    transposes_b: bool
    is_half: bool  # float16 accumulators, in the low halves of the cells

    @property
    def K(self) -> int:
        return 32 // ELEMENT_SIZE[self.a_type]

    @property
    def lanes(self) -> np.ndarray:
        """The lane of tensor memory that holds each row of the accumulator."""
        rows = np.arange(self.M)
        return rows if self.M == 128 else rows // 16 * 32 + rows % 16


@dataclass(frozen=True)
class Commit:
    """A tcgen05.commit that has not arrived: the products it waits for, what its thread knew."""

    products: list[Product]
    clock: np.ndarray | None
    far: Clock | None


def _form(descriptor, kind, ins):
    def bits(low, count):
        return descriptor >> low & ((1 << count) - 1)

    a_type, b_type = _TYPES[kind].get(bits(7, 3)), _TYPES[kind].get(bits(10, 3))
    is_half = bits(4, 2) == 0
    refused = {
        "sparse": bits(0, 3),
        "reserved bits": bits(3, 1) or bits(6, 1) or bits(23, 1) or bits(29, 1),
        "accumulator type": bits(4, 2) > 1 or (is_half and kind == "tf32"),
        "operand type": a_type is None or b_type is None,
        "shift": bits(30, 2),
    }
    for why, refuse in refused.items():
        if refuse:
            text = f"instruction descriptor {descriptor:#x} ({why}) in `{ins.text}`"
            raise NotImplementedError(text)
    N, M = bits(17, 6) * 8, bits(24, 5) * 16
    if M not in (64, 128) or not 8 <= N <= 256 or N % (8 if M == 64 else 16):
        raise PTXError(f"tcgen05.mma of shape {M} x {N}")
    if ELEMENT_SIZE[a_type] != ELEMENT_SIZE[b_type]:
        raise NotImplementedError(f"operands of different size in `{ins.text}`")
    sign = -1 if bits(13, 1) ^ bits(14, 1) else 1
    return _Form(M, N, a_type, b_type, sign, bool(bits(15, 1)), bool(bits(16, 1)), is_half)


def mma(em, ins):
    """D = A · B (+ D), of one CTA; A in shared or tensor memory, B in shared memory."""
    mods = set(ins.mods[1:])
    kind = next((mod[6:] for mod in mods if mod.startswith("kind::")), "")
    if kind not in _TYPES or mods != {"cta_group::1", f"kind::{kind}"}:
        raise Unsupported(ins.full)
    if len(ins.args) != 5:
        raise Unsupported(ins.full + " with an output mask or a scale")
    d, a, b, descriptor, adds = ins.args
    a_in_tensor_memory = a[0] == "m"
    sources = [
        _source(em, op, is_address)
        for op, is_address in (
            (d, True),
            (a, a_in_tensor_memory),
            (b, False),
            (descriptor, False),
            (adds, False),
        )
    ]

    def run(batch, r, q):
        lanes = np.arange(batch.lanes) if q is None else np.flatnonzero(q)
        values = [source(batch, r, lanes) for source in sources]
        # Lanes of several CTAs usually issue the same product; one CTA's products go in order.
        alike: dict[tuple[int, ...], list[int]] = {}
        issued: dict[int, int] = {}
        for k, lane in enumerate(map(int, lanes)):
            turn = issued[lane // batch.threads] = issued.get(lane // batch.threads, -1) + 1
            alike.setdefault((turn, *(int(value[k]) for value in values)), []).append(lane)
        for (_, d, a, b, descriptor, adds), issuing in alike.items():
            form = _form(descriptor & 0xFFFFFFFF, kind, ins)
            _Issue(batch, ins, form, np.array(issuing)).run(d, a, b, adds, a_in_tensor_memory)

    return run


def _source(em, op, is_address):
    """Function (batch, r, lanes) → the operand in these lanes."""
    if is_address:
        address = addresser(em, op, wide=False)
        return lambda batch, r, lanes: address(batch, r)[lanes]
    if op[0] == "i":
        return lambda batch, r, lanes: np.full(lanes.size, op[1], np.int64)
    if op[0] == "!":
        return lambda batch, r, lanes: ~r[op[1]][lanes]
    return lambda batch, r, lanes: r[op[1]][lanes]


class _Issue:
    """One product, issued by a lane of each of some CTAs."""

    def __init__(self, batch: Any, ins: Any, form: _Form, lanes: np.ndarray) -> None:
        self.batch, self.ins, self.form, self.lanes = batch, ins, form, lanes
        self.t = tensor_memory_of(batch)
        self.cta = lanes // batch.threads
        self.warps = lanes // 32  # of the batch

    def run(self, d: int, a: int, b: int, adds: int, a_in_tensor_memory: bool) -> None:
        batch, form, t = self.batch, self.form, self.t
        if d >> 16 not in ((0,) if form.M == 128 else (0, 16)):
            message = f"tcgen05.mma with accumulator at lane {d >> 16}"
            raise PTXError(message, *batch.who(int(self.lanes[0])))
        accumulator = self._cells(d, form.N)
        self._check(accumulator, write=True)
        operand, read = None, []
        if a_in_tensor_memory:
            if a >> 16 != d >> 16 or form.transposes_a:
                raise NotImplementedError(
                    "operand A at other lanes than the accumulator, or transposed, "
                    f"in `{self.ins.text}`"
                )
            operand = self._cells(a, 8)
            self._check(operand, write=False)
            left = decode(t.value[operand], form.a_type)
        else:
            left, idx = self._in_shared(a, form.M, form.a_type, form.transposes_a, "A")
            read.append(idx)
        right, idx = self._in_shared(b, form.N, form.b_type, form.transposes_b, "B")
        read.append(idx)
        self._write(accumulator, form.sign * np.matmul(left, right.swapaxes(1, 2)), adds)
        if operand is not None:
            t.read_at[operand] = PENDING
            t.read_by[operand] = t.agent
        count = self.lanes.size
        batch.count_mma("tcgen05", count, 2 * form.M * form.N * form.K * count)
        self._remember(accumulator, operand, read)

    def _cells(self, addr, columns):
        """Flat cells (CTAs, rows, columns) of a matrix in tensor memory."""
        across = np.arange(addr & 0xFFFF, (addr & 0xFFFF) + columns)
        shape = (self.cta.size, columns)
        check_allocated(self.batch, self.cta, np.broadcast_to(across, shape), self.lanes)
        down = self.form.lanes + (addr >> 16)
        return self.cta[:, None, None] * CELLS + down[None, :, None] * COLUMNS + across

    def _check(self, cells, *, write):
        """Its accesses to tensor memory; earlier products come first for the accumulator."""
        batch, t = self.batch, self.t
        if not t.check:
            return
        unfinished = t.product[cells] != 0
        if not write and unfinished.any():
            act, by = "tcgen05.mma reads as operand A", np.broadcast_to(t.agent, cells.shape)
            race(batch, cells, unfinished, self.warps, act, by, ("", ""), "writes")
        by = t.written_by[cells]
        late = (t.written_at[cells] > known(batch, self.warps, by)) & ~unfinished
        if write:
            late &= by != t.agent
        if late.any():
            act = f"tcgen05.mma {'writes' if write else 'reads'}"
            race(batch, cells, late, self.warps, act, by, ("a tcgen05.st", "wrote"), "writes")
        if write:
            by = t.read_by[cells]
            late = (t.read_at[cells] > known(batch, self.warps, by)) & (by != t.agent)
            if late.any():
                move = ("a tcgen05.ld", "read")
                race(batch, cells, late, self.warps, "tcgen05.mma writes", by, move, "reads")

    def _in_shared(self, d, rows, type_, is_mn_major, which):
        """Operand matrices (CTAs, rows, K) as float64, and the bytes read."""
        if d >> 46 & 7 != 1 or d >> 53 & 0xFF or d >> 52 & 1 or d >> 49 & 7:
            raise NotImplementedError(f"matrix descriptor {d:#x} in `{self.ins.text}`")
        if d >> 61 not in _PATTERNS:
            mode = f"swizzle mode {d >> 61}"
            raise NotImplementedError(f"matrix descriptor {d:#x} ({mode}) in `{self.ins.text}`")
        start, leading, stride = (((d >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
        pattern = _PATTERNS[d >> 61]
        offsets = tile_offsets(rows, is_mn_major, ELEMENT_SIZE[type_], pattern, leading, stride)
        addr = swizzle(start + offsets, pattern)
        shared = self.batch.shared
        if addr.min() < SHARED_BASE or addr.max() + 16 > SHARED_BASE + shared.size:
            message = f"tcgen05.mma operand {which} lies outside shared memory"
            cta = self.batch.ctas[int(self.cta[0])]
            raise OutOfBounds(message, cta, None, int(addr.max()))
        idx = (addr - SHARED_BASE)[None] + (self.cta * shared.stride)[:, None, None]
        if shared.check:
            self._check_read(idx, which)
        words = shared.views[16][idx >> 4].view(U32)
        shared.nread += 16 * idx.size
        matrices = decode(words.reshape(self.cta.size, idx.shape[1], -1), type_)
        return (matrices.swapaxes(1, 2) if is_mn_major else matrices), idx

    def _check_read(self, idx, which):
        """Shared bytes read by a product must be ordered before its issue."""
        batch, shared = self.batch, self.batch.shared
        g = shared.granules_of(idx.reshape(-1), 16)
        each = g.shape[0] // self.cta.size
        cta = np.repeat(self.cta, each)[:, None]
        warp = np.repeat(batch.lane_warp[self.lanes], each)[:, None]
        at = shared.written_at[g]
        late, never = at > shared.seen[cta, warp, shared.written_by[g]], at == 0
        if late.any() or never.any():
            k, j = np.argwhere(late if late.any() else never)[0]
            granule = int(g[k, j])
            where = (
                batch.ctas[int(cta[k, 0])],
                int(warp[k, 0]) * 32,
                shared.address_of(granule),
            )
            operand = f"tcgen05.mma operand {which}"
            if late.any():
                why = shared.unread(granule)
                raise SharedRace(f"{operand} reads shared bytes {why}", *where)
            text = f"{operand} has shared bytes that were never written"
            raise UninitialisedShared(text, *where)
        fenced, where = shared.fences.fenced, batch.who(int(self.lanes[0]))
        shared.check_fenced(batch, self.ins, g, lambda by: fenced[cta, warp, by], *where)
        shared.read_at[self.t.agent * shared.granules + g] = PENDING

    def _write(self, cells, product, adds):
        t = self.t
        if self.form.is_half:
            before = np.ascontiguousarray(t.value[cells].astype(np.uint16)).view(np.float16)
            t.value[cells] = to_f16(before + product if adds else product).view(np.uint16)
        else:
            total = t.value[cells].view(F32) + product if adds else product
            t.value[cells] = total.astype(F32).view(U32)
        t.written_by[cells] = t.agent

    def _remember(self, accumulator, operand, read):
        t = self.t
        for i, lane in enumerate(map(int, self.lanes)):
            t.issued += 1
            product = Product(
                number=t.issued,
                lane=lane,
                cta=int(self.cta[i]),
                accumulator=accumulator[i].reshape(-1),
                operand=None if operand is None else operand[i].reshape(-1),
                shared=[idx[i].reshape(-1) for idx in read],
            )
            t.product[product.accumulator] = product.number
            t.products.append(product)


def commit(em, ins):
    """Let an mbarrier follow what this thread has issued."""
    if ins.has("cta_group::2", "multicast::cluster") or "mbarrier::arrive::one" not in ins.mods:
        raise Unsupported(ins.full)
    address = addresser(em, ins.args[0], wide=False)

    def run(batch, r, q):
        lanes = np.arange(batch.lanes) if q is None else np.flatnonzero(q)
        if lanes.size == 0:
            return
        t, shared = tensor_memory_of(batch), batch.shared
        places = shared.index(batch, address(batch, r)[lanes], 8, lanes, "mbarrier")
        for place, lane in zip(map(int, places), map(int, lanes), strict=True):
            clock = far = None
            if shared.clocks:
                clock = shared.known_to(*divmod(lane // 32, batch.warps))
                far = shared.far.get(lane // 32)
                shared.now += 1
            mine = [product for product in t.products if product.lane == lane]
            batch.mbarrier(place, lane).commits.append(Commit(mine, clock, far))

    return run


def arrivals(batch: Any, barrier: Any) -> Iterator[None]:
    """Let commits arrive, the oldest first, until the barrier's phase is complete."""
    t, shared = batch.tensor, batch.shared
    phase = barrier.phase
    while barrier.commits and barrier.phase == phase:
        commit = barrier.commits.pop(0)
        done = {product.number for product in commit.products}
        _finish(batch, [product for product in t.products if product.number in done])
        barrier.arrive(1)
        if shared.clocks:
            barrier.clock = np.maximum(barrier.clock, commit.clock)
            barrier.clock[t.agent] = shared.now
            barrier.far = join(barrier.far, commit.far)
            shared.now += 1
        yield


def abandon(batch: Any, commits: list[Commit], place: int) -> None:
    """A barrier is invalidated before these arrive: its bytes must stay as they are until then."""
    idx = np.array([place // 16 * 16])
    for commit in commits:
        for product in commit.products:
            if product in batch.tensor.products:
                product.shared.append(idx)
                _mark_read(batch, idx, PENDING)


def _mark_read(batch, idx, time):
    shared = batch.shared
    if shared.check:
        granules = shared.granules_of(idx, 16)
        shared.read_at[batch.tensor.agent * shared.granules + granules] = time


def _finish(batch, products):
    """These are complete: their cells are visible, what they read is free again."""
    if not products:
        return
    t, now = batch.tensor, batch.shared.now
    numbers = {product.number for product in products}
    t.products = [product for product in t.products if product.number not in numbers]
    for product in products:
        mine = product.accumulator[t.product[product.accumulator] == product.number]
        t.product[mine] = 0
        t.written_at[mine] = now
        if product.operand is not None:
            read = product.operand
            read = read[(t.read_at[read] == PENDING) & (t.read_by[read] == t.agent)]
            t.read_at[read] = now
        for idx in product.shared:
            _mark_read(batch, idx, now)
    ctas = {product.cta for product in products}
    for product in t.products:
        if product.cta in ctas:  # what is read by one that goes on is not free
            for idx in product.shared:
                _mark_read(batch, idx, PENDING)
            if product.operand is not None:
                t.read_at[product.operand[t.read_by[product.operand] == t.agent]] = PENDING


def leftovers(batch: Any) -> PTXError | None:
    """What a batch that has ended should have waited for or given back."""
    t = batch.tensor
    if t is None:
        return None
    if t.products:
        where = batch.who(t.products[0].lane)
        return PTXError("CTA ended while a tcgen05.mma is unfinished", *where)
    if t.loads:
        where = batch.who(int(t.loads[0].warps[0]) * 32)
        return PTXError("CTA ended without tcgen05.wait::ld for a tcgen05.ld", *where)
    left = t.allocated.any(1)
    if left.any():
        cta = batch.ctas[int(np.flatnonzero(left)[0])]
        return PTXError("CTA ended without tcgen05.dealloc of its tensor memory", cta)
    return None
