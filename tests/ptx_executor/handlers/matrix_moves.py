"""ldmatrix and stmatrix: 8 × 8 matrices of 16 bits between shared memory and a warp's registers."""

from __future__ import annotations

import numpy as np

from ..errors import Unsupported
from ..memory.layout import CHUNK
from ..numbers.integers import U16, U32
from .addressing import addresser, parts_of
from .warps import spread, warps_of


class _Move:
    """What both have in common: the matrices' registers, and a lane's address for every row."""

    def __init__(self, em, ins, data, address):
        self.ins = ins
        self.count = next((int(mod[1]) for mod in ins.mods if mod in ("x2", "x4")), 1)
        self.regs = [op[1] for op in parts_of(data)]
        if not {"m8n8", "b16"} <= set(ins.mods) or len(self.regs) != self.count:
            raise Unsupported(ins.full)
        self.transposes = "trans" in ins.mods
        self._address = addresser(em, address, wide=False)

    def where(self, batch, r, q):
        """(warps, addresses, lanes of the addresses), or None where no warp is."""
        warps = warps_of(batch, q, self.ins)
        if warps is not None and warps.size == 0:
            return None
        addr = self._address(batch, r).reshape(-1, 32)
        if warps is None and self.count == 4:
            return None, addr.reshape(-1), None
        lanes = np.arange(batch.lanes).reshape(-1, 32)
        if warps is not None:
            addr, lanes = addr[warps], lanes[warps]
        rows = 8 * self.count
        addr, lanes = (np.ascontiguousarray(x[:, :rows]).reshape(-1) for x in (addr, lanes))
        return warps, addr, lanes


def ldmatrix(em, ins):
    """Matrices from shared memory."""
    move = _Move(em, ins, ins.args[0], ins.args[1])
    count = move.count

    def run(batch, r, q):
        found = move.where(batch, r, q)
        if found is None:
            return
        warps, addr, lanes = found
        rows = batch.shared.load(batch, addr, 16, lanes, "ldmatrix")
        if move.transposes:
            rows = rows.view(U16).reshape(-1, count, 8, 8).transpose(1, 0, 3, 2)
            values = np.ascontiguousarray(rows).view(U32).reshape(count, -1)
        else:
            rows = rows.view(U32).reshape(-1, count, 32).transpose(1, 0, 2)
            values = np.ascontiguousarray(rows).reshape(count, -1)
        for register, value in zip(move.regs, values, strict=True):
            spread(batch, r, register, value, warps)

    return run


def stmatrix(em, ins):
    """Matrices to shared memory."""
    move = _Move(em, ins, ins.args[1], ins.args[0])

    def run(batch, r, q):
        found = move.where(batch, r, q)
        if found is None:
            return
        warps, addr, lanes = found
        values = np.stack([r[i].reshape(-1, 32) for i in move.regs], axis=1)  # (warps, count, 32)
        if warps is not None:
            values = values[warps]
        values = np.ascontiguousarray(values)
        if move.transposes:
            values = values.view(U16).reshape(-1, move.count, 8, 8).transpose(0, 1, 3, 2)
        rows = np.ascontiguousarray(values).view(CHUNK[16]).reshape(-1)
        batch.shared.store(batch, addr, 16, rows, lanes, "stmatrix")

    return run
