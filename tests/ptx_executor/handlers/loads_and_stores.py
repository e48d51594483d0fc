"""ld and st of every space, fence and membar."""

from __future__ import annotations

import numpy as np

from ..errors import Unsupported
from ..numbers.integers import SIGNED, UNSIGNED
from ..ptx.types import REG_SIZE, TYPE_SIZE
from .addressing import (
    addresser,
    gather,
    memory_for,
    parts_of,
    put,
    select,
    semantics,
    space_of,
    values_of,
)


class _Access:
    """What a load and a store have in common: chunks of at most 16 bytes for every lane."""

    def __init__(self, em, ins, address, data):
        self.space = space_of(ins)
        self.type = ins.types()[-1]
        self.element = TYPE_SIZE[self.type]
        self.parts = parts_of(data)
        if len(self.parts) != ins.width():
            raise Unsupported("vector width")
        if self.element > 8:
            raise Unsupported(f"elements of {self.element} bytes")
        size = self.element * ins.width()
        self.chunks = max(size // 16, 1)  # 256-bit accesses are two
        self.size = size // self.chunks
        self.per_chunk = len(self.parts) // self.chunks
        self.semantics = semantics(ins)
        self._address = addresser(em, address, wide=self.space != "shared")

    def where(self, batch, r, q):
        """(memory, lanes, addresses of each chunk, keywords of the access), or None."""
        lanes = select(batch, q)
        addr = self._address(batch, r)
        if lanes is not None:
            if lanes.size == 0:
                return None
            addr = addr[lanes]
        memory, addr = memory_for(batch, self.space, addr)
        strong = self.semantics is not None and memory is batch.global_memory
        addrs = [addr, *(addr + addr.dtype.type(16 * c) for c in range(1, self.chunks))]
        return memory, lanes, addrs, {"sem": self.semantics} if strong else {}


def load(em, ins):
    """ld: registers wider than the element are extended by its sign, or zeros."""
    access = _Access(em, ins, ins.args[1], ins.args[0])
    element, per_chunk = access.element, access.per_chunk
    regs = [None if op[0] == "_" else op[1] for op in access.parts]
    widths = [0 if reg is None else REG_SIZE[em.kernel.regs[reg]] for reg in regs]
    if any(reg is not None and width < element for reg, width in zip(regs, widths, strict=True)):
        raise Unsupported("a register smaller than the element")
    kind = SIGNED if access.type[0] == "s" else UNSIGNED

    def write(r, j, column, lanes):
        if regs[j] is None:
            return
        if widths[j] > element:
            column = column.view(kind[element]).astype(kind[widths[j]]).view(UNSIGNED[widths[j]])
        put(r, regs[j], column, lanes)

    def run(batch, r, q):
        found = access.where(batch, r, q)
        if found is None:
            return
        memory, lanes, addrs, strong = found
        for chunk, addr in enumerate(addrs):
            value = memory.load(batch, addr, access.size, lanes, **strong)
            if per_chunk == 1:
                write(r, chunk, value, lanes)
                continue
            columns = np.ascontiguousarray(value.view(UNSIGNED[element]).reshape(-1, per_chunk).T)
            for j, column in enumerate(columns):
                write(r, chunk * per_chunk + j, column, lanes)

    return run


def store(em, ins):
    """st."""
    access = _Access(em, ins, ins.args[0], ins.args[1])
    functions = values_of(em, access.parts, access.element)

    def run(batch, r, q):
        found = access.where(batch, r, q)
        if found is None:
            return
        memory, lanes, addrs, strong = found
        for chunk, addr in enumerate(addrs):
            mine = functions[chunk * access.per_chunk : (chunk + 1) * access.per_chunk]
            value = gather(mine, batch, r, lanes, access.element, access.size)
            memory.store(batch, addr, access.size, value, lanes, **strong)

    return run


def fence(em, ins):
    """fence and membar of gpu or wider scope, fence.proxy.async; None for what orders nothing."""
    if ins.has("proxy") and ins.has("async") and not ins.has("global"):
        return _fence_proxies
    if ins.has("proxy", "mbarrier_init", "cta", "alias", "async"):
        return None

    def run(batch, r, q):
        order = batch.global_memory.order
        if order is not None:
            warps = range(batch.lanes // 32)
            order.fence(batch, warps if q is None else np.flatnonzero(q.reshape(-1, 32).any(1)))

    return run


def _fence_proxies(batch, r, q):
    alive = batch.alive.reshape(-1, 32)
    mask = alive if q is None else q.reshape(-1, 32)
    whole = (mask | ~alive).all(1)
    for bw in map(int, np.flatnonzero(mask.any(1))):
        batch.shared.fence_proxies(*divmod(bw, batch.warps), whole=bool(whole[bw]))
    batch.shared.now += 1
