"""Models without weights: every module, name, shape and dtype, but no memory.

A skeleton is built by transformers from a config, on the meta device. :func:`imagined` turns it
into one of fake CPU tensors, on which whole forward passes run without computing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .experts.storage import states_of, unpack_parameters
from .four_bit.layout import plain_state
from .optional_packages import needed

# In the order in which a model's own class is searched; tasks name one of them.
AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "features": "AutoModel",
}


def load_config(name: str | Path) -> Any:
    """The transformers config of a folder, a ``config.json`` or a hub id.

    A hub id is looked up in the local cache first, then downloaded unless Hugging Face is offline.
    Code in the repository is never run.

    Raises ValueError: there is no such config, or it cannot be read.
    """
    AutoConfig = needed("transformers", "reading the config of a model").AutoConfig
    from .files.model_source import check_hub, resolve_model

    name = resolve_model(str(name))
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"model must hold a config.json, got the folder {name} without one")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".json")):
        raise ValueError(
            f"model must be a folder, a config.json or a hub id, got {name}: no such file"
        )
    problem: Exception | None = None
    for local in (True, False):
        try:
            if not local:
                check_hub(name)
            return AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        except Exception as error:  # unreadable files surface as many kinds of error
            problem = error
            if path.exists():
                break
    if path.exists():
        raise ValueError(f"model: cannot read the config of {name}: {problem}") from problem
    raise ValueError(
        f"model must be a folder, a config.json or a hub id that is in the local cache or can be "
        f"downloaded, got {name!r}, which is neither; download its config.json and name that file"
    ) from problem


def skeleton(config: Any, task: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """The dense model of `config` on the meta device: of `task`, or of its own architecture.

    No string of the config is imported: its ``architectures`` select among transformers' own
    classes for this kind of config.

    Raises ValueError: transformers has no such model for this kind of config.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    kind = _auto_class(config, task)
    with torch.device("meta"):
        return kind.from_config(config, dtype=dtype or torch.float32, trust_remote_code=False)


def default_task(config: Any) -> str | None:
    """The task of ``lora-fast train`` that suits a config: causal-lm where its architecture is one
    or is not named, else classification; None where transformers has it for neither."""
    own = _architecture(config)
    names = _class_names(config)
    if own in names.get("causal-lm", ()) or (not own and "causal-lm" in names):
        return "causal-lm"
    return "classification" if "classification" in names else None


def _auto_class(config: Any, task: str | None) -> Any:
    import transformers

    own, names = _architecture(config), _class_names(config)
    chosen = task if task in names else None
    if task is None:
        chosen = next((name for name, classes in names.items() if own in classes), None)
    if chosen is None:
        raise ValueError(
            f"model must be one that transformers has for {task or 'its architecture'}, "
            f"got {config.model_type} ({own or 'no architecture'})"
        )
    return getattr(transformers, AUTO_CLASSES[chosen])


def _architecture(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [""])[0])


def _class_names(config: Any) -> dict[str, list[str]]:
    """The classes that transformers has for this kind of config, by task."""
    import transformers

    found = {}
    for task, kind in AUTO_CLASSES.items():
        auto = getattr(transformers, kind, None)
        classes = None if auto is None else auto._model_mapping.get(type(config), None)
        names = classes if isinstance(classes, tuple) else (classes,)
        if any(names):
            found[task] = [cls.__name__ for cls in names if cls]
    return found


@contextmanager
def imagined(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of `model` in which every tensor is a fake one on the CPU; nothing is allocated.

    Inside the block operations compute shapes and dtypes, and the layers of lora_fast accept such
    tensors as ordinary ones. 4-bit layers and experts appear as dense ones of the dtype that was
    quantised: they save the same bytes for backward.
    """
    from .backends.choice import set_backend
    from .base_layer.obstacles import CountingMode
    from .four_bit import is_four_bit

    with CountingMode(), set_backend("torch"), _without_tracebacks():
        memo: dict[int, Any] = {}
        for module in model.modules():
            if is_four_bit(module):
                memo[id(module)] = _dense_stand_in(module)
            for state in states_of(module).values():
                memo[id(state)] = state  # read below
        for tensor in _tensors_of(model):
            fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = fake
        copied = copy.deepcopy(model, memo)
        for module in copied.modules():
            unpack_parameters(module, lambda state: torch.empty(state.shape, dtype=state.dtype))
        yield copied


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Keep torch from printing where an operation on fakes failed: the caller reports it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors in plain attributes or dicts of modules."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for value in vars(module).values():
            for item in value.values() if isinstance(value, dict) else (value,):
                if isinstance(item, Tensor):
                    yield item


def _dense_stand_in(layer: Any) -> nn.Linear:
    state = plain_state(getattr(layer.weight, "quant_state", None) or layer.quant_state)
    N, K = state.shape
    linear = nn.Linear(K, N, bias=False, device="meta")
    linear.weight = _frozen(torch.empty(N, K, dtype=state.dtype, device="cpu"))
    if layer.bias is not None:
        linear.bias = _frozen(torch.empty(N, dtype=layer.bias.dtype, device="cpu"))
    return linear


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
