"""PEFT models on a CUDA device, as `auto` computes them, step after step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from expert_models import adapted, expert_base, expert_parameters
from lora_models import float64_copy, method_config, quantised
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_fast
from bench.instruments.accuracy import assert_as_close, assert_same_bits
from lora_fast.backends.selection import backend_for

pytestmark = [pytest.mark.gpu, pytest.mark.pretended]
GPU = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VOCABULARY, LINEARS = 64, r".*_proj"
# From the third step of a shape on launches are repeated by plans.
BATCHES = [(2, 40), (2, 40), (2, 40), (1, 13), (1, 13), (1, 13), (3, 30), (1, 1), (2, 40)]


def llama(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=112, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    if kind != "dense":
        model.model = quantised(model.model, quant_type=kind)
        model.is_loaded_in_4bit = True
    return model


def with_adapters(base: nn.Module, method: str, dropout: float = 0.0, **options: Any) -> Any:
    """PEFT's model, its trained numbers moved off their start."""
    config = method_config(method, dropout, 16 if method == "vera" else 8)
    config.target_modules = r".*(q|o)_proj" if method == "vera" else LINEARS
    model = get_peft_model(base, config, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model.train()


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    for shape in BATCHES:
        yield torch.randint(VOCABULARY, shape, generator=generator)


def gradients(model: nn.Module, ids: Tensor, autocast: bool = False) -> Tensor:
    """All of them in one row, which the next step changes the parameters by."""
    model.zero_grad()
    device = next(model.parameters()).device
    with torch.autocast(device.type, BF16, enabled=autocast):
        # Of one token there is no next one.
        loss = model(input_ids=ids.to(device)).logits.float().square().mean()
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    wide = torch.promote_types(found[0].dtype, FP32)
    return torch.cat([g.detach().flatten().cpu().to(wide) for g in found])


def train_together(models: list[Any], step: int) -> None:
    """The same change of every parameter, in place as an optimizer makes it."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for same in zip(*(m.parameters() for m in models), strict=True):
            if same[0].requires_grad:
                change = 0.01 * torch.randn(same[0].shape, generator=generator)
                for p in same:
                    p += change.to(p.device, p.dtype)


def assert_trained_as_stock(stock: Any, *, autocast: bool = False, backend: str = "triton") -> None:
    exact, fused = float64_copy(stock), lora_fast.accelerate(copy.deepcopy(stock).to(GPU))
    stock = stock.to(GPU)
    assert backend_for(GPU).name == backend
    for step, ids in enumerate(batches()):
        found = gradients(fused, ids, autocast)
        eager = gradients(stock, ids, autocast)
        assert_as_close(found, gradients(exact, ids), eager, name=f"step {step}")
        train_together([exact, stock, fused], step)
    report = lora_fast.report(fused)
    assert report.all_fused and report.fused_calls and not report.fallback_calls, str(report)


@pytest.mark.parametrize(
    ("method", "kind", "dtype"),
    [
        ("lora", "dense", BF16),
        ("lora", "dense", FP16),
        ("lora", "dense", FP32),
        ("lora", "nf4", BF16),
        ("lora", "fp4", FP16),
        ("dora", "dense", BF16),
        ("dora", "nf4", BF16),
        ("vera", "dense", BF16),
        ("ia3", "dense", BF16),
        ("adalora", "dense", FP32),
    ],
    ids=str,
)
def test_steps_of_training(method: str, kind: str, dtype: torch.dtype) -> None:
    assert_trained_as_stock(with_adapters(llama(kind, dtype), method))


def test_adapters_in_the_dtype_of_the_base() -> None:
    assert_trained_as_stock(
        with_adapters(llama("dense", BF16), "lora", autocast_adapter_dtype=False)
    )


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_the_torch_backend(kind: str) -> None:
    with lora_fast.set_backend("torch"):
        assert_trained_as_stock(with_adapters(llama(kind, BF16), "lora"), backend="torch")


def test_autocast() -> None:
    assert_trained_as_stock(with_adapters(llama("dense", FP32), "lora"), autocast=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_nf4(reentrant: bool) -> None:
    base: Any = llama("nf4", BF16)
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    assert_trained_as_stock(with_adapters(base, "lora"))


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_repeated_steps_with_dropout_have_the_same_bits(kind: str) -> None:
    """The first of them launches, the others repeat the launches; masks follow the generator."""
    model = lora_fast.accelerate(with_adapters(llama(kind, BF16), "lora", 0.1).to(GPU))
    masked = []
    for ids in list(batches())[2:4]:
        for seed in (1, 1, 1, 2):
            torch.manual_seed(seed)
            torch.cuda.manual_seed(seed)
            masked.append(gradients(model, ids))
    for first in range(0, len(masked), 4):
        again, last, other = masked[first + 1 : first + 4]
        assert_same_bits(again, masked[first], name=f"{first}, second")
        assert_same_bits(last, masked[first], name=f"{first}, third")
        assert not torch.equal(other, last)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_experts(kind: str) -> None:
    # Every row goes to every expert, for rounding would send some of them elsewhere.
    dense = expert_base("mixtral", num_experts_per_tok=4).to(BF16)
    targets, base = expert_parameters(dense), copy.deepcopy(dense)
    if kind == "nf4":
        lora_fast.quantize_experts(base)
        with torch.no_grad():
            for name, p in dense.named_parameters():
                if any(map(name.endswith, targets)):
                    module, _, key = name.rpartition(".")
                    p.copy_(getattr(base.get_submodule(module), key) + 0)
    torch.manual_seed(1)
    eager = adapted(dense, targets)
    torch.manual_seed(1)
    fused = lora_fast.accelerate(adapted(base, targets)).to(GPU)
    exact, eager = copy.deepcopy(eager).double(), eager.to(GPU)
    for step, ids in enumerate(batches()):
        found, plain = gradients(fused, ids), gradients(eager, ids)
        assert_as_close(found, gradients(exact, ids), plain, name=f"step {step}")
        train_together([exact, eager, fused], step)
    assert lora_fast.report(fused).fused_calls


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_merged_weights_of_four_bits(kind: str) -> None:
    """Merging decodes and quantises on the device what it decodes and quantises on a CPU."""
    model = lora_fast.accelerate(with_adapters(llama(kind, BF16), "lora"))
    there = copy.deepcopy(model).to(GPU)
    for m in (model, there):
        m.merge_adapter()
    merged = there.state_dict()
    for name, tensor in model.state_dict().items():
        if name.endswith("base_layer.weight"):
            assert_same_bits(merged[name].cpu(), tensor, name=name)


def test_a_layer_of_our_own() -> None:
    """convert() with NF4, on the device."""
    model = lora_fast.convert(llama("dense", BF16).to(GPU), ["q_proj"], r=8, quantize="nf4")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B.normal_()
    ids = next(batches())
    assert_same_bits(gradients(model, ids), gradients(model, ids), name="gradients")
