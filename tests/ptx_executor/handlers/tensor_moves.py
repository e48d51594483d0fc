"""tcgen05.ld and st, and the waits for them: between registers and tensor memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import PTXError, Unsupported
from ..memory.layout import PENDING
from ..memory.tensor_memory import NAN, Load, cells_of, check_cells, tensor_memory_of
from ..numbers.integers import U32
from .addressing import addresser, parts_of
from .warps import spread, warps_of

_SHAPES = ("32x32b", "16x32bx2", "16x64b", "16x128b", "16x256b")

_ARITHMETIC = """
    mov prmt cvt add sub mul mad fma and or xor not shl shr shf selp setp set slct min max neg abs
    lop3 bfe bfi ex2 lg2 rcp sqrt rsqrt div tanh sin cos popc clz copysign cvta
"""
# Instructions whose results depend on nothing but their operands.
_PURE = frozenset(_ARITHMETIC.split())


@dataclass(frozen=True)
class _Form:
    """Offsets (32 threads, registers) of lanes and columns; `halves`: 16 bits to a column."""

    lanes: np.ndarray
    columns: np.ndarray
    halves: bool

    @property
    def registers(self) -> int:
        return self.lanes.shape[1] // (2 if self.halves else 1)


def _form(ins, split):
    shape = next((mod for mod in ins.mods if mod in _SHAPES), None)
    count = next((int(mod[1:]) for mod in ins.mods if mod[0] == "x" and mod[1:].isdigit()), None)
    halves = ins.has("pack::16b", "unpack::16b")
    if shape is None or count is None or "red" in ins.mods or (halves and shape != "32x32b"):
        raise Unsupported(ins.full)
    if (split is not None) != (shape == "16x32bx2"):
        raise Unsupported(ins.full)
    return _Form(*_reached(shape, count * (2 if halves else 1), split), halves)


def _reached(shape, count, split):
    """Lane and column offsets of what a warp touches."""
    thread = np.arange(32)[:, None]
    per = {"16x128b": 2, "16x256b": 4}.get(shape, 1)
    i = np.arange(per * count)[None, :]
    if shape == "32x32b":
        lanes, columns = thread, i
    elif shape == "16x32bx2":
        lanes, columns = thread % 16, thread // 16 * split + i
    elif shape == "16x64b":
        lanes, columns = thread // 4 + thread % 2 * 8, thread // 2 % 2 + 2 * i
    elif shape == "16x128b":
        lanes, columns = thread // 4 + i % 2 * 8, thread % 4 + i // 2 * 4
    else:
        lanes = thread // 4 + i // 2 % 2 * 8
        columns = thread % 4 * 2 + i % 2 + i // 4 * 8
    return np.broadcast_arrays(lanes, columns)


def load(em, ins):
    """tcgen05.ld. Results that are used before their wait are hidden until then."""
    results = parts_of(ins.args[0])
    address = addresser(em, ins.args[1], wide=False)
    form = _form(ins, ins.args[2][1] if len(ins.args) > 2 else None)
    if form.registers != len(results) or any(op[0] not in "r_" for op in results):
        raise Unsupported(ins.full)
    regs = [op[1] if op[0] == "r" else None for op in results]
    is_harmless = id(ins) in em.waited_loads

    def run(batch, r, q):
        warps = warps_of(batch, q, ins)
        if warps is not None and warps.size == 0:
            return
        t = tensor_memory_of(batch)
        where = address(batch, r), warps, form.lanes, form.columns
        cells, bws = cells_of(batch, ins, *where)
        hidden = check_cells(batch, cells, bws, "tcgen05.ld reads", write=False)
        values = t.value[cells]
        if hidden.any():
            values[hidden] = NAN
        t.read_at[cells] = PENDING
        t.read_by[cells] = (bws % batch.warps)[:, None, None]
        if form.halves:
            low, high = values[..., 0::2] & np.uint32(0xFFFF), values[..., 1::2]
            values = low | (high << np.uint32(16))
        values = np.ascontiguousarray(values.transpose(2, 0, 1))
        for register, value in zip(regs, values, strict=True):
            if register is not None and is_harmless:
                spread(batch, r, register, value, warps)
            elif register is not None and warps is None:
                r[register] = batch.poison32
            elif register is not None:
                spread(batch, r, register, np.full(value.shape, NAN), warps)
        t.loads.append(Load(bws, cells, regs, values))

    return run


def store(em, ins):
    """tcgen05.st."""
    address = addresser(em, ins.args[0], wide=False)
    form = _form(ins, ins.args[1][1] if len(ins.args) > 2 else None)
    sources = parts_of(ins.args[-1])
    if form.registers != len(sources) or any(op[0] not in "ri" for op in sources):
        raise Unsupported(ins.full)

    def run(batch, r, q):
        warps = warps_of(batch, q, ins)
        if warps is not None and warps.size == 0:
            return
        t = tensor_memory_of(batch)
        where = address(batch, r), warps, form.lanes, form.columns
        cells, bws = cells_of(batch, ins, *where)
        check_cells(batch, cells, bws, "tcgen05.st writes", write=True)
        arrays = [
            np.full(batch.lanes, op[1] & 0xFFFFFFFF, U32) if op[0] == "i" else r[op[1]]
            for op in sources
        ]
        values = np.stack(arrays).reshape(len(sources), -1, 32)
        values = (values if warps is None else values[:, warps]).transpose(1, 2, 0)
        if form.halves:
            halves = [values & np.uint32(0xFFFF), values >> np.uint32(16)]
            values = np.stack(halves, -1).reshape(cells.shape)
        t.value[cells] = values
        t.written_at[cells] = PENDING
        t.written_by[cells] = (bws % batch.warps)[:, None, None]
        t.stores.append((bws, cells))

    return run


def wait_ld(em, ins):
    """Let the results of loads be seen."""

    def run(batch, r, q):
        warps = warps_of(batch, q, ins)
        t = tensor_memory_of(batch)
        pending = []
        for load in t.loads:
            ready = np.isin(load.warps, load.warps if warps is None else warps)
            bws, cells = load.warps[ready], load.cells[ready]
            for register, value in zip(load.regs, load.values[:, ready], strict=True):
                if register is not None:
                    _show(batch, r, register, value, bws)
            mine = (t.read_at[cells] == PENDING) & (
                t.read_by[cells] == (bws % batch.warps)[:, None, None]
            )
            t.read_at[cells[mine]] = batch.shared.now
            if not ready.all():
                rest = ~ready
                values = load.values[:, rest]
                pending.append(Load(load.warps[rest], load.cells[rest], load.regs, values))
        t.loads = pending

    return run


def _show(batch, r, register, value, warps):
    now = r[register].reshape(-1, 32)[warps]
    if ((now != NAN) & (now != value)).any():
        raise PTXError("register of a tcgen05.ld was overwritten before tcgen05.wait::ld")
    if (now != value).any():
        spread(batch, r, register, value, None if warps.size == batch.lanes // 32 else warps)


def wait_st(em, ins):
    """Complete stores."""

    def run(batch, r, q):
        warps = warps_of(batch, q, ins)
        t = tensor_memory_of(batch)
        pending = []
        for bws, cells in t.stores:
            ready = np.isin(bws, bws if warps is None else warps)
            done = cells[ready]
            by = (bws[ready] % batch.warps)[:, None, None]
            mine = (t.written_at[done] == PENDING) & (t.written_by[done] == by)
            t.written_at[done[mine]] = batch.shared.now
            if not ready.all():
                pending.append((bws[~ready], cells[~ready]))
        t.stores = pending

    return run


def harmless_loads(instructions) -> set[int]:
    """Ids of the tcgen05.ld of a block whose results reach nothing but arithmetic before a wait.

    The compiler moves arithmetic on the results above the wait::ld, which does no harm; a result
    that gets away without a wait must not be seen.
    """
    found = set()
    for i, ins in enumerate(instructions):
        if ins.op == "tcgen05" and ins.mods[0] == "ld" and _is_waited(ins, instructions[i + 1 :]):
            found.add(id(ins))
    return found


def _is_waited(load, following):
    tainted = _registers(load.args[0])
    for ins in following:
        if ins.op == "tcgen05" and ins.mods[0] == "wait::ld":
            return ins.pred is None
        is_pure = ins.op in _PURE
        used = set() if ins.pred is None else {ins.pred[0]}
        for op in ins.args[1:] if is_pure else ins.args:
            used |= _registers(op)
        if used & tainted:
            if not is_pure:
                return False
            tainted |= _registers(ins.args[0])
    return False


def _registers(op) -> set[int]:
    """The registers that an operand names."""
    if op[0] in ("r", "!"):
        return {op[1]}
    inner = {"v": lambda: op[1], "|": lambda: op[1:], "m": lambda: (op[1], *op[3])}
    if op[0] not in inner:
        return set()
    return set().union(*(_registers(part) for part in inner[op[0]]()))
