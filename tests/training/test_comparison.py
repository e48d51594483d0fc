"""The comparison of methods: same data for all, failures in their rows, partial results saved."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import AtStep, interrupt, save_bert, save_llama, sentiment_rows, write_jsonl

from bench.instruments.accuracy import RUN_DIFFERENCE, assert_agree
from lora_fast.errors import Interrupted, TrainingError
from lora_fast.methods.table import METHODS
from lora_fast.training import comparison
from lora_fast.training.comparison import chosen_methods, compare_methods, config_for
from lora_fast.training.comparison_table import caption, markdown, spread, table
from lora_fast.training.config import TrainConfig
from lora_fast.training.events import Silent


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("comparison")
    return TrainConfig(
        model=str(save_bert(folder / "model")),
        data=str(write_jsonl(folder / "data.jsonl", sentiment_rows())),
        steps=3,
        batch_size=8,
    )


@pytest.fixture(scope="module")
def found_on(
    config: TrainConfig, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """One comparison on each kind of CPU."""

    @functools.cache
    def compare(kind: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp(kind)
        result = compare_methods(config, ["lora", "prompt", "probe"], 2, out, Silent())
        return {**result, "out": out}

    return compare


@pytest.fixture
def found(cpu_kind: str, found_on: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return found_on(cpu_kind)


def test_costs_and_scores_of_every_method_and_seed(found: dict[str, Any]) -> None:
    assert list(found["methods"]) == ["lora", "prompt", "probe"]
    assert found["seeds"] == [0, 1]
    for row in found["methods"].values():
        assert {len(values) for values in row["scores"].values()} == {2}
        assert [len(losses) for losses in row["losses"]] == [3, 3]
        assert row["losses"][0] != row["losses"][1]
        assert row["step_ratio"] > 0
        assert 0 < row["trainable_percent"] < 50
    lora, prompt, probe = found["methods"].values()
    assert lora["adapted_layers"] == lora["fused_layers"] == 13
    assert lora["fallback_calls"] == {}
    # A probe has no backward pass through the layers and saves nothing for one.
    assert probe["step_ratio"] < lora["step_ratio"]
    assert probe["memory_bytes"] < prompt["memory_bytes"]
    assert probe["memory_bytes"] < lora["memory_bytes"]


def test_methods_see_the_same_data(found: dict[str, Any]) -> None:
    # Before the first update LoRA is the base model, and so is a probe: equal first losses.
    lora, probe = found["methods"]["lora"]["losses"], found["methods"]["probe"]["losses"]
    assert_agree([x[0] for x in lora], [x[0] for x in probe], within=RUN_DIFFERENCE)


def test_what_is_left_on_disk(found: dict[str, Any]) -> None:
    out: Path = found["out"]
    assert {path.name for path in out.iterdir()} == {"compare.json", "compare.md", "compare.png"}
    stored = json.loads((out / "compare.json").read_text())
    assert stored["methods"]["lora"]["step_ratio"] == found["methods"]["lora"]["step_ratio"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "compare.md").read_text()
    assert "| LoRA | 28.898% |" in text
    assert "13 of 13" in text
    assert caption(found) in text


def test_a_failure_stays_in_its_row(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble = comparison.assemble

    def fails_for_dora(given: TrainConfig, *rest: Any) -> Any:
        if given.method == "dora":
            raise RuntimeError("broken | badly\nin two lines")
        return assemble(given, *rest)

    class Notes(Silent):
        said: list[str] = []  # noqa: RUF012

        def note(self, text: str) -> None:
            self.said.append(text)

    monkeypatch.setattr(comparison, "assemble", fails_for_dora)
    notes = Notes()
    result = compare_methods(replace(config, steps=1), ["dora", "probe"], 1, tmp_path, notes)
    reason = "RuntimeError: broken | badly"
    assert result["methods"]["dora"] == {"title": "DoRA", "error": reason}
    assert notes.said == [f"DoRA: {reason}"]
    assert "step_ratio" in result["methods"]["probe"]
    assert "| DoRA | failed: RuntimeError: broken \\| badly |  |" in markdown(result)


def test_what_was_finished_is_kept_on_ctrl_c(config: TrainConfig, tmp_path: Path) -> None:
    stop = AtStep("linear probe (2 of 3)", 1, interrupt)
    with pytest.raises(Interrupted):
        compare_methods(config, ["layernorm", "probe", "lora"], 1, tmp_path, stop)
    assert list(json.loads((tmp_path / "compare.json").read_text())["methods"]) == ["layernorm"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "compare.json", "compare.md", "compare.png",
    }  # fmt: skip


@pytest.mark.usefixtures("cpu_kind")
def test_a_language_model(tmp_path: Path) -> None:
    rows = [{"text": f"the {w} is very blue"} for w in ("sky", "sea", "user", "assistant")] * 3
    config = TrainConfig(
        model=str(save_llama(tmp_path / "model")),
        data=str(write_jsonl(tmp_path / "data.jsonl", rows)),
        task="causal-lm",
        steps=2,
        batch_size=4,
    )
    (tmp_path / "out").mkdir()
    result = compare_methods(config, ["lora", "prefix", "bitfit"], 1, tmp_path / "out", Silent())
    assert result["methods"]["lora"]["scores"].keys() == {"loss", "perplexity"}
    why = result["methods"]["bitfit"]["not_applicable"]
    assert why.startswith("--method bitfit: the model must have")


def test_options_that_mean_nothing_to_a_method_are_left_out() -> None:
    given = TrainConfig(r=8, dropout=0.1, target_modules="query", optim="sgd")
    assert config_for(given, "dora").r == 8
    probe = config_for(given, "probe")
    assert (probe.r, probe.dropout, probe.target_modules, probe.optim) == (None, None, None, "sgd")
    assert config_for(given, "lora-fa").optim is None


def test_which_methods() -> None:
    assert chosen_methods(None) == list(METHODS)
    assert chosen_methods("dora, lora,dora") == ["dora", "lora"]
    with pytest.raises(TrainingError, match=r"--methods must be among lora, .*, got qlora"):
        chosen_methods("lora,qlora")
    with pytest.raises(TrainingError, match="got none"):
        chosen_methods(" ,")


def test_spread_over_seeds() -> None:
    assert spread([0.81249]) == "0.812"
    assert spread([0.5, 0.7]) == "0.600 ± 0.141"


def test_the_table_has_a_cell_for_every_head(found: dict[str, Any]) -> None:
    head, rows = table(found)
    assert [len(row) for row in rows] == [len(head)] * 3
    assert head[-3:] == ["accuracy", "F1", "ROC AUC"]
