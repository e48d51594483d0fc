"""Every method of ``--method``: what it is, which options it takes, and how it is built.

A method is a row of ``METHODS``. Its ``options`` are the command line options that it uses, with
their defaults; any other of ``METHOD_OPTIONS`` is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

from ..errors import TrainingError
from . import adapters, optimizers
from .base_model import Base
from .options import METHOD_OPTIONS, MethodOptions

HEAD_RATE = 1e-3

Options = TypeVar("Options", bound=MethodOptions)
Build = Callable[[Base, MethodOptions, int], Any]
Optimize = Callable[[Any, Any, MethodOptions, int, float | None], Any]


@dataclass(frozen=True)
class Method:
    """One method.

    ``rates`` are peak learning rates for base models below 1B, below 20B and from 20B parameters;
    ``source`` says where they come from. ``head_rate`` bounds the rate of a classification head
    if the method's own rate would be too high for it. ``build`` returns the model that trains,
    given the base, the options and the number of steps; ``optimize`` its optimizer.
    ``fused``: :func:`lora_fast.accelerate` covers its layers.
    ``peft``: PEFT's own format holds what it trains. ``changes_weights``: it moves the weights
    below the adapter, too. ``allocates_rank``: PEFT's allocator takes part in every step.
    ``refused`` says why the method does not take an option that others take.
    """

    title: str
    rates: tuple[float, float, float]
    source: str
    build: Build
    options: Mapping[str, Any]
    optimize: Optimize = optimizers.plain
    head_rate: float | None = None
    fused: bool = False
    peft: bool = True
    changes_weights: bool = False
    allocates_rank: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)

    def learning_rate(self, parameters: int) -> float:
        """The peak learning rate for a base model of that many parameters."""
        small, middle, large = self.rates
        if parameters < 1e9:
            return small
        return middle if parameters < 20e9 else large


def method_of(options: MethodOptions) -> Method:
    """The method of a run."""
    return METHODS[options.method]


def check_options(options: MethodOptions) -> None:
    """Check that the method takes every option that was given.

    Raises TrainingError: it does not take one of them.
    """
    method = method_of(options)
    for name in METHOD_OPTIONS:
        if getattr(options, name) is None or name in method.options:
            continue
        option = "--" + name.replace("_", "-")
        why = method.refused.get(name)
        raise TrainingError(
            f"--method {options.method} takes no {option}" + (f": {why}" if why else "")
        )
    if options.task == "causal-lm" and options.method == "probe":
        raise TrainingError("--method probe needs --task classification: it trains the head alone")
    if options.experts and options.method not in WITH_EXPERTS:
        raise TrainingError(
            f"--method {options.method} takes no --experts: PEFT adapts parameters with "
            f"{', '.join(WITH_EXPERTS)} alone"
        )
    if options.experts and options.dropout:
        raise TrainingError(
            f"--experts needs --dropout 0, got {options.dropout}: x is not dropped before a weight "
            "that is a parameter"
        )
    if options.gradient_checkpointing and options.method == "prefix":
        raise TrainingError(
            "--method prefix cannot have --gradient-checkpointing: it needs a cache"
        )


def completed(options: Options, parameters: int) -> Options:
    """The options with the method's defaults for what is None, the learning rate for a base model
    of `parameters`."""
    method = method_of(options)
    absent = {name: v for name, v in method.options.items() if getattr(options, name) is None}
    return replace(options, lr=options.lr or method.learning_rate(parameters), **absent)


def _options(**changed: Any) -> Mapping[str, Any]:
    """The options of a method of the LoRA family, with their defaults."""
    family = {
        "r": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "optim": "adamw_torch",
    }
    return MappingProxyType({k: v for k, v in {**family, **changed}.items() if v is not _ABSENT})


# Methods whose adapters PEFT puts on parameters.
WITH_EXPERTS = ("lora", "rslora", "lora-fa", "lora-plus")
_ABSENT = object()
_PLAIN = MappingProxyType({"optim": "adamw_torch"})
_LORA_RATES = (5e-4, 2e-4, 1e-4)
_LORA_SOURCE = "4e-4 to 5e-4: LoRA, table 9 (RoBERTa base); 2e-4, 1e-4: QLoRA, table 9"

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "lora": Method(
            title="LoRA",
            rates=_LORA_RATES,
            source=_LORA_SOURCE,
            build=adapters.lora,
            options=_options(),
            fused=True,
        ),
        "rslora": Method(
            title="rsLoRA",
            rates=_LORA_RATES,
            source="as LoRA; alpha / sqrt(r) is 4 at alpha 16 and r 16, where LoRA's scaling is 2",
            build=adapters.rslora,
            options=_options(alpha=16.0),
            fused=True,
        ),
        "lora-fa": Method(
            title="LoRA-FA",
            rates=_LORA_RATES,
            source="as LoRA",
            build=adapters.lora_fa,
            options=_options(optim=_ABSENT),
            optimize=optimizers.lora_fa,
            fused=True,
            refused={"optim": "PEFT's LoRA-FA optimizer is AdamW with a projected gradient of B"},
        ),
        "lora-plus": Method(
            title="LoRA+",
            rates=(1e-4, 5e-5, 2e-5),
            source="of A; B learns lr-ratio times as fast, 16 as LoRA+ recommends (section 5)",
            build=adapters.lora,
            options=_options(lr_ratio=16.0),
            optimize=optimizers.lora_plus,
            head_rate=HEAD_RATE,
            fused=True,
        ),
        "vera": Method(
            title="VeRA",
            rates=(4e-3, 4e-3, 4e-3),
            source="ten times LoRA's, as for Llama in VeRA (appendix)",
            build=adapters.vera,
            options=_options(r=256, alpha=_ABSENT),
            head_rate=HEAD_RATE,
            fused=True,
            refused={"alpha": "its vectors learn the scale"},
        ),
        "dora": Method(
            title="DoRA",
            rates=_LORA_RATES,
            source="as LoRA; 1e-4 to 2e-4 for LLaMA in DoRA (appendix)",
            build=adapters.dora,
            options=_options(),
            fused=True,
        ),
        "delta-lora": Method(
            title="Delta-LoRA",
            rates=(2e-4, 1e-4, 5e-5),
            source="LoRA's, less since W moves delta-scale times as far as B A does",
            build=adapters.lora,
            options=_options(dropout=_ABSENT, delta_scale=2.0, delta_start=None),
            optimize=optimizers.delta_lora,
            fused=True,
            changes_weights=True,
            refused={
                "dropout": "W follows B A, which dropout would make differ from the forward's"
            },
        ),
        "adalora": Method(
            title="AdaLoRA",
            rates=(1e-3, 5e-4, 2e-4),
            source="5e-4 to 2.2e-3 for DeBERTaV3 base in AdaLoRA (appendix)",
            build=adapters.adalora,
            options=_options(),
            fused=True,
            allocates_rank=True,
        ),
        "ia3": Method(
            title="IA3",
            rates=(3e-3, 3e-3, 3e-3),
            source="T-Few (Liu et al. 2022, section 3)",
            build=adapters.ia3,
            options=MappingProxyType({**_PLAIN, "target_modules": None}),
            head_rate=HEAD_RATE,
            fused=True,
        ),
        "bitfit": Method(
            title="BitFit",
            rates=(1e-3, 4e-4, 4e-4),
            source="1e-4 to 1e-3 for BERT in BitFit (appendix)",
            build=adapters.bitfit,
            options=_PLAIN,
            peft=False,
        ),
        "layernorm": Method(
            title="LayerNorm",
            rates=(1e-3, 4e-4, 4e-4),
            source="as BitFit",
            build=adapters.layernorm,
            options=_PLAIN,
        ),
        "fourierft": Method(
            title="FourierFT",
            rates=(5e-2, 1e-2, 1e-2),
            source="5e-2 (MRPC) to 1.2e-1 (CoLA) for RoBERTa base: the authors' scripts",
            build=adapters.fourierft,
            options=MappingProxyType(
                {**_PLAIN, "target_modules": "all-linear", "frequencies": 1000}
            ),
            head_rate=HEAD_RATE,
        ),
        "prompt": Method(
            title="prompt tuning",
            rates=(3e-2, 3e-2, 3e-2),
            source="PEFT's guide to prompt tuning",
            build=adapters.prompt,
            options=MappingProxyType({**_PLAIN, "virtual_tokens": 20}),
            head_rate=HEAD_RATE,
        ),
        "prefix": Method(
            title="prefix tuning",
            rates=(1e-2, 1e-2, 1e-2),
            source="PEFT's guide to prefix tuning",
            build=adapters.prefix,
            options=MappingProxyType({**_PLAIN, "virtual_tokens": 20}),
            head_rate=HEAD_RATE,
        ),
        "probe": Method(
            title="linear probe",
            rates=(1e-3, 1e-3, 1e-3),
            source="common practice for a head on frozen features",
            build=adapters.probe,
            options=_PLAIN,
            peft=False,
        ),
    }
)
