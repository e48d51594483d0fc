"""Options that commands share, one alias each. Their defaults are those of TrainConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..methods.table import METHODS
from ..training import config

DATA = "Model and data"
ADAPTER = "Adapter"
TRAINING = "Training"
RUN = "Run"

Model = Annotated[
    str,
    typer.Option(
        metavar="PATH|HUB_ID",
        help="Base model. builtin: all-MiniLM-L6-v2, 22M parameters, installed with lora-fast.",
        rich_help_panel=DATA,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="FILE.jsonl|builtin",
        help="JSON lines with text, label and optionally text_pair; for causal-lm text, or "
        "messages and optionally tools. builtin: does a docstring describe a function?",
        rich_help_panel=DATA,
    ),
]
EvalData = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Held-out examples (default: a tenth of --data, where lines with the same text stay "
        "on one side).",
        rich_help_panel=DATA,
    ),
]
Task = Annotated[
    str,
    typer.Option(
        metavar="classification|causal-lm", help="What the model learns.", rich_help_panel=DATA
    ),
]
TrainOn = Annotated[
    str,
    typer.Option(
        metavar="assistant|all",
        help="Which messages to train on: the assistant's turns, or all.",
        rich_help_panel=DATA,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help=f"Truncate examples to this many tokens (default {config.BUILTIN_MAX_LENGTH} for "
        f"builtin, {config.MAX_LENGTH['classification']} for classification, "
        f"{config.MAX_LENGTH['causal-lm']} for causal-lm).",
        rich_help_panel=DATA,
    ),
]
Quantize = Annotated[
    str,
    typer.Option(
        metavar="nf4|none", help="nf4: frozen weights in 4 bits (QLoRA).", rich_help_panel=ADAPTER
    ),
]
Method = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help=f"Fine-tuning method: {', '.join(METHODS)}. Options that a method does not use are "
        "refused.",
        rich_help_panel=ADAPTER,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option("--r", help="LoRA rank (default 16; VeRA 256).", rich_help_panel=ADAPTER),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="Scaling numerator, s = alpha / r (default 32; rslora: alpha / sqrt(r), 16).",
        rich_help_panel=ADAPTER,
    ),
]
Dropout = Annotated[
    float | None,
    typer.Option(help="Dropout on the adapter's input (default 0).", rich_help_panel=ADAPTER),
]
TargetModules = Annotated[
    str | None,
    typer.Option(
        metavar="all-linear|NAME,NAME",
        help="Linear layers to adapt (default all-linear; ia3: those of its paper).",
        rich_help_panel=ADAPTER,
    ),
]
LrRatio = Annotated[
    float | None,
    typer.Option(
        help="lora-plus: learning rate of B over A's (default 16).", rich_help_panel=ADAPTER
    ),
]
DeltaScale = Annotated[
    float | None,
    typer.Option(
        help="delta-lora: factor of each step of W (default 2).",
        rich_help_panel=ADAPTER,
    ),
]
DeltaStart = Annotated[
    int | None,
    typer.Option(
        help="delta-lora: steps before W moves (default: a tenth).", rich_help_panel=ADAPTER
    ),
]
Frequencies = Annotated[
    int | None,
    typer.Option(help="fourierft: coefficients per layer (default 1000).", rich_help_panel=ADAPTER),
]
VirtualTokens = Annotated[
    int | None,
    typer.Option(help="prompt, prefix: virtual tokens (default 20).", rich_help_panel=ADAPTER),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Peak learning rate (default by method and model size; lora 1e-4 to 5e-4).",
        rich_help_panel=TRAINING,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help=f"Optimizer steps (builtin: {config.BUILTIN_STEPS}).", rich_help_panel=TRAINING
    ),
]
Epochs = Annotated[
    float | None,
    typer.Option(
        help=f"Or passes over --data (default {config.EPOCHS['classification']:g}; "
        f"causal-lm {config.EPOCHS['causal-lm']:g}).",
        rich_help_panel=TRAINING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help=f"Examples per batch (default {config.BATCH_SIZE['classification']}; "
        f"causal-lm {config.BATCH_SIZE['causal-lm']}).",
        rich_help_panel=TRAINING,
    ),
]
GradAccum = Annotated[
    int, typer.Option(help="Batches per optimizer step.", rich_help_panel=TRAINING)
]
Experts = Annotated[
    bool,
    typer.Option(
        "--experts",
        help="Adapt the experts of a mixture, too.",
        rich_help_panel=ADAPTER,
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Recompute activations in backward: less memory, more time.",
        rich_help_panel=TRAINING,
    ),
]
Optim = Annotated[
    str | None,
    typer.Option(
        help="Optimizer of transformers: adamw_torch; on a GPU also paged_adamw_32bit, "
        "paged_adamw_8bit.",
        rich_help_panel=TRAINING,
    ),
]
Schedule = Annotated[
    str,
    typer.Option(
        metavar="|".join(config.SCHEDULES),
        help="Learning rate schedule after the warm-up.",
        rich_help_panel=TRAINING,
    ),
]
Warmup = Annotated[
    float, typer.Option(help="Fraction of the steps for warm-up.", rich_help_panel=TRAINING)
]
EarlyStopping = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Stop when the loss on a held-out tenth of --data has not fallen for N checkpoints, "
        "and restore the best.",
        rich_help_panel=TRAINING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|float32|bfloat16|float16",
        help="Compute dtype; auto: bfloat16 on a GPU, float32 on the CPU.",
        rich_help_panel=TRAINING,
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME",
        help=f"Methods to compare (default all): {', '.join(METHODS)}.",
        rich_help_panel=ADAPTER,
    ),
]
CompareSteps = Annotated[
    int | None,
    typer.Option(help="Optimizer steps per method (builtin: 60).", rich_help_panel=TRAINING),
]
CompareOut = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder for compare.json, compare.md and compare.png (default: next runs/N).",
        rich_help_panel=RUN,
    ),
]
Seeds = Annotated[
    int,
    typer.Option(
        help="Runs per method, with seeds counting up from --seed.", rich_help_panel=TRAINING
    ),
]
Seed = Annotated[
    int,
    typer.Option(help="Random seed of split, order and initial weights.", rich_help_panel=TRAINING),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Also train stock PEFT, with the same order, seeds and initial weights.",
        rich_help_panel=RUN,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder for weights, metrics.json, pictures and checkpoints (default: next runs/N).",
        rich_help_panel=RUN,
    ),
]
SaveEvery = Annotated[
    int | None,
    typer.Option(help="Steps between checkpoints (default: a fifth).", rich_help_panel=RUN),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the run in --out (default: the latest runs/N) with its own options.",
        rich_help_panel=RUN,
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run in --out.", rich_help_panel=RUN)
]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks and library warnings.", rich_help_panel=RUN),
]
