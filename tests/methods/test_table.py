"""Every method end to end: what trains, what does not, what is saved, what runs fused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_kinds import forced
from tiny_runs import (
    AtStep,
    interrupt,
    logits,
    metrics_of,
    run,
    save_bert,
    save_llama,
    sentiment_rows,
    write_jsonl,
)

from bench.instruments.accuracy import RUN_DIFFERENCE, assert_agree
from lora_fast.errors import Interrupted, TrainingError
from lora_fast.methods.options import METHOD_OPTIONS
from lora_fast.methods.table import METHODS
from lora_fast.training import models
from lora_fast.training.config import TrainConfig
from lora_fast.training.run import Outcome
from lora_fast.training.weights import base_weights

FUSED = [name for name, method in METHODS.items() if method.fused]
SMALL: dict[str, Any] = {"r": 4, "frequencies": 50, "virtual_tokens": 4}
HEAD = re.compile(r"\bclassifier\b")
TRAINS = {
    "lora": r"lora_[AB]\.default\.weight$",
    "rslora": r"lora_[AB]\.default\.weight$",
    "lora-fa": r"lora_B\.default\.weight$",
    "lora-plus": r"lora_[AB]\.default\.weight$",
    "vera": r"vera_lambda_[bd]\.default$",
    "dora": r"lora_([AB]|magnitude_vector)\.default\.weight$",
    "delta-lora": r"lora_[AB]\.default\.weight$",
    "adalora": r"lora_[ABE]\.default$",
    "ia3": r"ia3_l\.default$",
    "bitfit": r"\bbias$",
    "layernorm": r"ln_tuning_layers\.default\.(weight|bias)$",
    "fourierft": r"fourierft_spectrum\.default$",
    "prompt": r"prompt_encoder\.default\.embedding\.weight$",
    "prefix": r"prompt_encoder\.default\.embedding\.weight$",
    "probe": r"(?!)",
}


# What a run of their own must restore: two learning rates, frozen factors, weights that change, an
# allocator, virtual tokens. The other methods have what one of them has.
RESUMED = ("lora-plus", "vera", "delta-lora", "adalora", "prefix")


def sampled(names: Iterable[str], sample: Sequence[str]) -> list[Any]:
    """The names, of which those outside of the sample are exhaustive."""
    rest = pytest.mark.exhaustive
    return [pytest.param(name, marks=() if name in sample else rest) for name in names]


@dataclass
class Run:
    """A finished run, its model, and a copy of every parameter from before."""

    outcome: Outcome
    model: Any
    before: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("methods")
    return TrainConfig(
        model=str(save_bert(folder / "model")),
        data=str(write_jsonl(folder / "data.jsonl", sentiment_rows())),
        steps=6,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("language")
    rows = [{"text": f"the {w} is very blue"} for w in ("sky", "sea", "user", "assistant")]
    return TrainConfig(
        model=str(save_llama(folder / "model")),
        data=str(write_jsonl(folder / "data.jsonl", rows * 4)),
        task="causal-lm",
        steps=3,
        batch_size=4,
    )


def of_method(config: TrainConfig, name: str, **changed: Any) -> TrainConfig:
    small = {key: value for key, value in SMALL.items() if key in METHODS[name].options}
    return replace(config, method=name, **{**small, **changed})


def watched(config: TrainConfig, out: Path) -> Run:
    """Run, and record the model and its initial parameters."""
    kept: list[Any] = []
    before: dict[str, torch.Tensor] = {}
    add = models.add_adapter

    def add_and_copy(*arguments: Any) -> Any:
        kept.append(add(*arguments))
        before.update({n: p.detach().clone() for n, p in kept[0].named_parameters()})
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "add_adapter", add_and_copy)
        return Run(run(config, out), kept[0], before)


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize("name", METHODS)
def test_what_trains_moves_and_the_rest_stays(
    config: TrainConfig, tmp_path: Path, name: str
) -> None:
    given = of_method(config, name, compare=name in FUSED)
    if name == "delta-lora":
        # Requantised NF4 jumps where a rounding error decides between two codes.
        given = replace(given, quantize="none")
    found = watched(given, tmp_path / "out")
    parameters = dict(found.model.named_parameters())
    expected = {n for n in parameters if re.search(TRAINS[name], n)}
    expected = {n for n in expected if "original_module" not in n}
    expected |= {n for n in parameters if HEAD.search(n) and "original_module" not in n}
    assert {n for n, p in parameters.items() if p.requires_grad} == expected
    assert {parameters[n].dtype for n in expected} == {torch.float32}
    for parameter_name, parameter in parameters.items():
        same = torch.equal(parameter, found.before[parameter_name])
        if parameter_name in expected:
            assert not same, parameter_name
        elif not METHODS[name].changes_weights:
            assert same, parameter_name

    metrics = found.outcome.metrics
    card = (tmp_path / "out" / "README.md").read_text()
    scope: dict[str, Any] = {}
    with forced("plain"):  # bitsandbytes packs a stock model that predicts, with other absmax
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], scope)  # type: ignore[index]
    trained, loaded = logits(config, found.model), logits(config, scope["model"])
    assert_agree(loaded, trained, within=RUN_DIFFERENCE)
    assert np.ptp(trained) > 0.1

    if METHODS[name].fused:
        assert metrics["fused"]["all_fused"], str(found.outcome.report)
        assert metrics["fused"]["fused_calls"] > 0
        assert metrics["comparison"]["max_relative_loss_difference"] <= 1e-3
    else:
        assert metrics["fused"]["fused_calls"] == 0


@pytest.mark.parametrize("name", sampled(METHODS, RESUMED))
def test_every_method_resumes_as_if_nothing_had_happened(
    config: TrainConfig, tmp_path: Path, name: str
) -> None:
    given = of_method(config, name)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(given, whole)
    with pytest.raises(Interrupted):
        run(given, cut, AtStep("lora_fast", 3, interrupt))
    run(TrainConfig(), cut, resume=True)
    results = [metrics_of(out)["results"]["lora_fast"] for out in (whole, cut)]
    for key in ("losses", "held_out", "effective_rank"):
        assert results[0][key] == results[1][key], key
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (cut / path.name).read_bytes(), path.name


def test_delta_lora_moves_dense_weights_and_saves_them(config: TrainConfig, tmp_path: Path) -> None:
    given = of_method(config, "delta-lora", quantize="none", delta_start=2)
    found = watched(given, tmp_path / "out")
    weights = base_weights(found.model)
    assert len(weights) == 13
    for name, weight in weights.items():
        assert not torch.equal(weight, found.before[name]), name
    card = (tmp_path / "out" / "README.md").read_text()
    scope: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], scope)  # type: ignore[index]
    trained, loaded = logits(config, found.model), logits(config, scope["model"])
    assert_agree(loaded, trained, within=RUN_DIFFERENCE)
    (tmp_path / "out" / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})  # type: ignore[index]


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_float32_on_a_16_bit_base(config: TrainConfig, name: str) -> None:
    given = of_method(config, name, dtype="bfloat16", quantize="none").with_defaults(10)
    model = models.add_adapter(models.load_base(given, ["no", "yes"]), given, 4)
    trainable = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert set(trainable.values()) == {torch.float32}
    assert all(re.search(TRAINS[name], n) or HEAD.search(n) for n in trainable)
    frozen = {p.dtype for n, p in model.named_parameters() if not p.requires_grad}
    assert torch.bfloat16 in frozen


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize(
    "name",
    sampled(["vera", "dora", "ia3", "bitfit", "layernorm", "prefix"], ["dora", "layernorm"]),
)
def test_bfloat16_computes_with_float32_masters(
    config: TrainConfig, tmp_path: Path, name: str
) -> None:
    given = of_method(config, name, dtype="bfloat16", quantize="none", steps=3)
    found = watched(given, tmp_path / "out")
    assert found.outcome.metrics["dtype"] == "bfloat16"
    moved = [n for n, p in found.model.named_parameters() if not torch.equal(p, found.before[n])]
    assert moved
    for moved_name in moved:
        # A step of 1e-3 of a parameter near 1 would vanish in bfloat16, whose spacing is 2⁻⁷.
        parameter = found.model.get_parameter(moved_name)
        assert not torch.equal(parameter, parameter.bfloat16().float())


@pytest.mark.parametrize(
    "name", ["lora", "vera", "dora", "delta-lora", "ia3", "layernorm", "prompt", "prefix"]
)
def test_methods_train_a_language_model(language: TrainConfig, tmp_path: Path, name: str) -> None:
    found = run(of_method(language, name), tmp_path / "out").metrics
    scores = found["results"]["lora_fast"]["held_out"]
    assert scores["tokens"] == found["baselines"]["base_model"]["tokens"]
    assert np.isfinite(scores["loss"])
    assert len(found["results"]["lora_fast"]["losses"]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ia3", "r": 4}, "--method ia3 takes no --r"),
        ({"method": "lora", "lr_ratio": 2.0}, "--method lora takes no --lr-ratio"),
        ({"method": "vera", "alpha": 4.0}, "--method vera takes no --alpha: its vectors"),
        ({"method": "delta-lora", "dropout": 0.1}, "--method delta-lora takes no --dropout: W"),
        ({"method": "lora-fa", "optim": "sgd"}, "--method lora-fa takes no --optim: PEFT's"),
        ({"method": "probe", "target_modules": "q"}, "--method probe takes no --target-modules"),
        ({"method": "prompt", "compare": True}, "--method prompt has no fused layers"),
        ({"method": "prefix", "gradient_checkpointing": True}, "--method prefix cannot have"),
        ({"method": "qlora"}, "--method must be one of lora, rslora"),
        (
            {"method": "probe", "task": "causal-lm", "model": "m", "data": "d"},
            "--method probe needs --task classification",
        ),
    ],
)
def test_options_that_a_method_would_ignore_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainConfig(**options)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_has_a_default_and_every_other_none(name: str) -> None:
    found = TrainConfig(method=name).with_defaults(22_000_000)
    taken = METHODS[name].options
    assert set(taken) <= set(METHOD_OPTIONS)
    for option in METHOD_OPTIONS:
        assert getattr(found, option) == taken.get(option)
    assert found.lr == METHODS[name].learning_rate(22_000_000)


@pytest.mark.parametrize("name", METHODS)
def test_larger_models_learn_slower(name: str) -> None:
    method = METHODS[name]
    rates = [method.learning_rate(int(n)) for n in (22e6, 125e6, 1.1e9, 7e9, 70e9)]
    assert rates[0] == rates[1] >= rates[2] == rates[3] >= rates[4] > 0
    assert method.source


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        ("bitfit", "language", "--method bitfit: the model must have biases"),
        ("adalora", "one step", "--method adalora needs --steps of at least 2"),
        ("ia3", "bfloat16", "--method ia3 on a CPU needs --dtype float32"),
    ],
)
def test_methods_that_do_not_fit(
    config: TrainConfig, language: TrainConfig, tmp_path: Path, name: str, task: str, message: str
) -> None:
    given = language if task == "language" else config
    changed: dict[str, Any] = {"steps": 1} if task == "one step" else {}
    changed |= {"dtype": "bfloat16"} if task == "bfloat16" else {}
    with pytest.raises(TrainingError, match=message):
        run(of_method(given, name, **changed), tmp_path / "out")
