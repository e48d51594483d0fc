"""bitsandbytes' 4-bit layers, recognised without importing bitsandbytes.

It takes longer to import than PyTorch, and not everybody has it. A caller with one of its layers
has imported it, so it is looked up among the loaded modules of this process. Code that runs before
every call asks ``isinstance(layer, four_bit.classes or four_bit.find())`` itself, which is
:func:`is_four_bit` without a call.
"""

from __future__ import annotations

import sys
from typing import Any

from ..replaced import own

# Linear4bit and LinearNF4, whose forward is known here; empty until they have been found.
classes: tuple[type[Any], ...] = ()
# Params4bit.
weight_class: type | None = None
# The library, its layers' forward and the product in it, which somebody may replace.
library: Any = None
forward: Any = None
product: Any = None


def is_four_bit(layer: Any) -> bool:
    """Whether `layer` is a ``bitsandbytes.nn.Linear4bit``, of its class or one derived from it."""
    return isinstance(layer, classes or find())


def find() -> tuple[type[Any], ...]:
    """:data:`classes`, if bitsandbytes is loaded by now."""
    global classes, weight_class, library, forward, product
    # None marks a package whose import is blocked.
    if sys.modules.get("bitsandbytes") is not None:
        import bitsandbytes
        from bitsandbytes.nn import Linear4bit, LinearNF4, Params4bit

        library, forward = bitsandbytes, own(Linear4bit.forward, "bitsandbytes")
        product = own(bitsandbytes.matmul_4bit, "bitsandbytes")
        weight_class = Params4bit
        classes = (Linear4bit, LinearNF4)
    return classes


def restore_quant_state(layer: Any) -> None:
    """Give the weight its ``quant_state`` back, as Linear4bit.forward does, if FSDP replaced it."""
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    fix_4bit_weight_quant_state_from_module(layer)
