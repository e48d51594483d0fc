"""The options that commands share, one alias each; their defaults are those of TrainConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_fast.training import config
from lora_fast.training.methods import METHODS

DATA = "Model and data"
ADAPTER = "Adapter"
TRAINING = "Training"
RUN = "Run"

Model = Annotated[
    str,
    typer.Option(
        metavar="PATH|HUB_ID",
        help="Base model. builtin: all-MiniLM-L6-v2, 22M parameters, as installed.",
        rich_help_panel=DATA,
    ),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="FILE.jsonl|builtin",
        help="Lines with text, label and optionally text_pair; for causal-lm text, or messages "
        "and optionally tools. builtin: does this docstring describe this function?",
        rich_help_panel=DATA,
    ),
]
EvalData = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="Held-out examples, else a tenth of --data: lines with the same text stay on one "
        "side.",
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
        help="What is learned of messages: the assistant's turns, or all of them.",
        rich_help_panel=DATA,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help=f"Tokens kept of an example: {config.BUILTIN_MAX_LENGTH} builtin, "
        f"{config.MAX_LENGTH['classification']} classification, "
        f"{config.MAX_LENGTH['causal-lm']} causal-lm.",
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
        help=f"What trains: {', '.join(METHODS)}. A method takes the options that mean something "
        "to it, and refuses the others.",
        rich_help_panel=ADAPTER,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option("--r", help="Rank of the update: 16, vera 256.", rich_help_panel=ADAPTER),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="The update is scaled by alpha / r: 32; rslora by alpha / sqrt(r): 16.",
        rich_help_panel=ADAPTER,
    ),
]
Dropout = Annotated[
    float | None,
    typer.Option(help="Dropout on the input of the adapter: 0.", rich_help_panel=ADAPTER),
]
TargetModules = Annotated[
    str | None,
    typer.Option(
        metavar="all-linear|NAME,NAME",
        help="Linear layers to adapt: all-linear; ia3 those of its paper.",
        rich_help_panel=ADAPTER,
    ),
]
LrRatio = Annotated[
    float | None,
    typer.Option(help="lora-plus: learning rate of B over that of A: 16.", rich_help_panel=ADAPTER),
]
DeltaScale = Annotated[
    float | None,
    typer.Option(
        help="delta-lora: W moves by this times the change of the update: 2.",
        rich_help_panel=ADAPTER,
    ),
]
DeltaStart = Annotated[
    int | None,
    typer.Option(
        help="delta-lora: steps before W begins to move: a tenth of all.", rich_help_panel=ADAPTER
    ),
]
Frequencies = Annotated[
    int | None,
    typer.Option(help="fourierft: coefficients a layer: 1000.", rich_help_panel=ADAPTER),
]
VirtualTokens = Annotated[
    int | None,
    typer.Option(help="prompt, prefix: tokens put in front: 20.", rich_help_panel=ADAPTER),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Peak of the schedule; else by method and model size: lora 5e-4 to 1e-4.",
        rich_help_panel=TRAINING,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        help=f"Optimizer steps: {config.BUILTIN_STEPS} builtin.", rich_help_panel=TRAINING
    ),
]
Epochs = Annotated[
    float | None,
    typer.Option(
        help=f"Or passes over --data: {config.EPOCHS['classification']:g}, "
        f"causal-lm {config.EPOCHS['causal-lm']:g}.",
        rich_help_panel=TRAINING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help=f"Examples per batch: {config.BATCH_SIZE['classification']}, "
        f"causal-lm {config.BATCH_SIZE['causal-lm']}.",
        rich_help_panel=TRAINING,
    ),
]
GradAccum = Annotated[int, typer.Option(help="Batches per step.", rich_help_panel=TRAINING)]
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
        help="One of transformers' optimizers: adamw_torch; on a GPU also paged_adamw_32bit, "
        "paged_adamw_8bit.",
        rich_help_panel=TRAINING,
    ),
]
Schedule = Annotated[
    str,
    typer.Option(
        metavar="|".join(config.SCHEDULES),
        help="Course of the learning rate after the warm-up.",
        rich_help_panel=TRAINING,
    ),
]
Warmup = Annotated[
    float, typer.Option(help="Share of the steps that warm up.", rich_help_panel=TRAINING)
]
EarlyStopping = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Stop when the loss on a tenth of --data, held back, has not fallen for N "
        "checkpoints, and go back to the best.",
        rich_help_panel=TRAINING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="auto|float32|bfloat16|float16",
        help="Compute type; auto: bfloat16 on a GPU, float32 on the CPU.",
        rich_help_panel=TRAINING,
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,NAME",
        help=f"Which to compare, of {', '.join(METHODS)}: all.",
        rich_help_panel=ADAPTER,
    ),
]
CompareSteps = Annotated[
    int | None,
    typer.Option(help="Optimizer steps of a method: 60 builtin.", rich_help_panel=TRAINING),
]
CompareOut = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Takes compare.json, compare.md and compare.png; else the next runs/N.",
        rich_help_panel=RUN,
    ),
]
Seeds = Annotated[
    int,
    typer.Option(help="Runs of each method, from --seed upwards.", rich_help_panel=TRAINING),
]
Seed = Annotated[
    int, typer.Option(help="Of split, order, initial weights.", rich_help_panel=TRAINING)
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Train stock PEFT as well: same order, seeds and initial weights, side by side.",
        rich_help_panel=RUN,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Takes what trained, metrics.json, pictures and checkpoints; else the next runs/N.",
        rich_help_panel=RUN,
    ),
]
SaveEvery = Annotated[
    int | None,
    typer.Option(help="Steps between checkpoints; else a fifth of all.", rich_help_panel=RUN),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the run in --out, else the latest runs/N, with its own options.",
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
