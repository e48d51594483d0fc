"""What a run leaves in its folder: the adapter, its card, ``metrics.json`` and ``loss.png``."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from lora_fast import Report

from .experiment import Experiment

METRICS_FILE = "metrics.json"
REPORT_FILE = "layers.txt"
PLOT_FILE = "loss.png"
CARD_FILE = "README.md"

STOCK_COLOUR = "#b0413e"
OUR_COLOUR = "#1f5fa8"


def save_artefacts(
    out: Path,
    setting: Experiment,
    summary: dict[str, Any],
    curves: dict[str, list[float]],
    layers: Report,
) -> None:
    """Write the adapter and tokenizer, the card, the layer report, the plot and the metrics.

    ``metrics.json`` comes last and in one piece: where it is, the rest is complete.

    Raises:
        OSError: ``out`` cannot be written.
    """
    setting.model.save_pretrained(out, save_embedding_layers=False)
    setting.base.tokenizer.save_pretrained(out)
    (out / CARD_FILE).write_text(model_card(setting, summary, out), encoding="utf-8")
    (out / REPORT_FILE).write_text(f"{layers}\n", encoding="utf-8")
    plot_losses(curves, out / PLOT_FILE)
    partial = out / f"{METRICS_FILE}.partial"
    partial.write_text(json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")
    os.replace(partial, out / METRICS_FILE)


def finite(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plot_losses(curves: dict[str, list[float]], path: Path) -> None:
    """Draw training loss over steps: each step faint, a running mean on top of it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    if "lora_fast" in curves:
        losses = curves["lora_fast"]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=OUR_COLOUR, alpha=0.25, linewidth=1)
        # Beside another curve: wide and light enough to be seen below it.
        width, alpha = (5.0, 0.45) if "stock" in curves else (1.8, 1.0)
        means = running_mean(losses)
        axes.plot(steps, means, OUR_COLOUR, linewidth=width, alpha=alpha, label="lora_fast")
    if "stock" in curves:
        losses = running_mean(curves["stock"])
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses, color=STOCK_COLOUR, linestyle="--", label="stock PEFT")
    axes.set(xlabel="optimizer step", ylabel="training loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def running_mean(values: list[float]) -> list[float]:
    """Return the mean of the last tenth of the curve (at most 20 values) at every step."""
    window = max(1, min(20, len(values) // 10))
    means = []
    for end in range(1, len(values) + 1):
        chosen = values[max(0, end - window) : end]
        means.append(sum(chosen) / len(chosen))
    return means


def model_card(setting: Experiment, summary: dict[str, Any], out: Path) -> str:
    """Return the adapter's README: what it is, its scores, and code that loads it."""
    config, base = setting.config, setting.base
    scores = summary["results"]["lora_fast"]["held_out"]
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items())
    return f"""---
base_model: {base.name}
library_name: peft
tags: [lora, lora_fast]
---

# LoRA adapter for {base.title}

Task: {config.task}. Data: {config.data}. r = {config.r}, alpha = {config.alpha:g}, \
{"NF4" if base.quantized else "unquantised"} base, \
{len(summary["results"]["lora_fast"]["losses"])} steps.

| held-out | |
|---|---|
{table}

## Load

```python
{loading_code(setting, out)}
```
"""


def loading_code(setting: Experiment, out: Path) -> str:
    """Return Python that loads base model and adapter with transformers and PEFT alone."""
    config, base = setting.config, setting.base
    kind = "SequenceClassification" if config.task == "classification" else "CausalLM"
    options = [f"dtype={base.dtype}"]
    imports = f"AutoModelFor{kind}"
    if config.task == "classification":
        options.insert(0, f"num_labels={len(setting.rows.labels)}")
    if base.quantized:
        imports += ", BitsAndBytesConfig"
        skipped = f"\n        llm_int8_skip_modules={base.skipped}," if base.skipped else ""
        options.append(f"""quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype={base.dtype},{skipped}
    )""")
    arguments = ",\n    ".join(options)
    return f"""import torch
from peft import PeftModel
from transformers import {imports}

base = AutoModelFor{kind}.from_pretrained(
    {base.name!r},
    {arguments},
)
model = PeftModel.from_pretrained(base, {str(out)!r}).eval()"""
