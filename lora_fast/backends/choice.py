"""The choice of the backend: ``auto``, ``triton`` or ``torch``.

``auto`` takes Triton for tensors on an NVIDIA GPU of compute capability 8.0 or more, else torch.
``triton`` launches on whatever device the tensors are on and asks no question about CUDA; where
Triton has no driver or miscompiles the kernels, the first operation raises ValueError. ``torch``
computes the same equation in aten and bitsandbytes calls. The environment variable
``LORA_FAST_BACKEND`` sets the process's choice at start-up, :class:`set_backend` later, or for one
thread or task alone. An operation reads the choice once; its backward pass uses the same.
"""

from __future__ import annotations

import ctypes
import dis
import functools
import importlib.util
import os
import sys
import threading
from contextvars import ContextVar
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ..features import MISCOMPILED, is_miscompiled

BackendName = Literal["auto", "triton", "torch"]


def _checked(name: str, origin: str) -> BackendName:
    if name not in get_args(BackendName):
        raise ValueError(
            f"{origin} must be one of {', '.join(get_args(BackendName))}, got {name!r}"
        )
    return cast(BackendName, name)


# The process's choice, and who made it. The last one counts; earlier ones are restored if a call
# turns out to belong to a block.
_default: BackendName = _checked(os.environ.get("LORA_FAST_BACKEND", "auto"), "LORA_FAST_BACKEND")
_defaults: list[tuple[object, BackendName]] = [(None, _default)]
_lock = threading.Lock()
_KEY = "lora_fast_backend"
# Before torch 2.12 torch releases a reference to thread-local objects that it never took: the
# object would be freed while others still use it.
_TORCH_TAKES_REFERENCES = hasattr(torch._C, "_remove_obj_from_tls")
_override: ContextVar[BackendName | None] = ContextVar(_KEY, default=None)


class _OfThread(threading.local):
    """The override for torch.compile, which can trace and guard this, but no ContextVar."""

    def __init__(self) -> None:
        self.override: BackendName | None = None


_of_thread = _OfThread()


class set_backend:
    """Choose the backend: ``set_backend("triton")``, or for a block ``with set_backend("torch"):``.

    The call sets the choice of the process, at once. The block overrides it for its own thread or
    asyncio task alone, and other threads never see it. A backward pass uses what its forward pass
    used, wherever it runs; what checkpointing computes again reads the choice that is in force
    where ``backward()`` is called, so a block around the forward pass belongs around that, too.

    Raises ValueError for a name that is not auto, triton or torch.
    """

    def __init__(self, name: BackendName) -> None:
        self._name = _checked(name, "name")
        self._replaced: list[BackendName | None] = []
        if torch.compiler.is_dynamo_compiling():
            self._before = _default
            _settle(self._name)
            return
        follows = _operation_after_call()
        if follows == "POP_TOP":
            with _lock:
                _settle(self._name)
        elif follows != "with":
            _set_default(self, self._name)

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            _settle(self._before)
            self._replaced.append(_of_thread.override)
            _of_thread.override = self._name
        else:
            _withdraw_default(self)
            self._replaced.append(_override.get())
            _override_here(self._name)

    def __exit__(self, *exc: object) -> None:
        replaced = self._replaced.pop()
        if torch.compiler.is_dynamo_compiling():
            _of_thread.override = replaced
        else:
            _override_here(replaced)


def _override_here(name: BackendName | None) -> None:
    """Override the choice of the process for this thread or task, and for autograd's threads
    working for it, which inherit torch's thread-local objects."""
    _override.set(name)
    _of_thread.override = name
    value = (threading.get_ident(), name)
    if not _TORCH_TAKES_REFERENCES:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    elif name is None:
        torch._C._remove_obj_from_tls(_KEY)
        return
    torch._C._stash_obj_in_tls(_KEY, value)


def _operation_after_call() -> str:
    """What the code that calls :class:`set_backend` does with the result: "with", or the name of
    its next operation.

    A block must not affect other threads, not even between the call and the block's start, and
    until then only the caller's code distinguishes the two uses.
    """
    frame = sys._getframe(2)
    code, start = frame.f_code.co_code, frame.f_lasti + 2
    operations = (dis.opname[op] for op in code[start : start + 40 : 2])
    first, second = [*(name for name in operations if name != "CACHE"), "", ""][:2]
    # Python 3.11 to 3.13, and the sequence of 3.14.
    starts_block = first == "BEFORE_WITH" or (first, second) == ("COPY", "LOAD_SPECIAL")
    return "with" if starts_block else first


def _settle(name: BackendName) -> None:
    """Make `name` the process's choice for good."""
    global _default
    _defaults[:] = [(None, name)]
    _default = name


def _set_default(owner: object, name: BackendName) -> None:
    """Make `name` the process's choice, until `owner` withdraws it."""
    global _default
    with _lock:
        _defaults.append((owner, name))
        _default = name


def _withdraw_default(owner: object) -> None:
    global _default
    with _lock:
        remaining = [entry for entry in _defaults if entry[0] is not owner]
        if len(remaining) < len(_defaults):
            _defaults[:] = remaining
            _default = remaining[-1][1]


def get_backend() -> BackendName:
    """The choice in force here, not yet resolved for a device."""
    if torch.compiler.is_dynamo_compiling():
        return _of_thread.override or _default
    chosen = _override.get()
    if chosen is None and torch._C._is_key_in_tls(_KEY):
        # In a thread of autograd's, where checkpointing recomputes a forward pass, this is the
        # choice of the thread that called backward(); in that thread itself, of another task.
        thread, name = torch._C._get_obj_in_tls(_KEY)
        chosen = None if thread == threading.get_ident() else name
    return chosen or _default


def uses_triton(device: torch.device, backend: BackendName | None = None) -> bool:
    """Whether operations on tensors of `device` go to the Triton kernels, by `backend` or by the
    choice that is in force."""
    backend = backend or get_backend()
    if backend == "auto":
        return device.type == "cuda" and _kernels_run_on(device.index)
    return backend == "triton"


def is_one_row_on_a_cpu(x: Any) -> bool:
    """Whether layers that read x are computed one by one: there is nothing to share but the reading
    of one row, and little to save."""
    if not isinstance(x, Tensor) or not x.is_cpu or x.shape[-1:] != (x.numel(),):
        return False
    return not uses_triton(x.device)


def check_driver(backend: BackendName | None = None) -> None:
    """Check that Triton can launch kernels on this machine, and rightly, or interprets them.

    Raises ValueError, which says what to choose instead of `backend`, if it cannot.
    """
    backend = backend or get_backend()
    try:
        from triton import knobs
        from triton.runtime import driver

        if knobs.runtime.interpret:
            return
        arch = driver.active.get_current_target().arch
    except Exception as error:  # a driver is built on first use, by a C compiler
        reason = str(error).strip().partition("\n")[0]
        allowed = "torch" if backend == "auto" else "auto or torch"
        raise ValueError(
            f"LORA_FAST_BACKEND or set_backend must choose {allowed} on this machine, got "
            f"{backend}: Triton has no driver for it ({reason})"
        ) from error
    if isinstance(arch, int) and is_miscompiled(arch // 10):
        raise ValueError(
            f"LORA_FAST_BACKEND or set_backend must choose torch on this machine, got {backend}: "
            f"{MISCOMPILED}; pip install 'triton<3.9' where torch allows it"
        )


@functools.cache
def _kernels_run_on(index: int | None) -> bool:
    """Whether the kernels support the GPU `index` (None: the current one)."""
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    capability = torch.cuda.get_device_capability(index)
    return capability >= (8, 0) and not is_miscompiled(capability[0])
