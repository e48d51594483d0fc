"""Whole runs on tiny models: equal curves, equal resumption, adapters that load elsewhere."""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_kinds import forced
from peft import PeftModel
from safetensors.torch import load_file
from same_runs import adapter, assert_same_run
from tiny_runs import (
    logits,
    metrics_of,
    run,
    save_bert,
    save_llama,
    sentiment_rows,
    write_jsonl,
)

from bench.instruments.accuracy import (
    BFLOAT16_RUN_DIFFERENCE,
    ORDER_DIFFERENCE,
    RUN_DIFFERENCE,
    assert_agree,
)
from lora_fast.errors import TrainingError
from lora_fast.training import models
from lora_fast.training.checkpoints import WEIGHTS, latest_checkpoint, stored_state
from lora_fast.training.config import TrainConfig
from lora_fast.training.events import Silent
from lora_fast.training.run import Outcome


@pytest.fixture(scope="module")
def llama_config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("llama")
    answer = {"role": "assistant", "content": "very blue"}
    rows: list[dict[str, Any]] = []
    for question in itertools.product(["the", "a", "user"], ["sky", "sea"], ["is", "was"]):
        words = " ".join(question)
        rows.append({"text": f"{words} very blue"})
        rows.append({"messages": [{"role": "user", "content": words}, answer]})
    return TrainConfig(
        model=str(save_llama(folder / "model")),
        data=str(write_jsonl(folder / "data.jsonl", rows)),
        task="causal-lm",
        steps=12,
        lr=1e-2,
        r=4,
    )


def test_both_arms_have_the_same_curve_and_ours_ran_fused(compared: Outcome) -> None:
    found = compared.metrics
    stock, ours = (np.array(found["results"][arm]["losses"]) for arm in ("stock", "lora_fast"))
    assert len(stock) == len(ours) == 8
    assert_agree(ours, stock, within=RUN_DIFFERENCE)
    assert found["comparison"]["max_relative_loss_difference"] <= 1e-4
    assert len(set(stock)) == 8
    fused = found["fused"]
    assert (fused["adapted_layers"], fused["fused_layers"], fused["all_fused"]) == (13, 13, True)
    # 8 training steps, 1 batch for the bytes, 1 for the held-out examples.
    assert fused["fused_calls"] == 13 * 10
    assert fused["fallback_calls"] == {}


def test_lora_fast_saves_no_more_for_backward(compared: Outcome) -> None:
    results = compared.metrics["results"]
    ours, stock = (results[arm]["saved_activation_bytes"] for arm in ("lora_fast", "stock"))
    # Without dropout and in float32, PEFT too saves x and S; bfloat16 tells the two apart below.
    assert 0 < ours <= stock
    assert compared.metrics["comparison"]["saved_activation_ratio"] == ours / stock
    assert compared.metrics["comparison"]["step_time_ratio"] > 0


@pytest.mark.usefixtures("cpu_kind")
def test_training_beats_the_baselines(bert_config: TrainConfig, tmp_path: Path) -> None:
    rows = sentiment_rows(160)
    data = write_jsonl(tmp_path / "train.jsonl", rows[:120])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows[120:])
    config = replace(bert_config, data=str(data), eval_data=str(held_out), steps=60, lr=5e-3)
    found = run(replace(config, batch_size=16), tmp_path / "out").metrics
    scores = found["results"]["lora_fast"]["held_out"]
    assert scores["roc_auc"] > 0.9
    assert found["baselines"]["majority"]["roc_auc"] == 0.5
    assert found["baselines"]["linear_probe"]["roc_auc"] < scores["roc_auc"]
    assert found["examples"] == {
        "train": 120, "validation": 0, "held_out": 40, "left_out": {}, "cut": 0,
        "max_length": 48, "whole_model": True, "learned": "labels",
    }  # fmt: skip


