"""Models of images and of sound: the layers of both towers run fused, and form their groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lora_models import accelerated_copy
from peft import LoraConfig, get_peft_model
from torch import Tensor

import lora_fast
from bench.instruments.accuracy import RUN_DIFFERENCE, assert_agree

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2}


def clip() -> tuple[Any, dict[str, Tensor], Callable[[Any], Tensor]]:
    """An encoder of images beside one of text."""
    config = transformers.CLIPConfig(
        text_config={**SIZES, **HEADS, "vocab_size": 32, "eos_token_id": 2},
        vision_config={**SIZES, **HEADS, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    inputs = {"input_ids": torch.arange(10).view(2, 5), "pixel_values": torch.randn(2, 3, 8, 8)}
    return transformers.CLIPModel(config), inputs, lambda out: out.logits_per_image


def whisper() -> tuple[Any, dict[str, Tensor], Callable[[Any], Tensor]]:
    """An encoder of sound before a decoder of text."""
    config = transformers.WhisperConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, num_mel_bins=4,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=10, max_target_positions=10, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {
        "input_features": torch.randn(2, 4, 20),
        "decoder_input_ids": torch.arange(3, 13).view(2, 5),
    }
    return transformers.WhisperModel(config), inputs, lambda out: out.last_hidden_state


@pytest.mark.parametrize(
    ("build", "towers"),
    [(clip, ("vision_model", "text_model")), (whisper, ("encoder", "decoder"))],
    ids=["clip", "whisper"],
)
def test_both_towers(build: Callable[[], Any], towers: tuple[str, str]) -> None:
    torch.manual_seed(0)
    base, inputs, read = build()
    targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    stock = get_peft_model(base, lora).eval()
    fused = accelerated_copy(stock)
    gradients = []
    for model in (fused, stock):
        loss = read(model(**inputs)).square().sum()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[1].items():
        assert_agree(gradients[0][name], expected, within=RUN_DIFFERENCE, name=name)
    report = lora_fast.report(fused)
    assert report.all_fused
    for tower in towers:
        of_tower = [layer for layer in report.layers if f".{tower}." in f".{layer.name}"]
        assert of_tower and all(layer.fused_calls == 1 for layer in of_tower)
        # Of Whisper k and v alone: what q reads may be another tensor, in a decoder.
        assert any(layer.siblings for layer in of_tower), tower
