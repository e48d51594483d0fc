"""PEFT's layers on bitsandbytes' 4-bit ones, which PEFT has only if bitsandbytes is installed.

Otherwise stand-ins without instances replace them, so that the fused classes need no second form.
"""

from __future__ import annotations

from typing import Any

from peft.tuners import adalora, ia3, lora, vera


def _class(tuner: Any, name: str, dense: type) -> Any:
    return getattr(tuner, name, None) or type(name, (dense,), {"__module__": __name__})


LoRALinear4bit: Any = _class(lora, "Linear4bit", lora.Linear)
IA3Linear4bit: Any = _class(ia3, "Linear4bit", ia3.Linear)
SVDLinear4bit: Any = _class(adalora, "SVDLinear4bit", adalora.SVDLinear)
VeRALinear4bit: Any = _class(vera, "Linear4bit", vera.Linear)