def test_what_metrics_json_holds(compared: Outcome) -> None:
    stored = metrics_of(compared.out)
    assert set(stored) == {
        "lora_fast", "versions", "device", "threads", "dtype", "model", "quantized", "config",
        "labels", "examples", "trainable_parameters", "total_parameters", "trainable_percent",
        "fused", "baselines", "results", "comparison", "resumed",
    }  # fmt: skip
    for arm in stored["results"].values():
        assert set(arm) == {
            "held_out", "losses", "best_step", "stopped_early", "effective_rank", "step_seconds",
            "tokens_per_second", "saved_activation_bytes",
        }  # fmt: skip
        assert set(arm["held_out"]) == {"loss", "accuracy", "f1", "roc_auc"}
        assert arm["tokens_per_second"] > 0
    assert stored["quantized"] == "nf4"
    assert stored["config"]["max_length"] == 48
    share = 100 * stored["trainable_parameters"] / stored["total_parameters"]
    assert stored["trainable_percent"] == pytest.approx(share)


def test_the_folder_of_a_run(compared: Outcome) -> None:
    names = {path.name for path in compared.out.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "metrics.json", "loss.png",
        "effective_rank.png",
        "README.md", "layers.txt", "run.json", "tokenizer.json", "checkpoints",
    }  # fmt: skip
    assert (compared.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "13 of 13 adapted layers fused" in (compared.out / "layers.txt").read_text()


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_the_card_s_code_loads_the_adapter_in_stock_peft(
    bert_config: TrainConfig, tmp_path: Path, quantize: str
) -> None:
    config = replace(bert_config, quantize=quantize)
    kept: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        add = models.add_adapter
        patch.setattr(models, "add_adapter", lambda *a: kept.append(add(*a)) or kept[0])
        run(config, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    scope: dict[str, Any] = {}
    with forced("plain"):  # bitsandbytes packs a stock model that predicts, with other absmax
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], scope)  # type: ignore[index]
    assert type(scope["model"]).__mro__[1] is PeftModel
    trained, loaded = logits(config, kept[0]), logits(config, scope["model"])
    assert_agree(loaded, trained, within=RUN_DIFFERENCE)
    assert np.ptp(trained) > 0.1


def test_two_runs_give_the_same_bits(bert_config: TrainConfig, tmp_path: Path) -> None:
    run(bert_config, tmp_path / "a")
    run(bert_config, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_seeds_differ(bert_config: TrainConfig, tmp_path: Path) -> None:
    run(replace(bert_config, steps=2), tmp_path / "a")
    run(replace(bert_config, steps=2, seed=1), tmp_path / "b")
    losses = [metrics_of(tmp_path / n)["results"]["lora_fast"]["losses"] for n in "ab"]
    assert losses[0] != losses[1]


def test_gradient_accumulation_is_one_larger_batch(
    bert_config: TrainConfig, tmp_path: Path
) -> None:
    rows = [{"text": f"the sky is {'good' if i % 2 else 'bad'}", "label": i % 2} for i in range(40)]
    data = write_jsonl(tmp_path / "even.jsonl", rows)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows[:2])
    config = replace(
        bert_config, data=str(data), eval_data=str(held_out), steps=3, target_modules="query"
    )
    model = tmp_path / "model"
    shutil.copytree(bert_config.model, model)
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace('dropout_prob": 0.1', 'dropout_prob": 0.0'))
    config = replace(config, model=str(model))
    run(replace(config, batch_size=8), tmp_path / "whole")
    run(replace(config, batch_size=2, grad_accum=4), tmp_path / "parts")
    ours, theirs = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    for name in ours:
        assert_agree(ours[name], theirs[name], within=RUN_DIFFERENCE, name=name)


def test_gradient_checkpointing_changes_nothing_but_memory(
    bert_config: TrainConfig, compared: Outcome, tmp_path: Path
) -> None:
    found = run(replace(bert_config, gradient_checkpointing=True), tmp_path / "out").metrics
    ours = found["results"]["lora_fast"]
    expected = compared.metrics["results"]["lora_fast"]["losses"]
    assert_agree(ours["losses"], expected, within=RUN_DIFFERENCE)
    assert ours["saved_activation_bytes"] is None


