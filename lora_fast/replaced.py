"""Functions of PyTorch that a plain layer calls, and that somebody may have replaced for everyone.

Profilers, quantisers and patches for one device assign ``nn.Linear.forward`` or
``torch.nn.functional.linear``, or push a ``__torch_function__`` mode. A fused layer calls none of
these functions, so it leaves the call to PEFT's forward, which calls whatever they are now.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


def own(function: Any, module: str) -> Any:
    """`function` if `module`, or one in that package, defines it; otherwise it has been replaced
    already, and what comes back is no function."""
    defined_in = getattr(function, "__globals__", {}).get("__name__", "")
    return function if f"{defined_in}.".startswith(f"{module}.") else None


CALL = own(nn.Module.__call__, "torch.nn.modules.module")
LINEAR = own(nn.Linear.forward, "torch.nn.modules.linear")
PRODUCT = torch._C._nn.linear
DROPOUT = own(nn.Dropout.forward, "torch.nn.modules.dropout")
DROPPED = own(functional.dropout, "torch.nn.functional")
modes = torch._C._len_torch_function_stack
# Where the mode of torch.set_default_device is defined, which changes no result.
_DEFAULT_DEVICE = "torch.utils._device"


def replaced() -> str | None:
    """Which function that an ordinary layer calls is not PyTorch's, or is observed by a mode."""
    if nn.Linear.__call__ is not CALL:
        return "call of nn.Linear replaced"
    if nn.Linear.forward is not LINEAR:
        return "forward of nn.Linear replaced"
    if functional.linear is not PRODUCT:
        return "torch.nn.functional.linear replaced"
    if nn.Dropout.forward is not DROPOUT or functional.dropout is not DROPPED:
        return "dropout of PyTorch replaced"
    for i in range(modes()):
        if type(torch._C._get_function_stack_at(i)).__module__ != _DEFAULT_DEVICE:
            return "a torch function mode"
    return None
