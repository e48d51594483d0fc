"""Families of transformers, tiny and random: converted, saved, read by stock PEFT, accelerated."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import EXPERTS_ARE_PARAMETERS, FAMILIES, inputs, tiny_model
from peft import PeftModel
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import assert_models_agree, assert_same_bits

# By default one of each kind of code: plain, fused projections, mixtures, state spaces, encoders,
# encoder-decoders, relative positions, and those whose modules read `weight`.
SAMPLE = (
    "llama", "gemma2", "phi3", "gpt_neox", "bloom", "opt", "mixtral", "qwen2_moe", "deepseek_v3",
    "gpt_oss", "mamba", "jamba", "mamba2", "falcon_h1", "qwen3_next", "lfm2", "bert", "deberta",
    "deberta-v2", "albert", "t5", "mt5", "bart", "switch_transformers",
)  # fmt: skip


def _randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def _run(model: nn.Module) -> dict[str, Tensor | None]:
    """Logits, and the gradients of all that trains, by the names that PEFT gives them."""
    model.zero_grad()
    given = inputs()
    output = model(**given)
    output.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".default.weight", "")
            gradients[plain] = parameter.grad
    return {"logits": output.logits.detach(), **gradients}


def _converted(base: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gets no adapter")
        return lora_fast.convert(base, "all-linear", r=4, lora_alpha=4, **options)


@pytest.mark.parametrize(
    "family",
    [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.exhaustive) for n in FAMILIES],
)
def test_family(family: str, tmp_path: Path) -> None:
    if not _linears(tiny_model(family)):
        with pytest.raises(ValueError, match="target_modules must match linear layers"):
            lora_fast.convert(tiny_model(family), "all-linear", r=4)
        return
    converted = _randomised(_converted(tiny_model(family)))
    actual = _run(converted)
    # An expert may have no token of so few.
    idle = [n for n, gradient in actual.items() if gradient is None and ".experts." not in n]
    assert not idle, "adapters of layers that the model does not call"
    assert not lora_fast.report(converted).fallback_calls

    lora_fast.save_adapter(converted, tmp_path / "adapter")
    stock = _loaded(family, tmp_path / "adapter")
    expected = _run(stock)
    assert_models_agree(actual, expected)

    again = lora_fast.load_adapter(_converted(tiny_model(family)), tmp_path / "adapter")
    for (name, parameter), saved in zip(
        again.named_parameters(), converted.parameters(), strict=True
    ):
        assert_same_bits(parameter, saved, name=name)

    fused = lora_fast.accelerate(_loaded(family, tmp_path / "adapter"))
    assert_models_agree(_run(fused), expected)
    assert lora_fast.report(fused).fused_calls > 0


def _linears(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and m is not head]


def _loaded(family: str, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys")
        return PeftModel.from_pretrained(tiny_model(family), adapter, is_trainable=True).eval()


@pytest.mark.skipif(
    not EXPERTS_ARE_PARAMETERS, reason="this transformers holds the experts as modules"
)
@pytest.mark.skipif(
    importlib.util.find_spec("peft.utils.transformers_weight_conversion") is None,
    reason="this PEFT reads adapters of experts as they are",
)
def test_layers_that_peft_takes_for_experts_have_no_dropout(tmp_path: Path) -> None:
    model = _converted(tiny_model("deepseek_v3"), lora_dropout=0.1)
    with pytest.raises(NotImplementedError, match=r"accept the adapter's config.*lora_dropout"):
        lora_fast.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("targets", [["in_proj", "x_proj"], r".*\.dt_proj"])
def test_a_layer_that_the_model_passes_by_is_refused(targets: Any) -> None:
    model = tiny_model("mamba")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"(x|dt)_proj.*MambaMixer multiplies with its weight"):
        lora_fast.convert(model, targets, r=4)
    assert dict(model.named_modules()) == before
    with pytest.warns(UserWarning, match="x_proj gets no adapter"):
        lora_fast.convert(model, "all-linear", r=4)
