"""What a LoRA step costs, counted and modelled without a GPU: ``python -m bench.offline``."""
