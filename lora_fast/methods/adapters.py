"""The model that trains, for each method: PEFT around the base, or the base with a part unfrozen.

What trains is float32 whatever the base's dtype, so the optimizer needs no separate master copy.
For classification the head trains with every method.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError, first_line
from .base_model import Base
from .options import MethodOptions
from .targets import (
    CLASSIFICATION_HEADS,
    about_adapted_experts,
    adapts_all_linear,
    expert_parameters_of,
    release_routers,
    targets,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ..modules.adapter_module import AdapterModule

# AdaLoRA starts with half as many directions again (Zhang et al. 2023, section 4) and has reached
# its budget when a fifth of the steps is left.
ADALORA_SPARE = 0.5
ADALORA_WARMUP, ADALORA_FINAL = 0.1, 0.2
ADALORA_ORTHOGONALITY = 0.1
FOURIER_SCALING = 150.0


def lora(base: Base, config: MethodOptions, steps: int, **options: Any) -> Any:
    """LoRA (Hu et al. 2021) around the base."""
    from peft import LoraConfig

    return _wrap(base, config, LoraConfig, **_lora_options(base, config), **options)


def rslora(base: Base, config: MethodOptions, steps: int) -> Any:
    """LoRA with the scaling alpha / sqrt(r) (Kalajdzievski 2023)."""
    return lora(base, config, steps, use_rslora=True)


def dora(base: Base, config: MethodOptions, steps: int) -> Any:
    """Weight-decomposed LoRA (Liu et al. 2024)."""
    return lora(base, config, steps, use_dora=True)


def lora_fa(base: Base, config: MethodOptions, steps: int) -> Any:
    """LoRA whose A is frozen (Zhang et al. 2023, LoRA-FA)."""
    model = lora(base, config, steps)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def vera(base: Base, config: MethodOptions, steps: int) -> Any:
    """VeRA (Kopiczko et al. 2023): A and B shared and frozen, two vectors a layer train."""
    from peft import VeraConfig

    return _wrap(
        base,
        config,
        VeraConfig,
        r=config.r,
        vera_dropout=config.dropout,
        target_modules=targets(base, config),
        projection_prng_key=config.seed,
    )


def adalora(base: Base, config: MethodOptions, steps: int) -> Any:
    """AdaLoRA (Zhang et al. 2023) with PEFT's rank allocator over ``steps`` steps."""
    from peft import AdaLoraConfig

    options = _lora_options(base, config)
    rank = options.pop("r")
    final = max(1, round(ADALORA_FINAL * steps))
    warmup = min(round(ADALORA_WARMUP * steps), max(0, steps - final - 1))
    if steps - final <= warmup:
        raise TrainingError(f"--method adalora needs --steps of at least 2, got {steps}")
    model = _wrap(
        base,
        config,
        AdaLoraConfig,
        init_r=rank + math.ceil(ADALORA_SPARE * rank),
        target_r=rank,
        tinit=warmup,
        tfinal=final,
        total_step=steps,
        orth_reg_weight=ADALORA_ORTHOGONALITY,
        **options,
    )
    for name, parameter in model.named_parameters():
        if ".ranknum." in name:  # a constant, which PEFT lets train on a 16-bit base
            parameter.requires_grad_(False)
    return model


def ia3(base: Base, config: MethodOptions, steps: int) -> Any:
    """IA3 (Liu et al. 2022): keys, values and the inside of the feed-forward rescaled.

    With ``--target-modules``, the outputs of the layers named are rescaled instead.
    """
    import torch
    from peft import IA3Config

    if base.quantized and base.dtype == torch.bfloat16 and base.device.type == "cpu":
        raise TrainingError(
            "--method ia3 on a CPU needs --dtype float32 or --quantize none: around an NF4 layer, "
            "PEFT turns bfloat16 into float32 there"
        )
    options: dict[str, Any] = {}
    if config.target_modules is not None:
        options = {"target_modules": targets(base, config), "feedforward_modules": []}
    try:
        return _wrap(base, config, IA3Config, **options)
    except TrainingError as error:
        if "specify" not in str(error):
            raise
        kind = base.model.config.model_type
        raise TrainingError(
            f"--method ia3 needs --target-modules: PEFT knows no default for the model type {kind}"
        ) from error


def fourierft(base: Base, config: MethodOptions, steps: int) -> Any:
    """FourierFT (Gao et al. 2024) with a zero spectrum at the start: the base's function.

    The update of W is s·Re(ifft2(F)), whose entries fall with the size of W for the same F; the
    paper's s = 150 is for 768 × 768 and is scaled with the model's width squared.
    """
    from peft import FourierFTConfig

    width = getattr(base.model.config, "hidden_size", 768)
    return _wrap(
        base,
        config,
        FourierFTConfig,
        n_frequency=config.frequencies,
        scaling=FOURIER_SCALING * (width / 768) ** 2,
        init_weights=True,
        random_loc_seed=config.seed,
        target_modules=targets(base, config),
    )


