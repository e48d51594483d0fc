"""Merging notes a base whose weights differ from those that the adapter was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from export_models import adapted, load
from safetensors.torch import load_file, save_file
from tiny_runs import run, run_cli, save_llama, sentiment_rows, write_jsonl
from transformers import LlamaConfig

from lora_fast.export import merge_checkpoint
from lora_fast.export.origin import complete_classifier
from lora_fast.training.config import TrainConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a copy in shards, one with other weights, an adapter of PEFT's and a run."""
    folder = tmp_path_factory.mktemp("origin")
    save_llama(folder / "base")
    shutil.copytree(folder / "base", folder / "shards")
    (folder / "shards" / "model.safetensors").unlink()
    load(folder / "base").save_pretrained(folder / "shards", max_shard_size="30KB")
    shutil.copytree(folder / "base", folder / "other")
    weights = load_file(folder / "other" / "model.safetensors")
    weights = {name: tensor + 0.5 for name, tensor in weights.items()}
    save_file(weights, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    adapted(folder / "base", "lora", torch.float32).save_pretrained(folder / "adapter")
    data = write_jsonl(folder / "data.jsonl", [{"text": r["text"]} for r in sentiment_rows()])
    config = TrainConfig(model=str(folder / "base"), data=str(data), task="causal-lm", steps=1,
                         quantize="none")  # fmt: skip
    run(config, folder / "run")
    return folder


def merged(base: Path | str, adapter: Path, out: Path) -> list[str]:
    notes: list[str] = []
    merge_checkpoint(str(base), adapter, out, note=notes.append)
    return notes


@pytest.mark.parametrize("adapter", ["adapter", "run"])
def test_other_weights_are_told(adapter: str, made: Path, tmp_path: Path) -> None:
    for base in ("base", "shards"):
        assert merged(made / base, made / adapter, tmp_path / base) == []
    assert merged(made / "other", made / adapter, tmp_path / "other") == [
        f"the weights of {made / 'other'} are not those that the adapter was trained on, "
        f"{made / 'base'}: is it the base that you mean?"
    ]
    assert (tmp_path / "other" / "model.safetensors").exists()


def test_a_base_that_is_not_here_is_known_by_its_name(made: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for name, known in (("org/base", True), ("org/model", False), (None, True), (7, True)):
        path.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        notes = merged(made / "base", adapter, tmp_path / f"out-{known}-{type(name).__name__}")
        told = f"the adapter names another base, {name}: is {made / 'base'} the one that you mean?"
        assert notes == ([] if known else [told])


def test_a_run_that_was_copied_to_another_machine_knows_its_base(
    made: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(made / "run", tmp_path / "run"))
    path = elsewhere / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": "/gone/base-model"}
    path.write_text(json.dumps(config))
    assert merged(made / "base", elsewhere, tmp_path / "same") == []
    assert len(merged(made / "other", elsewhere, tmp_path / "other")) == 1


def test_the_command_prints_it(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("merge", made / "other", made / "adapter", tmp_path / "out") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("! the weights of ") and second.startswith("✓ ")


RECORDS = [
    None,
    [],
    {"inputs": []},
    {"inputs": {"data": {"labels": "ab"}}},
    {"inputs": {"data": {"labels": [1, 2]}}},
    {"inputs": {"data": {"labels": ["a"]}}, "pad_token_id": "x"},
]


@pytest.mark.parametrize("record", RECORDS)
def test_what_a_run_wrote_down_is_not_trusted(record: object, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"record": record}))
    config = LlamaConfig(num_labels=2)
    complete_classifier(config, tmp_path)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"} and config.pad_token_id is None
