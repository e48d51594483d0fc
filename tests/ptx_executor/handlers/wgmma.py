"""wgmma: products of four warps, with operands in shared memory, which run asynchronously.

A product is computed at its issue. Its results stay hidden, the registers read as NaN, until its
group is waited for; so long the shared bytes and registers that it reads must stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import Divergence, PTXError, SharedRace, UninitialisedShared, Unsupported
from ..memory.layout import OWN, PENDING, SHARED_BASE
from ..numbers.float_formats import F32, to_f16
from ..numbers.integers import U32
from .addressing import parts_of
from .matrix_operands import ELEMENT_SIZE, decode, fragment, swizzle, tile_offsets

_PATTERNS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes of the swizzle


@dataclass
class _Pending:
    """A wgmma that is not waited for: what it writes and reads, by warpgroup of the batch."""

    group: dict[int, int]  # warpgroup → number of its commit group
    out: list[int]
    operand: list[tuple[int, np.ndarray]]  # registers of A and what they held
    read: dict[int, list[np.ndarray]]  # warpgroup → granules of shared memory


@dataclass(frozen=True)
class _Form:
    """What the modifiers and operands of a wgmma.mma_async say."""

    N: int
    K: int
    out_type: str
    a_type: str
    b_type: str
    out: list[int]
    a_regs: list[int] | None
    a_descriptor: int
    b_descriptor: int
    scale_d: tuple
    sign: int
    transposes_a: bool
    transposes_b: bool


def wgmma(em, ins):
    """wgmma.mma_async, commit_group, wait_group and fence, which has no effect on values."""
    kind = ins.mods[0]
    if kind == "fence":
        return lambda batch, r, q: None
    if kind == "commit_group":
        return lambda batch, r, q: batch.commit_warpgroups(_warpgroups_of(batch, q))
    if kind == "wait_group":
        latest = ins.args[0][1]
        return lambda batch, r, q: _wait(batch, r, _warpgroups_of(batch, q), latest)
    if kind != "mma_async" or "sp" in ins.mods:
        raise Unsupported(ins.full)
    return _product(ins, _form(ins))


def _form(ins):
    shape = next(mod for mod in ins.mods if mod.startswith("m64n"))
    N, K = (int(number) for number in shape[4:].split("k"))
    types = [mod for mod in ins.mods if mod in (*ELEMENT_SIZE, "f32", "s32")]
    out_type, a_type, b_type = types
    a, b = ins.args[1:3]
    out = [op[1] for op in parts_of(ins.args[0])]
    immediates = [op[1] for op in ins.args[4:]]
    signs, transposed = immediates[:2], immediates[2:]
    sign = signs[0] * signs[1] if len(signs) == 2 and out_type != "s32" else 1
    in_registers = a[0] == "v"
    if in_registers:
        transposed = [0, *transposed]
    if out_type not in ("f32", "s32", "f16"):
        raise Unsupported(ins.full)
    if len(out) != N // 2 // (2 if out_type == "f16" else 1):
        raise Unsupported(ins.full)
    return _Form(
        N=N,
        K=K,
        out_type=out_type,
        a_type=a_type,
        b_type=b_type,
        out=out,
        a_regs=[op[1] for op in a[1]] if in_registers else None,
        a_descriptor=-1 if in_registers else a[1],
        b_descriptor=b[1],
        scale_d=ins.args[3],
        sign=sign,
        transposes_a=bool(transposed[0]) if transposed else False,
        transposes_b=bool(transposed[1]) if len(transposed) > 1 else False,
    )


def _product(ins, form):
    def run(batch, r, q):
        groups = _warpgroups_of(batch, q)
        if groups.size == 0:
            return
        batch.count_mma("wgmma", groups.size, 2 * 64 * form.N * form.K * groups.size)
        read: dict[int, list[np.ndarray]] = {int(g): [] for g in groups}
        if form.a_regs is not None:
            a = _operand_in_registers(batch, r, form, groups)
        else:
            what = form.a_descriptor, 64, form.a_type, form.transposes_a, "A"
            a = _operand_in_memory(batch, r, ins, groups, *what, read)
        what = form.b_descriptor, form.N, form.b_type, form.transposes_b, "B"
        b = _operand_in_memory(batch, r, ins, groups, *what, read)
        product = np.matmul(a, b.swapaxes(1, 2))  # (warpgroups, 64, N)
        if form.sign != 1:
            product = -product
        before = _accumulator(batch, r, ins, form, groups)
        _hide(batch, r, form.out, groups, _add(form, before, product))
        batch.wg_pending.append(
            _Pending(
                group={int(g): batch.wg_committed[g] for g in groups},
                out=form.out,
                operand=[(i, r[i]) for i in form.a_regs or ()],
                read=read,
            )
        )

    return run


def _operand_in_registers(batch, r, form, groups):
    hidden = batch.wg_hidden
    if any(g in hidden.get(i, ()) for i in form.a_regs for g in groups):
        raise PTXError("wgmma uses as operand A a register that an unfinished wgmma still writes")
    a = fragment(batch, r, form.a_regs, form.a_type, is_a=True)
    return a.reshape(batch.lanes // 128, 64, form.K)[groups]


def _operand_in_memory(batch, r, ins, groups, register, rows, type_, is_mn_major, which, read):
    """(warpgroups, rows, K) as float64; `read` gets the bytes read, by warpgroup."""
    descriptors = r[register].reshape(-1, 128)[groups]
    if (descriptors != descriptors[:, :1]).any():
        raise PTXError(f"wgmma descriptor of {which} differs between threads of a warpgroup")
    per_cta = batch.threads // 128
    shared = batch.shared
    matrices, seen = [], {}
    for d, g in zip(map(int, descriptors[:, 0]), map(int, groups), strict=True):
        cta, group = divmod(g, per_cta)
        if (d, cta) not in seen:
            idx = _tile(batch, ins, d, rows, type_, is_mn_major, which, cta)
        else:
            idx = seen[d, cta][1]
        _check_read(batch, ins, idx, cta, group)
        if (d, cta) not in seen:
            words = shared.views[16][idx >> 4].view(U32).reshape(idx.shape[0], -1)
            shared.nread += 16 * idx.size
            matrix = decode(words, type_)
            seen[d, cta] = (matrix.T if is_mn_major else matrix), idx
        matrices.append(seen[d, cta][0])
        read[g].append(idx)
    return np.stack(matrices)


def _tile(batch, ins, d, rows, type_, is_mn_major, which, cta):
    """The bytes of the batch's shared memory that a matrix descriptor means."""
    if (d >> 49) & 7:
        raise NotImplementedError(f"matrix descriptor with a base offset in `{ins.text}`")
    start, leading, stride = (((d >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
    pattern = _PATTERNS[d >> 62]
    offsets = tile_offsets(rows, is_mn_major, ELEMENT_SIZE[type_], pattern, leading, stride)
    addr = swizzle(start + offsets, pattern)
    shared = batch.shared
    if addr.min() < SHARED_BASE or addr.max() + 16 > SHARED_BASE + shared.size:
        message = f"wgmma operand {which} lies outside shared memory"
        raise PTXError(message, batch.ctas[cta], None, int(addr.max()))
    return addr - SHARED_BASE + cta * shared.stride


def _check_read(batch, ins, idx, cta, group):
    """All four warps must be ordered after what wrote the bytes."""
    shared = batch.shared
    if not shared.check:
        return
    first = group * 4
    g = shared.granules_of(idx.reshape(-1), 16)
    at, by = shared.written_at[g], shared.written_by[g]
    seen = shared.seen[cta, first : first + 4]
    seen = np.where(seen >= OWN, PENDING - 1, seen).min(axis=0)
    late, never = at > seen[by], at == 0
    if late.any() or never.any():
        granule = int(g[tuple(np.argwhere(late if late.any() else never)[0])])
        where = batch.ctas[cta], first * 32, shared.address_of(granule)
        if late.any():
            raise SharedRace(f"wgmma reads shared bytes {shared.unread(granule)}", *where)
        raise UninitialisedShared("wgmma reads shared bytes that were never written", *where)
    fenced = shared.fences.fenced[cta, first : first + 4].min(axis=0)
    shared.check_fenced(batch, ins, g, lambda by: fenced[by], batch.ctas[cta], first * 32)
    shared.read_at[(shared.warps + group) * shared.granules + g] = PENDING


def _warpgroups_of(batch, q):
    """The warpgroups of the batch that execute; Divergence for a part of one."""
    if batch.threads % 128:
        raise PTXError("wgmma needs whole warpgroups")
    if q is None:
        return np.arange(batch.lanes // 128)
    mask = q.reshape(-1, 128)
    full, some = mask.all(1), mask.any(1)
    if (full != some).any():
        lane = int(np.flatnonzero(some & ~full)[0]) * 128
        raise Divergence("wgmma reached by part of a warpgroup", *batch.who(lane))
    return np.flatnonzero(full)


def _accumulator(batch, r, ins, form, groups):
    """What the product is added to, (registers, lanes), hidden results included; or zeros."""
    scale = form.scale_d
    if scale[0] == "i":
        adds = bool(scale[1])
    else:
        flags = r[scale[1]].reshape(-1, 128)[groups]
        if (flags != flags[0, 0]).any():
            raise NotImplementedError(f"scale-d that differs between warpgroups in `{ins.text}`")
        adds = bool(flags[0, 0])
    if not adds:
        return np.zeros((len(form.out), groups.size * 128), U32)
    arrays = []
    for register in form.out:
        value = r[register]
        hidden = batch.wg_hidden.get(register)
        if hidden:
            value = value.copy()
            for g, result in hidden.items():
                value.reshape(-1, 128)[g] = result
        arrays.append(value.reshape(-1, 128)[groups].reshape(-1))
    return np.stack(arrays)


def _add(form, before, product):
    """accumulator + product, as registers."""
    n, registers = product.shape[0], len(form.out)
    parts = product.reshape(n, 4, 2, 8, form.N // 8, 4, 2)
    if form.out_type == "f16":
        parts = parts.transpose(4, 2, 0, 1, 3, 5, 6).reshape(registers, n * 128, 2)
        total = before.view(np.float16).reshape(registers, -1, 2) + parts
        return to_f16(total).view(U32)[..., 0]
    parts = parts.transpose(4, 2, 6, 0, 1, 3, 5).reshape(registers, n * 128)
    if form.out_type == "f32":
        return (before.view(F32) + parts).astype(F32).view(U32)
    return (before.view(np.int32) + parts).astype(np.int64).astype(U32)


def _hide(batch, r, out, groups, results):
    results = results.reshape(len(out), groups.size, 128)
    for register, result in zip(out, results, strict=True):
        hidden = batch.wg_hidden.setdefault(register, {})
        for g, value in zip(map(int, groups), result, strict=True):
            hidden[g] = value
        if groups.size == batch.lanes // 128:
            r[register] = batch.poison32
        else:
            new = r[register].copy()
            new.reshape(-1, 128)[groups] = batch.poison32[0]
            r[register] = new


def _wait(batch, r, groups, latest):
    """Make the results of all but the `latest` commit groups visible."""
    if not batch.wg_pending:
        return
    waiting = set(map(int, groups))
    written: dict[int, set[int]] = {}  # register → warpgroups that still write it
    finished: list[tuple[int, _Pending]] = []
    unfinished = []
    for pending in batch.wg_pending:
        left = {}
        for g, number in pending.group.items():
            if g in waiting and number < batch.wg_committed[g] - latest:
                finished.append((g, pending))
            else:
                left[g] = number
                for register in pending.out:
                    written.setdefault(register, set()).add(g)
        pending.group = left
        if left:
            unfinished.append(pending)
    batch.wg_pending = unfinished
    ready: dict[int, set[int]] = {}
    for g, pending in finished:
        for register in pending.out:
            if g not in written.get(register, ()):
                ready.setdefault(register, set()).add(g)
        _release(batch, r, g, pending)
    for register, of in ready.items():
        _show(batch, r, register, of)
    for pending in unfinished:
        for g in pending.group:
            _mark_read(batch, g, pending, PENDING)


def _release(batch, r, g, pending):
    """A warpgroup is done with what a product reads."""
    for register, held in pending.operand:
        now = r[register]
        if now is not held and (now.reshape(-1, 128)[g] != held.reshape(-1, 128)[g]).any():
            raise PTXError("register of wgmma operand A was overwritten before the wait for it")
    shared = batch.shared
    if shared.check:
        _mark_read(batch, g, pending, shared.now)
        cta, group = divmod(g, batch.threads // 128)
        shared.seen[cta, group * 4 : group * 4 + 4, shared.warps + group] = shared.now


def _mark_read(batch, g, pending, time):
    shared = batch.shared
    if shared.check:
        agent = shared.warps + g % (batch.threads // 128)
        for idx in pending.read[g]:
            granules = shared.granules_of(idx.reshape(-1), 16)
            shared.read_at[agent * shared.granules + granules] = time


def _show(batch, r, register, groups):
    """Put the hidden results of these warpgroups into a register."""
    hidden = batch.wg_hidden[register]
    if r[register] is batch.poison32 and len(groups) == len(hidden) == batch.lanes // 128:
        r[register] = np.concatenate([hidden[g] for g in range(len(groups))])
        del batch.wg_hidden[register]
        return
    new = r[register].copy()
    for g in groups:
        if (new.reshape(-1, 128)[g] != batch.poison32[0]).any():
            raise PTXError("accumulator register of a wgmma was overwritten before the wait for it")
        new.reshape(-1, 128)[g] = hidden.pop(g)
    r[register] = new
    if not hidden:
        del batch.wg_hidden[register]