@pytest.mark.usefixtures("cpu_kind")
def test_bfloat16_trains_float32_adapters(
    bert_config: TrainConfig, compared: Outcome, tmp_path: Path
) -> None:
    config = replace(bert_config, dtype="bfloat16", compare=True)
    found = run(config, tmp_path / "out").metrics
    losses = [compared.metrics["results"]["lora_fast"]["losses"]]
    losses += [arm["losses"] for arm in found["results"].values()]
    assert_agree(losses[1], losses[0], within=BFLOAT16_RUN_DIFFERENCE)
    assert_agree(losses[2], losses[0], within=BFLOAT16_RUN_DIFFERENCE)
    assert found["dtype"] == "bfloat16"
    assert {value.dtype for value in adapter(tmp_path / "out").values()} == {torch.float32}
    assert found["fused"]["all_fused"]
    assert found["comparison"]["saved_activation_ratio"] < 1


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_a_language_model_learns_texts_and_conversations(
    llama_config: TrainConfig, tmp_path: Path, quantize: str
) -> None:
    config = replace(llama_config, quantize=quantize, compare=True)
    found = run(config, tmp_path / "out").metrics
    before = found["baselines"]["base_model"]
    after = found["results"]["lora_fast"]["held_out"]
    assert after["perplexity"] < before["perplexity"] / 1.5
    assert after["tokens"] == before["tokens"]
    assert found["fused"]["all_fused"]
    assert found["fused"]["adapted_layers"] == 14
    assert found["comparison"]["max_relative_loss_difference"] <= 1e-4
    assert found["labels"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 49}, "--max-length must be at most 48"),
        ({"optim": "galore_adamw"}, "cannot set up training: .*galore"),
        ({"lr": 1e30}, "the loss is (nan|inf) at step .*try a lower --lr"),
    ],
)
def test_options_that_this_model_or_machine_cannot_have(
    bert_config: TrainConfig, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        run(replace(bert_config, **options), tmp_path / "out")


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_notes_what_trains_in_full(bert_config: TrainConfig, tmp_path: Path) -> None:
    model = save_bert(tmp_path / "model", pooler=False)
    notes = Notes()
    run(replace(bert_config, model=str(model), steps=1), tmp_path / "out", notes)
    assert notes.said == ["Not in the checkpoint, trained in full: bert.pooler.dense"]
    assert any("pooler" in name for name in adapter(tmp_path / "out"))


@pytest.mark.usefixtures("cpu_kind")
def test_a_rank_that_is_no_low_one_is_told(bert_config: TrainConfig, tmp_path: Path) -> None:
    notes = Notes()
    run(replace(bert_config, r=100, steps=1), tmp_path / "out", notes)
    assert notes.said == [
        "--r 100 is more than the smaller side of 13 of 13 layers (from 64): a lower rank can hold "
        "every update of them"
    ]


def test_early_stopping_goes_back_to_the_best(bert_config: TrainConfig, tmp_path: Path) -> None:
    # Far too high a rate: the held-out loss is best early on.
    config = replace(bert_config, steps=40, lr=0.05, early_stopping=2, save_every=2)
    out = tmp_path / "out"
    notes = Notes()
    found = run(config, out, notes).metrics
    ours = found["results"]["lora_fast"]
    assert ours["stopped_early"]
    assert notes.said == [
        f"{len(ours['losses'])} steps of 40, stopped early; the weights of step "
        f"{ours['best_step']} are kept, the best on the examples held back."
    ]
    state = stored_state(latest_checkpoint(out / "checkpoints" / "lora_fast"))
    evaluated = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert ours["best_step"] == best
    assert list(evaluated)[-1] == best + 4 == len(ours["losses"]) < 40
    assert found["examples"]["validation"] > 0
    saved = load_file(out / "checkpoints" / "lora_fast" / f"checkpoint-{best}" / WEIGHTS)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B"
    assert torch.equal(adapter(out)[f"{name}.weight"], saved[f"{name}.default.weight"])


@pytest.mark.parametrize(
    ("schedule", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 3e-3)]
)
def test_schedule_and_warm_up(
    bert_config: TrainConfig, tmp_path: Path, schedule: str, last: float
) -> None:
    rates: list[float] = []

    class Rates(Silent):
        def step(self, step: int, loss: float, learning_rate: float, tokens: float) -> None:
            rates.append(learning_rate)

    config = replace(bert_config, schedule=schedule, warmup=0.5, steps=8)
    run(config, tmp_path / "out", Rates())
    assert_agree(rates[:5], [0, 0.75e-3, 1.5e-3, 2.25e-3, 3e-3], within=ORDER_DIFFERENCE)
    assert (rates[-1] < rates[4]) == (last == 0.0)
    assert rates[-1] >= last
