"""Calls: tl.device_assert and tl.device_print; other functions cannot be called."""

from __future__ import annotations

import re

import numpy as np

from ..errors import DeviceAssert
from ..memory.layout import LOCAL_BASE

_FORMAT = re.compile(r"%[-+ #0-9.]*((?:hh|h|ll|l)?[diouxXeEfFgGcsp])")
_LENGTH = re.compile(r"(%[-+ #0-9.]*)(?:hh|h|ll|l)([diouxX])")


def call(em, ins):
    """__assertfail raises DeviceAssert, vprintf prints, others raise NotImplementedError."""
    target = next((op[1] for op in ins.args if op[0] == "s"), "?")
    lists = [op for op in ins.args if op[0] == "v"]
    params = [op[1] for op in lists[-1][1]] if lists else []

    def run(batch, r, q):
        if q is not None and not q.any():
            return
        if target == "__assertfail":
            _fail(batch, params, 0 if q is None else int(np.flatnonzero(q)[0]))
        if target != "vprintf":
            where = f"`{ins.text}` [{ins.where()}]"
            raise NotImplementedError(f"PTX not executed: {where} (call of {target})")
        if not batch.opts.ignore_printf:
            for lane in range(batch.lanes) if q is None else np.flatnonzero(q):
                _print(batch, params, int(lane))

    return run


def _fail(batch, params, lane):
    message, file, line = (int(batch.call_arguments[name][lane]) for name in params[:3])
    memory = batch.global_memory
    raise DeviceAssert(
        f"device assertion failed: {memory.cstring(message)} ({memory.cstring(file)}:{line})",
        *batch.who(lane),
    )


def _print(batch, params, lane):
    text, arguments = (int(batch.call_arguments[name][lane]) for name in params[:2])
    text = batch.global_memory.cstring(text)
    plain = _LENGTH.sub(r"\1\2", text.replace("%p", "%#x"))
    print(plain % _arguments(batch, arguments, lane, text), end="")


def _arguments(batch, addr, lane, text):
    """Arguments of one thread's vprintf, from its local memory."""
    at = (addr & ((1 << 56) - 1)) - LOCAL_BASE + lane * batch.local.stride
    values = []
    for kind in _FORMAT.findall(text.replace("%%", "")):
        size = 8 if kind[-1] in "eEfFgGsp" or kind.startswith("l") else 4
        at = -(-at // size) * size
        raw = batch.local.raw[at : at + size]
        at += size
        if kind[-1] in "eEfFgG":
            values.append(float(raw.view(np.float64)[0]))
        elif kind[-1] == "s":
            values.append(batch.global_memory.cstring(int(raw.view(np.uint64)[0])))
        else:
            dtype = f"{'i' if kind[-1] in 'di' else 'u'}{size}"
            values.append(int(raw.view(dtype)[0]))
    return tuple(values)
