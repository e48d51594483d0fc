"""How much memory a fine-tuning run will need, before anything is loaded.

Every part is counted from the model itself: parameters on the meta device, the bytes of NF4 weights
from bitsandbytes' own shapes, and activations by running the forward pass on fake tensors.
"""

from .memory import MemoryPlan, plan
from .settings import Settings

__all__ = ["MemoryPlan", "Settings", "plan"]
