"""A kernel ready to run: where its variables lie, and the functions of its blocks.

A block becomes ``def block(batch, r, m)`` with the register file `r` and a mask `m` of the active
threads, in two variants: for all threads active, without masking, and masked. Arithmetic is inlined
as numpy expressions; what has state is a call of a handler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Unsupported
from ..memory.layout import LOCAL_BASE, SHARED_BASE
from ..numbers import float_formats, integers
from ..ptx.instructions import Instruction, Kernel
from ..ptx.types import TYPE_SIZE
from . import blocks
from .blocks import Block
from .emitter import Emitter


class Program:
    """A kernel decoded into blocks, with `dynamic_shared` bytes of dynamic shared memory."""

    def __init__(self, kernel: Kernel, dynamic_shared: int) -> None:
        self.kernel = kernel
        self.name = kernel.name
        self.params = {param.name: param for param in kernel.params}
        self.symbols: dict[str, int] = {}  # address of every .shared and .local variable
        self.shared_size = self._place("shared", SHARED_BASE, dynamic_shared)
        self.local_size = self._place("local", LOCAL_BASE, 0)
        self.granule = _shared_granule(kernel)
        self.global_granule = _global_granule(kernel)
        self.blocks = blocks.split(kernel)
        self._names: dict[str, Any] = {"where": np.where, "np": np, "full": np.full}
        for module in (float_formats, integers):
            self._names.update(vars(module))
        self._scalars: dict[tuple[str, bytes], str] = {}

    def _place(self, space: str, base: int, size: int) -> int:
        """Give the variables of a space their addresses after `size` bytes; all their bytes."""
        for variable in self.kernel.variables.values():
            if variable.space != space:
                continue
            if variable.extern or variable.size == 0:
                self.symbols[variable.name] = base
            else:
                align = 16 if space == "local" else max(variable.align, 1)
                size = -(-size // align) * align
                self.symbols[variable.name] = base + size
                size += variable.size
        return size

    def function(self, block: Block, *, masked: bool) -> Callable[..., None]:
        """The block's function, translated when it is first needed."""
        function = self._translate(block, masked)
        if masked:
            block.masked = function
        else:
            block.full = function
        return function

    def _translate(self, block: Block, masked: bool) -> Callable[..., None]:
        emitter = Emitter(self, block, masked)
        lines, owners = ["def block(batch, r, m):"], [None]
        for ins in block.instructions:
            try:
                emitted = emitter.emit(ins)
            except Unsupported as error:
                emitted = [f"batch.unsupported({self.constant(ins)}, {str(error)!r})"]
            lines += [f"    {line}" for line in emitted]
            owners += [ins] * len(emitted)
        source = "\n".join([*lines, "    pass"])
        name = f"<{self.name} block {block.index}{' masked' if masked else ''}>"
        exec(compile(source, name, "exec"), self._names)
        function = self._names["block"]
        function.owners = owners  # the instruction of every line
        return function

    def constant(self, value: Any) -> str:
        """A name for a value in the translated code."""
        name = f"k{len(self._names)}"
        self._names[name] = value
        return name

    def scalar(self, value: np.generic) -> str:
        """A name for a number, one for all its uses."""
        key = (value.dtype.str, value.tobytes())
        if key not in self._scalars:
            self._scalars[key] = self.constant(value)
        return self._scalars[key]


def _shared_granule(kernel: Kernel) -> int:
    """Bytes of the smallest access to shared memory, at most 16."""
    return min((_shared_bytes(ins) for ins in kernel.instructions), default=16)


def _shared_bytes(ins: Instruction) -> int:
    if ins.op == "mbarrier":
        return 8
    if ins.op == "tcgen05":
        return 4 if ins.mods[0] == "alloc" else 16
    if not ins.in_space("shared"):
        is_generic = ins.op == "ld" and not ins.has("global", "param", "const", "local")
        return 1 if is_generic else 16
    if ins.op == "cp" and "bulk" not in ins.mods and len(ins.args) > 2:
        return ins.args[2][1] if ins.args[2][0] == "i" else 4
    if ins.op in ("ld", "st", "atom", "red"):
        types = ins.types()
        width = min(ins.width(), 4)
        return min(16, (TYPE_SIZE[types[-1]] if types else 4) * width)
    return 16


def _global_granule(kernel: Kernel) -> int:
    """Bytes of the smallest access to global memory, at most 16."""
    return min((_global_bytes(ins) for ins in kernel.instructions), default=16)


def _global_bytes(ins: Instruction) -> int:
    if ins.op == "cp":
        if "tensor" in ins.mods:
            return 1
        is_copy = "bulk" not in ins.mods and "mbarrier" not in ins.mods and len(ins.args) > 2
        return min(16, ins.args[2][1]) if is_copy else 16
    elsewhere = any(ins.in_space(space) for space in ("param", "local", "shared"))
    if ins.op not in ("ld", "st", "atom", "red", "ldu") or elsewhere:
        return 16
    types = ins.types()
    width = 1 if ins.op in ("atom", "red") else ins.width()
    return min(16, (TYPE_SIZE[types[-1]] if types else 1) * width)
