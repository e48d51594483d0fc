"""The steps of a GPU day, most valuable first: a GPU for ten minutes runs the top of the list.

A step is a list of units, which ``source`` ("module:function" in this package) makes in the step's
own process. A unit that fails loses only its own result.
"""

from __future__ import annotations

from dataclasses import dataclass

# The environment variable of a rehearsal that compiles the kernels and runs none: 90 for sm_90.
STUB_ARCH = "LORA_FAST_STUB_ARCH"


@dataclass(frozen=True)
class Step:
    """``limit``: seconds for the whole step; ``unit_limit``: for one unit, start-up included."""

    name: str
    source: str
    limit: float
    unit_limit: float
    shows: str


STEPS = (
    Step("decisive", "decisive:units", 300, 120, "e of each route and tile, strips, host time"),
    Step("first_tests", "commands:first_gpu_tests", 240, 120, "streams, graphs, a small Llama"),
    Step("layers", "decoder_layers:long", 1200, 300, "whole decoder layers, 8192 tokens"),
    Step("candidates", "plans:units", 900, 150, "every route and configuration"),
    Step("ceilings", "ceilings:units", 120, 90, "what the device reaches in a product and a copy"),
    Step("shorter_layers", "decoder_layers:short", 900, 300, "decoder layers, 512 and 2048 tokens"),
    Step("tests", "commands:gpu_tests", 900, 900, "the suite's tests that need a GPU"),
    Step("accuracy", "accuracy:units", 600, 150, "errors against float64, beside eager PyTorch's"),
    Step("linears", "linears:sweep", 900, 150, "adapted linears of many sizes"),
    Step("crossover", "linears:crossover", 600, 120, "NF4 decoded before or inside the product"),
    Step(
        "operations", "operations:units", 600, 120, "groups, DoRA, VeRA, decoding, norms, merging"
    ),
    Step("experts", "blocks_of_experts:units", 900, 200, "blocks of experts, dense and NF4"),
    Step("inference", "linears:inference", 600, 120, "1 to 64 rows without gradients"),
    Step("sanitizer", "commands:sanitizer", 900, 300, "compute-sanitizer over one step"),
    Step("profile", "commands:profile", 600, 300, "ncu: bytes that the kernels really move"),
    Step("training", "commands:training", 600, 600, "a fine-tuning run beside stock PEFT's"),
    Step("suite", "commands:cpu_tests", 1800, 1800, "the rest of the suite, on this machine"),
)
