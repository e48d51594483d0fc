"""The base model, its tokenizer, NF4 and the adapter.

Quantisation goes through transformers' ``BitsAndBytesConfig`` on CPU and GPU alike, so that an
adapter trained here fits the model that anyone loads with the same configuration.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..errors import TrainingError, first_line
from ..experts.loading import packing_on_load
from ..experts.quantisation import expert_modules, quantize_experts
from ..experts.storage import packed_parameters
from ..files.model_source import BUILTIN, cached_folder, check_hub, is_offline, resolve_model
from ..four_bit import is_four_bit
from ..four_bit.layout import forbid_packing
from ..methods.base_model import Base
from ..methods.table import method_of
from ..methods.targets import CLASSIFICATION_HEADS
from ..optional_packages import needed
from .config import TrainConfig, absolute


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, with a padding token.

    Raises TrainingError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # unreadable files surface as many kinds of error
        raise TrainingError(f"cannot load the tokenizer of {name}: {first_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Without these files transformers may build a tokenizer with an empty vocabulary.
        raise TrainingError(f"cannot load the tokenizer of {name}: it has no vocabulary")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise TrainingError(
                f"the tokenizer of {name} must have a padding or end token, got none"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: TrainConfig, labels: list[str]) -> Base:
    """Load the base model in the run's dtype, on the GPU if there is one, in NF4 if asked to.

    Raises TrainingError: it cannot be loaded, or has no linear layers to quantise;
    MissingPackageError: it is to be quantised, and bitsandbytes is not installed.
    """
    name = resolve_model(config.model)
    _check_readable(name)
    tokenizer = load_tokenizer(name)
    device, dtype = choose_device_and_dtype(config.dtype)
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": str(device)}}
    skipped: list[str] | None = None
    if config.model == BUILTIN:
        options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if config.task == "classification":
        ids = dict(enumerate(labels))
        options |= {"id2label": ids, "label2id": {v: k for k, v in ids.items()}}
        options |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
        skipped = list(CLASSIFICATION_HEADS)
    quantize = config.quantize == "nf4"
    if quantize:
        needed("bitsandbytes", "--quantize nf4")
    model, new_modules = _load(name, config, options, skipped if quantize else None)
    if quantize and any(is_four_bit(model.get_submodule(module)) for module in new_modules):
        # Random weights must not be quantised: the checkpoint does not hold them.
        skipped = [*(skipped or _output_layer(model)), *new_modules]
        model, new_modules = _load(name, config, options, skipped)
    if quantize and not any(map(is_four_bit, model.modules())):
        raise TrainingError(f"--quantize nf4: {name} has no linear layers to quantise")
    if quantize:
        _quantise_experts(name, model)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    left = skipped if quantize else None
    return Base(absolute(name), model, tokenizer, dtype, device, left, new_modules)


def quantization_config(dtype: torch.dtype, skipped: list[str] | None) -> Any:
    """NF4 with double quantisation, as in QLoRA; ``skipped`` modules stay as they are."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,
    )


def choose_device_and_dtype(name: str) -> tuple[torch.device, torch.dtype]:
    """The GPU and its best 16-bit type, or the CPU and float32; ``name`` overrides."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        automatic = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    else:
        device, automatic = torch.device("cpu"), torch.float32
    if name == "float16" and device.type == "cpu":
        raise TrainingError("--dtype float16 needs a GPU; on the CPU use float32 or bfloat16")
    return device, automatic if name == "auto" else getattr(torch, name)


def position_limit(base: Base) -> int:
    """How many tokens the model and its tokenizer accept."""
    positions = getattr(base.model.config, "max_position_embeddings", None) or 2**31
    return int(min(positions, base.tokenizer.model_max_length))


def add_adapter(base: Base, config: TrainConfig, steps: int) -> Any:
    """The model that trains, by the method of the run; all that trains is float32.

    Raises TrainingError: the method or ``--target-modules`` does not fit this model.
    """
    return method_of(config).build(base, config, steps)


def base_parameters(model: Any) -> int:
    """The parameters of a model; bitsandbytes packs two in a byte."""
    packed = {
        id(module._parameters[name])
        for module in model.modules()
        for name in packed_parameters(module)
    }
    return sum(
        p.numel() * (2 if hasattr(p, "quant_state") or id(p) in packed else 1)
        for p in model.parameters()
    )


def parameter_counts(model: Any) -> tuple[int, int]:
    """(trainable, all) parameters; one in 4 bits counts as one."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad), base_parameters(model)


def _quantise_experts(name: str, model: Any) -> None:
    """Quantise the experts that were not in the checkpoint, or are in its 16 bits."""
    if next(expert_modules(model), None) is None:
        return
    try:
        quantize_experts(model)
    except ValueError as error:
        raise TrainingError(f"--quantize nf4: cannot quantise {name}: {error}") from error


def _check_readable(name: str) -> None:
    from transformers import AutoConfig

    if Path(name).is_file():
        raise TrainingError(f"--model must be a folder or a hub id, got the file {name}")
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise TrainingError(f"--model {name} cannot be loaded: no such folder")
    if cached_folder(name) is None and is_offline():
        raise TrainingError(
            f"--model {name} cannot be loaded: neither a folder nor in the hub's cache, and "
            "Hugging Face is offline (HF_HUB_OFFLINE)"
        )
    try:
        check_hub(name)
        AutoConfig.from_pretrained(name)
    except Exception as error:  # unreadable files surface as many kinds of error
        raise TrainingError(f"--model {name} cannot be loaded: {first_line(error)}") from error


def _load(
    name: str, config: TrainConfig, options: dict[str, Any], skipped: list[str] | None
) -> tuple[Any, list[str]]:
    import transformers

    kinds = {"classification": "SequenceClassification", "causal-lm": "CausalLM"}
    auto = getattr(transformers, f"AutoModelFor{kinds[config.task]}")
    if config.quantize == "nf4":
        options = {**options, "quantization_config": quantization_config(options["dtype"], skipped)}
    torch.manual_seed(config.seed)
    try:
        with packing_on_load() if config.quantize == "nf4" else nullcontext():
            model, info = auto.from_pretrained(absolute(name), output_loading_info=True, **options)
    except Exception as error:  # unreadable files surface as many kinds of error
        raise TrainingError(f"--model {name} cannot be loaded: {first_line(error)}") from error
    forbid_packing(model)
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    missing = {key.rpartition(".")[0] for key in [*info["missing_keys"], *mismatched]}
    return model, sorted(missing - {"", *CLASSIFICATION_HEADS})


def _output_layer(model: Any) -> list[str]:
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if output is module]
