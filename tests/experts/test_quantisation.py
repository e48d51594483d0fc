"""Experts in NF4: trained as stock PEFT trains the decoded weights, saved, loaded and merged."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import FUSES, adapted, expert_base, results, wrappers
from lora_models import quietly
from model_families import EXPERTS_ARE_PARAMETERS, inputs
from peft import PeftModel
from torch import nn

import lora_fast
from bench.instruments.accuracy import (
    RUN_DIFFERENCE,
    assert_agree,
    assert_models_agree,
    assert_same_bits,
)
from lora_fast.experts.quantisation import expert_modules
from lora_fast.experts.storage import packed_experts

pytestmark = pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="experts are modules")
needs_fused = pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags")


def _dense_like(quantised: nn.Module, base: nn.Module) -> nn.Module:
    """`base` with the decoded experts of `quantised`."""
    modules = dict(base.named_modules())
    for path, module in expert_modules(quantised):
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            if packed_experts(module, name) is not None:
                decoded = getattr(module, name) + 0.0
                modules[path.replace(".base_layer", "")]._parameters[name].data = decoded  # type: ignore[union-attr]
    return base


@needs_fused
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_trains_as_stock_on_decoded_weights(family: str, double_quant: bool) -> None:
    base = lora_fast.quantize_experts(expert_base(family), double_quant=double_quant)
    quantised = adapted(base, ["experts.gate_up_proj", "experts.down_proj"])
    stock = adapted(_dense_like(base, expert_base(family)))
    expected = results(stock)
    plain = results(quantised)  # PEFT's own wrappers, not accelerated
    assert_models_agree(plain, expected)
    assert_models_agree(results(quantised), expected)  # nothing of a call is left behind
    lora_fast.accelerate(quantised)
    assert_models_agree(results(quantised), expected)
    report = lora_fast.report(quantised)
    assert report.all_fused and report.fused_calls == len(wrappers(quantised))
    assert {line.base for line in report.layers} == {"nf4"}


@needs_fused
def test_where_the_fused_path_falls_back() -> None:
    """Hooks on the inner wrapper: PEFT's path, in which the inner adapter is not lost."""
    base = lora_fast.quantize_experts(expert_base("qwen3_moe"))
    fused = lora_fast.accelerate(adapted(base, ["experts.gate_up_proj", "experts.down_proj"]))
    expected = results(fused)
    for wrapper in wrappers(fused):
        if hasattr(wrapper.base_layer, "parameter_name"):
            wrapper.base_layer.register_forward_hook(lambda *_: None)
    assert_models_agree(results(fused), expected)
    assert "hooks on inner wrapper" in lora_fast.report(fused).fallback_calls
    with torch.no_grad(), fused.disable_adapter():
        off = fused(**inputs()).logits
    again = lora_fast.quantize_experts(expert_base("qwen3_moe"))
    with torch.no_grad():
        assert_same_bits(off, again(**inputs()).logits, name="disabled")


def test_memory() -> None:
    base = expert_base("qwen3_moe", moe_intermediate_size=256)
    before = sum(_expert_bytes(base))
    lora_fast.quantize_experts(base)
    assert sum(_expert_bytes(base)) <= 0.16 * before


def _expert_bytes(model: nn.Module) -> Any:
    for _, module in expert_modules(model):
        prefix = ("gate_up_proj", "down_proj")
        for key, value in module.state_dict().items():
            if key.startswith(prefix) and "quant_map" not in key:
                yield value.numel() * value.element_size()


@needs_fused
def test_thirty_steps() -> None:
    """The losses of stock PEFT on the decoded weights; the packed bytes stay as they are."""
    base = lora_fast.quantize_experts(expert_base("mixtral", num_hidden_layers=1))
    packed = {k: v.clone() for k, v in base.state_dict().items() if k.endswith("_proj")}
    fused = adapted(base, ["experts.gate_up_proj", "experts.down_proj"])
    losses = _losses(lora_fast.accelerate(fused), 30)
    assert losses[-1] < 0.9 * losses[0]
    stock = adapted(_dense_like(base, expert_base("mixtral", num_hidden_layers=1)))
    assert_agree(losses[:8], _losses(stock, 8), within=RUN_DIFFERENCE, name="losses")
    for key, value in base.state_dict().items():
        key = key.replace(".base_layer", "")
        if key in packed:
            assert_same_bits(value, packed[key], name=key)


