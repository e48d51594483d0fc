"""docs/adding_a_method.md, followed to the end with LoRA that has a trainable scalar."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    AtStep,
    interrupt,
    metrics_of,
    run,
    run_cli,
    save_llama,
    sentiment_rows,
    tiny_llama,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

import lora_fast
from bench.instruments.accuracy import assert_models_agree
from lora_fast.errors import Interrupted
from lora_fast.methods.table import METHODS
from lora_fast.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("libraries_as_before")

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adding_a_method.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^class SVFTLinear.*?(?=^\S)", re.MULTILINE | re.DOTALL)
ROWS = [{"text": row["text"]} for row in sentiment_rows()]
# d = t·1: what the page says of a scale that trains.
TOY = '''
class ScaledLoRALinear(AdapterModule):
    """y = x Wᵀ + t · (drop(x) Aᵀ) Bᵀ + bias, with t a scalar that trains."""

    def __init__(self, base_layer, *, r=16, dropout=0.0):
        check_rank(r)
        super().__init__(base_layer)
        device = base_layer.weight.device
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))
        self.scale = nn.Parameter(torch.ones((), device=device))

    def low_rank(self):
        return LowRank(self.lora_A, self.lora_B, d=self.scale.expand(len(self.lora_A)))

    def dropout_p(self):
        return self.dropout


SVFTLinear = ScaledLoRALinear
'''


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page has defined at its end, with the toy method in place of its example."""
    monkeypatch.chdir(tmp_path)
    replaced = 0
    found: dict[str, Any] = {}
    for block in BLOCKS:
        code, count = EXAMPLE.subn(lambda _: TOY, block)
        replaced += count
        found["base_model"] = tiny_llama()
        exec(compile(code, "docs/adding_a_method.md", "exec"), found)
    assert replaced == 1
    return found


@pytest.fixture
def in_the_table(names: dict[str, Any]) -> Iterator[str]:
    """The page's row in METHODS, which nothing but an edit of its file can add to."""
    (table,) = gc.get_referents(METHODS)
    table["scaled-lora"] = names["row"]
    yield "scaled-lora"
    del table["scaled-lora"]


def test_the_page_builds_another_method(names: dict[str, Any]) -> None:
    layer = names["ScaledLoRALinear"].from_linear(torch.nn.Linear(24, 32), r=4)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(8, 24)
    layer(x).square().mean().backward()
    assert layer._lora_fast_calls.fused == 1
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert trained.keys() == {"lora_A", "lora_B", "scale"}
    exact = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    base = layer.base_layer
    low_rank = (x @ exact["lora_A"].T) @ exact["lora_B"].T
    y = x @ base.weight.T + base.bias + exact["scale"] * low_rank
    y.square().mean().backward()
    found, expected = ({n: p.grad for n, p in of.items()} for of in (trained, exact))
    assert_models_agree(found, expected)


def test_what_peft_cannot_hold_is_refused_by_name(names: dict[str, Any], tmp_path: Path) -> None:
    kind = names["ScaledLoRALinear"]

    class WithGain(kind):  # type: ignore[misc, valid-type]
        def gain(self) -> torch.Tensor:
            return torch.ones(self.out_features)

    model = lora_fast.convert(tiny_llama(), ["q_proj"], method=WithGain.from_linear)
    with pytest.raises(NotImplementedError, match="got WithGain, which has a gain"):
        lora_fast.save_adapter(model, tmp_path / "gain")
    other = lora_fast.convert(tiny_llama(), ["q_proj", "v_proj"], method=kind.from_linear)
    with pytest.raises(NotImplementedError, match="saved as LoRA; load the folder with PEFT"):
        lora_fast.load_adapter(other, names["folder"])
    with pytest.raises(ValueError, match="must be given to `method`"):
        lora_fast.convert(tiny_llama(), ["q_proj"], method=kind.from_linear, r=4)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_command_line_trains_merges_and_plans_it(
    in_the_table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], quantize: str
) -> None:
    base = save_llama(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    run = (
        *("train", "--model", base, "--task", "causal-lm", "--data", data, "--steps", 3),
        *("--method", in_the_table, "--quantize", quantize, "--r", 4, "--out", "run"),
    )
    assert run_cli(*run, "--alpha", 8) == 2
    assert "takes no --alpha: its numbers learn the scale" in capsys.readouterr().err
    assert run_cli(*run) == 0
    assert "14 of 14 adapted layers fused" in " ".join(capsys.readouterr().out.split())
    assert metrics_of(Path("run"))["fused"]["all_fused"]
    assert run_cli("merge", base, "run", "merged") == 0
    card = re.findall(r"^```python\n(.*?)^```$", Path("run/README.md").read_text(), re.M | re.S)
    loaded: dict[str, Any] = {}
    exec(card[0], loaded)
    ids = torch.arange(6).reshape(1, 6)
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        moved = (merged(ids).logits - plain(ids).logits).abs().max()
        assert moved > 0
        if quantize == "none":
            torch.testing.assert_close(loaded["model"](ids).logits, merged(ids).logits)


def test_an_interrupted_run_of_it_goes_on(in_the_table: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    data = write_jsonl(tmp_path / "data.jsonl", ROWS)
    config = TrainConfig(
        model=str(base), data=str(data), task="causal-lm", method=in_the_table, quantize="none",
        steps=4, save_every=2,
    )  # fmt: skip
    whole = run(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(config, tmp_path / "cut", AtStep("lora_fast", 2, interrupt))
    cut = run(config, tmp_path / "cut", resume=True)
    losses = [outcome.metrics["results"]["lora_fast"]["losses"] for outcome in (whole, cut)]
    assert losses[0] == losses[1]
