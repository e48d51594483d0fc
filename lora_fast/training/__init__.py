"""Fine-tuning runs: data, models, metrics and artefacts behind ``lora-fast train``."""
