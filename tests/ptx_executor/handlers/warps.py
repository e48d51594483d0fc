"""Instructions of whole warps: shfl, vote, redux, activemask, elect."""

from __future__ import annotations

import numpy as np

from ..errors import Divergence, Unsupported
from ..numbers.float_formats import F32
from ..numbers.integers import S32, S64, U32
from .addressing import merge, per_thread, values_of

_LANE = np.arange(32, dtype=np.int64)
_BIT = np.uint64(1) << np.arange(32, dtype=np.uint64)


def warps_of(batch, q, ins):
    """The warps that execute an .aligned instruction; None for all of them. Divergence."""
    if q is None:
        return None
    mask = q.reshape(-1, 32)
    full, some = mask.all(1), mask.any(1)
    if full.all():
        return None
    for w in np.flatnonzero(some & ~full):
        if not (batch.alive.reshape(-1, 32)[w] == mask[w]).all():
            lane = int(np.flatnonzero(~mask[w])[0])
            raise Divergence(f"{ins.op} reached by part of a warp", *batch.who(int(w) * 32 + lane))
    return np.flatnonzero(some)


def spread(batch, r, register, value, warps):
    """Write (warps, 32) values into a register of these warps."""
    if warps is None:
        r[register] = value.reshape(-1)
    else:
        new = r[register].copy()
        new.reshape(-1, 32)[warps] = value.reshape(-1, 32)
        r[register] = new


def _mask(batch, q):
    """The threads that execute, (warps, 32)."""
    if q is not None:
        return q.reshape(-1, 32)
    return batch.alive.reshape(-1, 32) if batch.exited else batch.all_warps


