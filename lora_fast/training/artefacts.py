"""The files that a run writes: trained weights, the card, ``metrics.json`` and pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import Report
from ..files.json_files import write_json
from ..methods.table import method_of
from .encoding import describe_examples
from .experiment import Experiment
from .folder import METRICS_FILE, RunFolder
from .plots import plot_losses, plot_ranks
from .summary import method_options, picture_title
from .trainer import Arm
from .weights import base_weights, save_weights, trained, unwrapped

REPORT_FILE = "layers.txt"
PLOT_FILE = "loss.png"
RANK_FILE = "effective_rank.png"
CARD_FILE = "README.md"
WEIGHTS_FILE = "weights.safetensors"


def save_artefacts(
    folder: RunFolder,
    setting: Experiment,
    summary: dict[str, Any],
    arms: dict[str, Arm],
    layers: Report,
) -> None:
    """Write the trained weights, the tokenizer, the card, the layer report, pictures and metrics.

    The adapter is in PEFT's format if PEFT has the method. ``weights.safetensors`` holds trained
    parameters of the base itself (BitFit, linear probe), or the frozen weights that Delta-LoRA
    moved: the weights themselves, not their change, since a 16-bit or NF4 weight is rounded at
    every step. ``metrics.json`` is written last and atomically: if it exists, the rest is complete.

    Raises TrainingError: a file that the run has not written is in the way; OSError: the folder
    cannot be written.
    """
    out = Path(os.path.abspath(folder.path))
    with folder.publishing() as place:
        _save_model(place, setting)
        setting.base.tokenizer.save_pretrained(place)
        card = model_card(setting, summary, arms["lora_fast"], out)
        (place / CARD_FILE).write_text(card, encoding="utf-8")
        (place / REPORT_FILE).write_text(f"{layers}\n", encoding="utf-8")
        curves = {name: arm.losses for name, arm in arms.items()}
        title, ours = picture_title(setting), arms["lora_fast"]
        plot_losses(curves, place / PLOT_FILE, title, best_step=ours.best_step)
        if ours.ranks:
            plot_ranks(ours.ranks, setting.config.r or 1, place / RANK_FILE, title)
        write_json(summary, place / METRICS_FILE)


def _save_model(place: Path, setting: Experiment) -> None:
    method = method_of(setting.config)
    if method.peft and hasattr(setting.model, "peft_config"):
        setting.model.save_pretrained(place, save_embedding_layers=False)
    elif method.peft:
        from lora_fast import save_adapter

        files = save_adapter(
            setting.model, place / "adapter", base_model_name_or_path=setting.base.name
        )
        for path in files.iterdir():
            path.rename(place / path.name)
        files.rmdir()
    if method.changes_weights:
        save_weights(unwrapped(base_weights(setting.model)), place / WEIGHTS_FILE)
    elif not method.peft:
        save_weights(trained(setting.model), place / WEIGHTS_FILE)


def model_card(setting: Experiment, summary: dict[str, Any], arm: Arm, out: Path) -> str:
    """The README: what was trained, its scores, and the code that loads it."""
    config, base, method = setting.config, setting.base, method_of(setting.config)
    scores = summary["results"]["lora_fast"]["held_out"]
    resumed = "".join(
        f"\n\nResumed at step {stage['step']} with another {' and '.join(stage['changed'])}."
        for stage in summary["resumed"]
    )
    table = "\n".join(f"| {name} | {value:.4f} |" for name, value in scores.items())
    data = describe_examples(summary["examples"])
    options = "".join(f"{name} = {value}, " for name, value in method_options(config).items())
    return f"""---
base_model: {base.name}
library_name: {"peft" if method.peft else "transformers"}
tags: [{config.method}, lora_fast]
---

# {method.title} for {base.title}

Task: {config.task}. Data: {config.located().data}: {data}.

{options}{"NF4" if base.quantized else "unquantised"} base, {arm.course()}.{resumed}

| held-out | |
|---|---|
{table}

## Load and predict

```python
{loading_code(setting, out)}
```
"""


def loading_code(setting: Experiment, out: Path) -> str:
    """Python that loads the base model and what was trained, and predicts with it.

    transformers and PEFT suffice, except for ``weights.safetensors``, which may hold NF4.
    """
    config, base, method = setting.config, setting.base, method_of(setting.config)
    kind = "SequenceClassification" if config.task == "classification" else "CausalLM"
    options = [f"dtype={base.dtype}"]
    imports = f"AutoModelFor{kind}, AutoTokenizer"
    if config.task == "classification":
        names = dict(enumerate(setting.rows.labels))
        options.insert(0, f"num_labels={len(names)}")
        options.insert(1, f"id2label={names}")
        options.insert(2, f"label2id={ {name: i for i, name in names.items()} }")
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
    weights = method.changes_weights or not method.peft
    lines = ["import torch"]
    lines += ["from peft import PeftModel"] if method.peft else []
    lines += [f"from transformers import {imports}"]
    lines += ["", "from lora_fast.training.weights import load_weights"] if weights else []
    lines += [
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})",
        f"model = AutoModelFor{kind}.from_pretrained(",
        f"    {base.name!r},",
        f"    {arguments},",
        ")",
        "model.config.pad_token_id = tokenizer.pad_token_id",
    ]
    lines += [f"load_weights(model, {str(out / WEIGHTS_FILE)!r})"] if weights else []
    lines += [f"model = PeftModel.from_pretrained(model, {str(out)!r})"] if method.peft else []
    predicting = _classifying if config.task == "classification" else _generating
    return "\n".join([*lines, "model.eval()", "", *predicting(setting)])


def _classifying(setting: Experiment) -> list[str]:
    rows = [*setting.rows.train, *setting.rows.held_out]
    texts = 'texts = ["A text.", "Another one, which is longer."]'
    given = "texts"
    if any("text_pair" in row for row in rows):
        texts += '\npairs = ["What goes with it.", "What goes with the other."]'
        given = "texts, pairs"
    return [
        texts,
        f"batch = tokenizer({given}, padding=True, truncation=True, "
        f"max_length={setting.config.max_length}, return_tensors='pt')",
        "with torch.no_grad():",
        "    logits = model(**batch.to(model.device)).logits",
        "predicted = [model.config.id2label[i] for i in logits.argmax(-1).tolist()]",
        "print(predicted)",
    ]


def _generating(setting: Experiment) -> list[str]:
    rows = [*setting.rows.train, *setting.rows.held_out]
    lines = ['prompt = "A text to go on with"', "batch = tokenizer(prompt, return_tensors='pt')"]
    if any("messages" in row for row in rows):
        lines = [
            'messages = [{"role": "user", "content": "A question?"}]',
            "batch = tokenizer.apply_chat_template(",
            "    messages, add_generation_prompt=True, return_dict=True, return_tensors='pt'",
            ")",
        ]
    return [
        *lines,
        "ids, mask = (batch[name].to(model.device) for name in ('input_ids', 'attention_mask'))",
        "with torch.no_grad():",
        "    found = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=50)",
        "predicted = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)",
        "print(predicted)",
    ]
