"""tcgen05: which handler an instruction has."""

from __future__ import annotations

from ..errors import Unsupported
from . import tensor_allocation, tensor_moves, tensor_products

_HANDLERS = {
    "alloc": tensor_allocation.alloc,
    "dealloc": tensor_allocation.dealloc,
    "relinquish_alloc_permit": tensor_allocation.relinquish,
    "ld": tensor_moves.load,
    "st": tensor_moves.store,
    "wait::ld": tensor_moves.wait_ld,
    "wait::st": tensor_moves.wait_st,
    "mma": tensor_products.mma,
    "commit": tensor_products.commit,
}
_IGNORED = ("fence::before_thread_sync", "fence::after_thread_sync")


def tcgen05(em, ins):
    """The handler, or None where there is nothing to do."""
    kind = ins.mods[0]
    if kind in _IGNORED:
        return None
    if kind not in _HANDLERS or ins.has("sp", "ws"):
        raise Unsupported(ins.full)
    return _HANDLERS[kind](em, ins)
