"""Bytes saved for backward against a graph worked out by hand, and times that change nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import save_bert
from torch import nn
from transformers import BertForSequenceClassification

import lora_fast
from lora_fast.training import measurement
from lora_fast.training.measurement import (
    Batch,
    forward_backward,
    freeze,
    interleaved_ratio,
    interleaved_step_times,
    peak_memory,
    saved_activation_bytes,
)

M, K, N, R = 6, 64, 32, 4


class Model(nn.Module):
    """Two linear layers after a trainable gain; its loss saves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(K))
        self.up = nn.Linear(K, N)
        self.down = nn.Linear(N, K)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.down(self.up(x * self.gain)).sum())


def adapted(quantize: bool = False) -> nn.Module:
    model = Model()
    if quantize:
        for name in ("up", "down"):
            dense = model.get_submodule(name)
            linear = bnb.nn.Linear4bit(
                dense.in_features, dense.out_features, quant_type="nf4", compute_dtype=torch.float32
            )
            linear.load_state_dict(dense.state_dict())
            model.set_submodule(name, linear.to("cpu"))
        model.is_loaded_in_4bit = True
    return get_peft_model(model, LoraConfig(r=R, target_modules=["up", "down"]))


def batch() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(M, K)}


@pytest.mark.parametrize("quantize", [False, True])
def test_what_lora_fast_saves_is_x_and_s_of_each_layer(quantize: bool) -> None:
    model = lora_fast.accelerate(adapted(quantize))
    # x of the gain is the batch itself and the weights are parameters: neither counts.
    model.get_parameter("base_model.model.gain").requires_grad_(True)
    floats = M * (K + R) + M * (N + R)
    assert saved_activation_bytes(model, batch(), torch.float32) == 4 * floats


def test_a_tensor_saved_twice_counts_once() -> None:
    class Square(Model):
        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            hidden = x * self.gain
            return SimpleNamespace(loss=(hidden * hidden).sum() + (hidden[:2] * hidden[2:4]).sum())

    assert saved_activation_bytes(Square(), batch(), torch.float32) == 4 * M * K


def test_no_graph_saves_nothing() -> None:
    model = Model().requires_grad_(False)
    assert saved_activation_bytes(model, batch(), torch.float32) == 0


def test_times_are_paired_and_leave_the_model_as_it_was() -> None:
    model = lora_fast.accelerate(adapted()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = interleaved_step_times(model, [batch(), batch()], torch.float32, repeats=2)
    assert found.pairs == 4
    assert min(found.stock, found.lora_fast, found.ratio) > 0
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert lora_fast.report(model).all_fused


def test_each_turn_runs_what_it_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fast.training import measurement

    model = adapted()
    seen: list[bool] = []

    def recorded(model: nn.Module, *_: object) -> float:
        seen.append(lora_fast.report(model).all_fused)
        return 1.0 if seen[-1] else 2.0

    monkeypatch.setattr(measurement, "_timed_pass", recorded)
    found = interleaved_step_times(model, [batch()], torch.float32, repeats=4)
    assert (found.lora_fast, found.stock, found.ratio) == (1.0, 2.0, 0.5)
    rounds = [seen[i : i + 2] for i in range(2, len(seen), 2)]
    assert rounds == [[True, False], [False, True]] * 2


def test_the_floor_computes_input_gradients_through_all_layers_and_nothing_else(
    tmp_path: Path,
) -> None:
    model = BertForSequenceClassification.from_pretrained(save_bert(tmp_path))
    seen: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_full_backward_hook(lambda *_, name=name: seen.append(name))
    floor = freeze(model)
    batch = {"input_ids": torch.randint(6, 15, (2, 5)), "labels": torch.tensor([0, 1])}
    forward_backward(floor, batch, torch.float32)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(seen) == sorted(linears)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_ratio_is_the_median_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])
    slow = iter([9.0, 3.0, 3.0, 100.0, 3.0, 3.0, 3.0])  # the first warms up, one is disturbed

    def step(batch: Batch) -> None:
        now[0] += next(slow)

    def floor(batch: Batch) -> None:
        now[0] += 2.0

    batches = [{"x": torch.zeros(1)}] * 3
    assert interleaved_ratio(step, floor, batches, repeats=2) == 1.5


def test_peak_memory_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="batch must be on a GPU, got cpu"):
        peak_memory(lambda batch: None, {"x": torch.zeros(1)})
