"""What is counted of a step of a block of experts, and of models of others' graphs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from expert_models import FUSES
from pictures import check_all

from bench.expert_blocks import Block, R
from bench.expert_counts import CONTESTANTS, KERNELS, TORCH, counts
from bench.expert_graphs import MODELS
from bench.expert_plots import draw, markdown

pytestmark = pytest.mark.skipif(not FUSES, reason="needs PEFT 0.19.1 and transformers' flags")
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "experts"
E, k, H, I, TOKENS = 64, 2, 128, 64, 16  # noqa: E741
PLACES = TOKENS * k
SAVED = 2 * PLACES * (2 * I + 2 * R) + 2 * 8 * PLACES + 4 * E


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_step_of_experts_makes_no_tensor_of_their_size(interleaved: bool) -> None:
    block = Block("tiny", E=E, k=k, H=H, I=I, interleaved=interleaved)
    rows = {name: counts(block, TOKENS, name) for name in ("frozen", "peft", *MODELS, TORCH)}
    assert rows["peft"]["largest"] >= rows["peft"]["weight"]
    # But for the gradients of the adapters, the largest is one of the rows' own tensors.
    adapters = E * R * max(3 * I, 3 * H)
    assert rows[TORCH]["largest"] <= 2 * max(adapters, TOKENS * k * H)
    assert rows[TORCH]["largest"] < rows[TORCH]["weight"]
    assert rows[TORCH]["saved"] == SAVED
    for name in MODELS:
        assert rows[TORCH]["saved"] < rows[name]["saved"] < rows["peft"]["saved"]
        assert rows[name]["largest"] < rows[name]["weight"]
    # Rows gathered, before the gate, after it, and before they are weighted.
    kept = PLACES * (H + H + 2 * I + I)
    assert rows["unsloth"]["saved"] >= 2 * kept
    # One launch of a projection in forward, three in backward, beside the gate and the routing.
    assert rows["axolotl"]["launches"] < rows["frozen"]["launches"]


def test_the_picture_and_the_table_of_the_results(tmp_path: Path) -> None:
    rows = json.loads((RESULTS / "counts.json").read_text())
    assert {row["contestant"] for row in rows} == set(CONTESTANTS)
    assert markdown(rows) + "\n" == (RESULTS / "table.md").read_text()
    assert markdown(rows) in (RESULTS.parents[2] / "docs" / "results.md").read_text()
    check_all(lambda: draw(rows, tmp_path / "experts.png"))


@pytest.mark.offline
def test_kernels_save_the_same_in_fewer_launches() -> None:
    block = Block("tiny", E=E, k=k, H=H, I=I)
    found, torch = (counts(block, TOKENS, name) for name in (KERNELS, TORCH))
    assert found["launches"] < torch["launches"]
    assert found["bytes"] < torch["bytes"]
    assert found["largest"] < found["weight"]
    assert found["saved"] <= SAVED + 4 * PLACES
