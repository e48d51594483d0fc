"""One layer of each kind, for a model that is not loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import LLAMA

import lora_fast
from lora_fast.acceleration.warm_up import units, warm_up
from lora_fast.planning.replica import replica

DEFAULTS = {
    "method": "lora",
    "quantize": "none",
    "r": None,
    "dropout": None,
    "target_modules": None,
    "dtype": "bfloat16",
}
ATTENTION, MLP = "model/layers/0/self_attn", "model/layers/0/mlp"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("llama")
    LLAMA.save_pretrained(folder)
    return str(folder)


def test_nothing_is_allocated_before_it_is_wanted(llama):
    layers = replica(llama, **DEFAULTS)
    assert layers.alike == {ATTENTION: 3, MLP: 3}
    assert all(p.is_meta for p in layers.parameters())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("method", ["lora", "vera", "adalora", "lora-fa"])
def test_every_kind_of_layer_runs_fused(llama, method, quantize):
    layers = replica(llama, **{**DEFAULTS, "method": method, "quantize": quantize, "r": 4})
    layers.materialise(torch.device("cpu"))
    assert lora_fast.report(layers).all_fused
    assert not any(t.is_meta for t in [*layers.parameters(), *layers.buffers()])
    base = layers.get_submodule(f"{ATTENTION}.q_proj").base_layer
    assert type(base).__name__ == ("Linear4bit" if quantize == "nf4" else "Linear")
    if quantize == "nf4":
        assert base.weight.quant_state.nested
        assert tuple(base.weight.quant_state.shape) == (64, 64)
    assert warm_up(layers.train(), 8) == len(units(layers))


def test_siblings_are_computed_together(llama):
    layers = replica(llama, **DEFAULTS)
    layers.materialise(torch.device("cpu"))
    assert [str(unit) for unit in units(layers)] == [
        f"{ATTENTION}.q_proj, k_proj, v_proj",
        f"{ATTENTION}.o_proj",
        MLP,
    ]


def test_shared_matrices_stay_shared(llama):
    layers = replica(llama, **{**DEFAULTS, "method": "vera", "r": 8})
    layers.materialise(torch.device("cpu"))
    q, o = (layers.get_submodule(f"{ATTENTION}.{name}_proj") for name in "qo")
    assert q.vera_A.default is o.vera_A.default


def test_the_dtype_and_the_targets_are_those_asked_for(llama):
    asked = {**DEFAULTS, "dtype": "float16", "target_modules": "down_proj", "r": 3}
    layers = replica(llama, **asked)
    assert layers.alike == {MLP: 3}
    layer = layers.get_submodule(f"{MLP}.down_proj")
    assert layer.base_layer.weight.dtype == torch.float16
    assert tuple(layer.lora_A.default.weight.shape) == (3, 144)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "bitfit"}, "method must be one with fused layers: lora"),
        ({"method": "dora", "quantize": "nf4"}, "quantize must be none for method dora"),
        ({"quantize": "int8"}, "quantize must be one of nf4, none"),
        ({"r": 0}, "r must be at least 1"),
    ],
)
def test_options_are_checked(llama, options, text):
    with pytest.raises(ValueError, match=text):
        replica(llama, **{**DEFAULTS, **options})