def _losses(model: Any, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_state_dict_is_that_of_bitsandbytes_and_loads() -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    base, theirs = (expert_base("qwen3_moe") for _ in range(2))
    lora_fast.quantize_experts(base)
    for _, module in expert_modules(theirs):
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(module, name, compress_statistics=True, blocksize=64)
    ours = base.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert_same_bits(ours[key], value, name=key)
    torch.manual_seed(7)
    other = type(base)(base.config).eval()
    lora_fast.quantize_experts(other)
    assert other.load_state_dict(copy.deepcopy(theirs.state_dict())).missing_keys == []
    with torch.no_grad():
        base.eval()
        assert_same_bits(other(**inputs()).logits, base(**inputs()).logits, name="logits")
    dense = expert_base("qwen3_moe").state_dict()
    with pytest.raises(RuntimeError, match="must be the 4-bit weight that quantize_experts"):
        other.load_state_dict(dense)


@needs_fused
def test_adapters_are_saved_loaded_and_resumed(tmp_path: Path) -> None:
    def base() -> Any:
        return lora_fast.quantize_experts(expert_base("gpt_oss"))

    model = lora_fast.accelerate(adapted(base(), ["experts.gate_up_proj", "experts.down_proj"]))
    expected = results(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path), is_trainable=True)
    assert_models_agree(results(loaded), expected)
    assert_models_agree(results(lora_fast.accelerate(loaded)), expected)
    dense = PeftModel.from_pretrained(_dense_like(base(), expert_base("gpt_oss")), str(tmp_path))
    with torch.no_grad():
        assert_models_agree({"logits": dense(**inputs()).logits}, {"logits": expected["logits"]})


@needs_fused
def test_merging_quantises_again_and_unmerging_restores() -> None:
    base = lora_fast.quantize_experts(expert_base("gpt_oss"))
    model = adapted(base, ["experts.gate_up_proj", "experts.down_proj"], lora_alpha=0.3)
    stored = {k: v.clone() for k, v in base.state_dict().items() if "_proj" in k}
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="cannot be changed in place"):
            quietly(model.merge_adapter, safe_merge=safe)
    lora_fast.accelerate(model)
    before = results(model)
    dense = adapted(_dense_like(base, expert_base("gpt_oss")), lora_alpha=0.3)
    dense.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False
    )
    merged = quietly(dense.merge_and_unload)
    quietly(model.merge_adapter)
    expected = lora_fast.quantize_experts(merged)
    with torch.no_grad():
        found = model(**inputs()).logits
        assert_agree(found, expected(**inputs()).logits, within=1e-4, name="merged")
    quietly(model.unmerge_adapter)
    for key, value in base.state_dict().items():
        key = key.replace(".base_layer", "")
        if key in stored and not key.endswith("bias"):
            assert_same_bits(value, stored[key], name=key)
    assert_models_agree(results(model), before)


def test_copies_and_what_the_attribute_is() -> None:
    base = lora_fast.quantize_experts(expert_base("qwen3_moe")).eval()
    for again in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        with torch.no_grad():
            assert_same_bits(again(**inputs()).logits, base(**inputs()).logits, name="logits")
    (_, module), *_ = expert_modules(base)
    weight: Any = module.gate_up_proj
    assert weight.shape == (4, 32, 32) and weight.dtype == torch.float32
    assert not weight.requires_grad
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        weight.data = torch.zeros(4, 32, 32)
    assert lora_fast.quantize_experts(base) is base  # in NF4 already


REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (lambda: expert_base("qwen3_moe"), {"quant_type": "fp4"}, ValueError, "quant_type must be"),
    (lambda: expert_base("qwen3_moe"), {"blocksize": 48}, ValueError, "blocksize must be one of"),
    (lambda: expert_base("qwen3_moe"), {"double_quant": 1}, TypeError, "double_quant must be"),
    (lambda: expert_base("qwen3_moe"), {"blocksize": 1024}, ValueError, "must have a multiple of"),
    (lambda: nn.Linear(2, 2), {}, ValueError, "model must contain experts"),
    (lambda: adapted(expert_base("qwen3_moe")), {}, ValueError, "before get_peft_model"),
    (lambda: 3, {}, TypeError, "model must be a torch.nn.Module"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), REFUSED)
def test_what_is_refused(
    make: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = list(model.state_dict()) if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=message):
        lora_fast.quantize_experts(model, **options)
    assert not before or list(model.state_dict()) == before