def _of_bits(bits):
    """Lanes of member masks: one for all, or one for each row."""
    return (np.asarray(bits)[..., None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1) != 0


def _members(members, mask):
    """The lanes that take part, by the member mask that the first executing lane holds."""
    if isinstance(members, int):
        return mask & _of_bits(np.uint32(members))
    each = members.reshape(-1, 32)
    return mask & _of_bits(each[np.arange(each.shape[0]), mask.argmax(1)])


def _check_members(batch, q, members, what):
    """Every lane of the member mask must take part or have exited. False if no thread does."""
    if q is None:
        return True
    if not q.any():
        return False
    mask = q.reshape(-1, 32)
    if not mask.all():
        active = np.repeat(mask.any(1)[:, None], 32, axis=1)
        if isinstance(members, int):
            needed = np.broadcast_to(_of_bits(np.uint32(members)), mask.shape)
        else:
            each = members.reshape(-1, 32)
            needed = _of_bits(each[np.arange(each.shape[0]), mask.argmax(1)])
        missing = active & needed & batch.alive.reshape(-1, 32) & ~mask
        if missing.any():
            w, lane = (int(i) for i in np.argwhere(missing)[0])
            raise Divergence(
                f"{what}: a lane of the member mask is not executing it",
                *batch.who(w * 32 + lane),
            )
    return True


def shfl(em, ins):
    """shfl.sync: every lane reads the register of another."""
    mode = next(mod for mod in ins.mods if mod in ("bfly", "idx", "up", "down"))
    if "sync" not in ins.mods:
        raise Unsupported(ins.full)
    result, value, b, c, members = ins.args
    register, predicate = result[1:] if result[0] == "|" else (result, ("_",))
    source, lane_of, clamp = (values_of(em, [op], 4)[0] for op in (value, b, c))
    member = per_thread(members)
    fixed = None
    if b[0] == "i" and c[0] == "i":
        fixed = _shuffled(mode, np.int64(b[1]), np.int64(c[1]))

    def run(batch, r, q):
        if not _check_members(batch, q, member(r), "shfl.sync"):
            return
        x = source(batch, r).reshape(-1, 32)
        if fixed is not None:
            out, inside = x[:, fixed[0]], np.broadcast_to(fixed[1], x.shape)
        else:
            lanes, clamps = (f(batch, r).reshape(-1, 32).astype(S64) for f in (lane_of, clamp))
            j, inside = _shuffled(mode, lanes, clamps)
            out = np.take_along_axis(x, j, 1)
        if register[0] == "r":
            merge(r, register[1], np.ascontiguousarray(out).reshape(-1), q)
        if predicate[0] == "r":
            merge(r, predicate[1], np.ascontiguousarray(inside).reshape(-1), q)

    return run


def _shuffled(mode, b, c):
    """(source lane, whether it is in range) of every lane."""
    b, clamp, segment = b & 31, c & 31, (c >> 8) & 31
    last = (_LANE & segment) | (clamp & ~segment)
    if mode == "up":
        j = _LANE - b
        inside = j >= last
    else:
        first = _LANE & segment
        j = {"down": _LANE + b, "bfly": _LANE ^ b, "idx": first | (b & ~segment)}[mode]
        inside = j <= last
    return np.where(inside, j, _LANE), inside


def vote(em, ins):
    """vote.sync: all, any, uni, ballot."""
    kind = next(mod for mod in ins.mods if mod in ("all", "any", "uni", "ballot"))
    result, value, members = ins.args
    member = per_thread(members)

    def run(batch, r, q):
        if not _check_members(batch, q, member(r), "vote.sync"):
            return
        x = np.full(batch.lanes, bool(value[1])) if value[0] == "i" else r[value[1]]
        x = (~x if value[0] == "!" else x).reshape(-1, 32)
        mask = _members(member(r), _mask(batch, q))
        if kind == "ballot":
            out = ((x & mask) * _BIT).sum(1).astype(U32)
        else:
            every, none = (x | ~mask).all(1), (~x | ~mask).all(1)
            out = {"all": every, "any": ~none, "uni": every | none}[kind]
        merge(r, result[1], np.repeat(out, 32), q)

    return run


def redux(em, ins):
    """redux.sync: a reduction over the lanes of a warp."""
    op = next(mod for mod in ins.mods if mod in ("add", "min", "max", "and", "or", "xor"))
    type_ = ins.types()[-1]
    if type_ not in ("s32", "u32", "b32", "f32") or "abs" in ins.mods:
        raise Unsupported(ins.full)
    result, value, members = ins.args
    source, member = values_of(em, [value], 4)[0], per_thread(members)
    dtype = {"s": S32, "u": U32, "b": U32, "f": F32}[type_[0]]
    function, neutral = _reduction(op, dtype, "NaN" in ins.mods)

    def run(batch, r, q):
        if not _check_members(batch, q, member(r), "redux.sync"):
            return
        x = source(batch, r).view(dtype).reshape(-1, 32)
        mask = _members(member(r), _mask(batch, q))
        if op == "add":
            out = np.where(mask, x, 0).astype(S64).sum(1).astype(U32)
        else:
            out = function.reduce(np.where(mask, x, neutral), axis=1).view(U32)
        merge(r, result[1], np.repeat(out, 32), q)

    return run


def _reduction(op, dtype, propagates_nan):
    """(function, neutral element)."""
    if op == "add":
        return np.add, dtype.type(0)
    if op in ("and", "or", "xor"):
        functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        return functions[op], U32.type(0xFFFFFFFF if op == "and" else 0)
    if dtype == F32:
        strict, lax = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}[op]
        return strict if propagates_nan else lax, dtype.type(np.inf if op == "min" else -np.inf)
    info = np.iinfo(dtype)
    if op == "min":
        return np.minimum, dtype.type(info.max)
    return np.maximum, dtype.type(info.min)


def activemask(em, ins):
    """The lanes that execute."""

    def run(batch, r, q):
        bits = (_mask(batch, q) * _BIT).sum(1).astype(U32)
        merge(r, ins.args[0][1], np.repeat(bits, 32), q)

    return run


def elect(em, ins):
    """elect.sync: the first of the lanes."""
    result, members = ins.args
    register, predicate = result[1:] if result[0] == "|" else (("_",), result)
    member = per_thread(members)

    def run(batch, r, q):
        if not _check_members(batch, q, member(r), "elect.sync"):
            return
        mask = _members(member(r), _mask(batch, q))
        first = mask.argmax(1)
        if register[0] == "r":
            merge(r, register[1], np.repeat(first.astype(U32), 32), q)
        elected = (first[:, None] == np.arange(32)) & mask.any(1)[:, None]
        merge(r, predicate[1], elected.reshape(-1), q)

    return run
