"""How much memory a fine-tuning run will need, before anything is loaded.

Every part is counted from the model itself: parameters on the meta device, the bytes of NF4 weights
from bitsandbytes' own shapes, and activations by running the forward pass on fake tensors.

Settings that reproduce well-known numbers. Llama-2-7B in bfloat16, AdamW, one example
at a time, gradient checkpointing, float32 adapters on all linear layers:

    full fine-tuning  110 GB  2048 tokens; weights and gradients in bfloat16, a float32 master copy
                              and two float32 moments: 16 bytes per parameter
    LoRA, r = 16       17 GB  4096 tokens; 13.5 GB are frozen weights
    QLoRA, r = 16       6 GB  2048 tokens; 3.3 GB are NF4, 0.5 GB the embeddings in bfloat16
"""

from .memory import plan
from .memory_plan import MemoryPlan
from .settings import Settings

__all__ = ["MemoryPlan", "Settings", "plan"]
