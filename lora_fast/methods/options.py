"""The options by which a method turns a base model into one that trains."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("classification", "causal-lm")
QUANTIZERS = ("nf4", "none")
BATCH_SIZE = {"classification": 32, "causal-lm": 8}
MAX_LENGTH = {"classification": 256, "causal-lm": 1024}
# Each method takes some of these, with defaults of its own.
METHOD_OPTIONS = (
    "r",
    "alpha",
    "dropout",
    "target_modules",
    "optim",
    "lr_ratio",
    "delta_scale",
    "delta_start",
    "frequencies",
    "virtual_tokens",
)


@dataclass(frozen=True)
class MethodOptions:
    """One method on one task. None: the method's default, if it uses the option.

    `r`, `alpha`: rank and numerator of the scaling. `dropout`: on the input of the adapters.
    `target_modules`: the layers to adapt, as PEFT takes them, comma-separated. `lr_ratio`: lr(B)
    over lr(A) of LoRA+. `delta_scale`, `delta_start`: c and the first step of Delta-LoRA.
    `frequencies`: of FourierFT. `virtual_tokens`: of prompt and prefix tuning. `lr`: peak learning
    rate. `optim`: as transformers' TrainingArguments take it. `experts`: adapters on the experts of
    a mixture, too. `seed`: of VeRA's and FourierFT's frozen random matrices.
    """

    task: str = "classification"
    method: str = "lora"
    quantize: str = "nf4"
    r: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    target_modules: str | None = None
    lr_ratio: float | None = None
    delta_scale: float | None = None
    delta_start: int | None = None
    frequencies: int | None = None
    virtual_tokens: int | None = None
    lr: float | None = None
    optim: str | None = None
    experts: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