def layernorm(base: Base, config: MethodOptions, steps: int) -> Any:
    """The base with its LayerNorm and RMSNorm layers training (Zhao et al. 2023)."""
    from peft import LNTuningConfig

    from ..trainable import mark_layer_norm

    try:
        names = mark_layer_norm(base.model)
    except ValueError as error:
        raise TrainingError(f"--method layernorm: the {first_line(error)}") from error
    norms = sorted({name.rpartition(".")[0] for name in names})
    return _wrap(base, config, LNTuningConfig, target_modules=norms)


def prompt(base: Base, config: MethodOptions, steps: int) -> Any:
    """Prompt tuning (Lester et al. 2021), initialised with embeddings of random words."""
    from peft import PromptTuningConfig

    if hasattr(base.model, "score"):
        # A decoder's classifier reads the last position and cannot see padding once PEFT has
        # turned the tokens into embeddings: padding must be on the left.
        base.tokenizer.padding_side = "left"
    options = {"prompt_tuning_init": "SAMPLE_VOCAB", "num_virtual_tokens": config.virtual_tokens}
    return _wrap(base, config, PromptTuningConfig, **options)


def prefix(base: Base, config: MethodOptions, steps: int) -> Any:
    """Prefix tuning (Li and Liang 2021) without reparametrisation.

    Raises TrainingError: PEFT cannot hand the prefix to this model, as it says at the first
    forward.
    """
    from peft import PrefixTuningConfig

    model = _wrap(base, config, PrefixTuningConfig, num_virtual_tokens=config.virtual_tokens)
    if config.task == "classification":
        backbone = model.base_model.get_submodule(model.transformer_backbone_name)
        if not any(map(_takes_past_key_values, (model.base_model, backbone))):
            raise TrainingError(
                "--method prefix needs a model that takes past_key_values, which "
                f"{type(backbone).__name__} of the installed transformers does not: use --method "
                "prompt, or an older transformers"
            )
    return model


def _takes_past_key_values(model: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(model.forward).parameters


def bitfit(base: Base, config: MethodOptions, steps: int) -> Any:
    """The base with its biases training (Ben Zaken et al. 2021)."""
    from ..trainable import mark_bitfit

    try:
        mark_bitfit(base.model)
    except ValueError as error:
        raise TrainingError(f"--method bitfit: the {first_line(error)}") from error
    for module in base.model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is not None and weight.dim() == 1 and bias is not None:
            # On a CPU, layer_norm takes a float32 bias beside a float32 weight alone.
            weight.data = weight.data.float()
    return _let_head_train(base)


def probe(base: Base, config: MethodOptions, steps: int) -> Any:
    """The frozen base with its head training."""
    base.model.requires_grad_(False)
    return _let_head_train(base)


def own_layers(
    base: Base, config: MethodOptions, adapt: Callable[[nn.Module], AdapterModule]
) -> Any:
    """The base with layers of lora_fast's own, for methods that PEFT does not have.

    ``adapt`` is what :func:`lora_fast.convert` takes: a function of a linear layer.
    """
    from lora_fast import convert

    heads = [name for name in CLASSIFICATION_HEADS if hasattr(base.model, name)]
    try:
        convert(
            base.model,
            targets(base, config),
            method=adapt,
            modules_to_save=[*heads, *base.new_modules],
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise TrainingError(f"cannot adapt {base.name}: {first_line(error)}") from error
    # Trainer refuses a quantised model unless it believes that an adapter trains.
    base.model._hf_peft_config_loaded = True
    return _in_float32(base.model)


def _lora_options(base: Base, config: MethodOptions) -> dict[str, Any]:
    options = {
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout or 0.0,
        "target_modules": targets(base, config),
    }
    if config.experts:
        options["target_parameters"] = expert_parameters_of(base)
    return options


def _wrap(base: Base, config: MethodOptions, kind: Any, **options: Any) -> Any:
    from peft import get_peft_model

    options["task_type"] = "SEQ_CLS" if config.task == "classification" else "CAUSAL_LM"
    options["modules_to_save"] = base.new_modules or None
    try:
        model = get_peft_model(base.model, kind(**options))
    except (ValueError, TypeError) as error:
        hint = about_adapted_experts(base) if "ParamWrapper" in str(error) else ""
        raise TrainingError(f"cannot adapt {base.name}: {first_line(error)}{hint}") from error
    if adapts_all_linear(config):
        release_routers(model)
    return _in_float32(model)


def _let_head_train(base: Base) -> Any:
    head = [name for name in CLASSIFICATION_HEADS if hasattr(base.model, name)]
    for name in [*head, *base.new_modules]:
        base.model.get_submodule(name).requires_grad_(True)
    # Trainer refuses a quantised model unless it believes that an adapter trains.
    base.model._hf_peft_config_loaded = True
    return _in_float32(base.model)


def _in_float32(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model
