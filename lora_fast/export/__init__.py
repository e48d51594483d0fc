"""Writing a base model with an adapter merged into it: ``merge_checkpoint(base, adapter, out)``."""

from .merged_model import merge_checkpoint

__all__ = ["merge_checkpoint"]
