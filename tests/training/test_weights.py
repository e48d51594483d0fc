"""Weights that training changed: captured, restored, saved for other programs, refused if wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kinds import forced
from lora_models import Mlp, peft_model, quantised
from safetensors.torch import load_file
from torch import nn

from lora_fast.files.safe_files import TensorFiles
from lora_fast.training.weights import (
    base_weights,
    capture,
    load_weights,
    restore,
    save_weights,
    trained,
    unwrapped,
)


def disturb(model: nn.Module) -> None:
    """Change everything that trains, and every weight below an adapter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    for name, tensor in base_weights(model).items():
        if tensor.dtype == torch.uint8:
            tensor.copy_(255 - tensor)
        elif name.endswith(("weight", "absmax")):
            tensor.mul_(0.5)


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_all_that_was_captured_comes_back(kind: str) -> None:
    model = peft_model(kind, model=Mlp())
    x = torch.randn(3, 24)
    before = model(x)
    state = capture(model, frozen=True)
    disturb(model)
    assert not torch.equal(model(x), before)
    restore(model, state)
    assert torch.equal(model(x), before)


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_weights_below_adapters_load_into_a_model_without_them(kind: str, tmp_path: Path) -> None:
    model = peft_model(kind, model=Mlp())
    disturb(model)
    save_weights(unwrapped(base_weights(model)), tmp_path / "w.safetensors")
    stock: Any = Mlp() if kind == "dense" else quantised(Mlp())
    for name in ("fc1", "fc2"):
        layer = model.get_submodule(f"base_model.model.{name}.base_layer")
        if layer.bias is not None:
            stock.get_submodule(name).bias.data.copy_(layer.bias)
    assert load_weights(stock, tmp_path / "w.safetensors") is stock
    x = torch.randn(3, 24)
    with model.disable_adapter():
        assert torch.equal(stock(x), model(x))


def test_weights_load_into_packed_ones(tmp_path: Path) -> None:
    """A model that has been evaluated before them, on a CPU on which bitsandbytes packs."""

    def model() -> Any:
        return quantised(nn.Sequential(nn.Linear(64, 32, bias=False)), torch.float32)

    saved, x = model(), torch.randn(3, 64)
    save_weights(dict(saved.state_dict()), tmp_path / "w.safetensors")
    expected = saved(x)
    with forced("packed"), torch.no_grad():
        stock = model().eval()
        stock(x)
        load_weights(stock, tmp_path / "w.safetensors")
        for _ in range(2):
            assert torch.equal(stock(x), expected), "packed by the first call, to other absmax"


def test_what_trains_in_the_model_itself(tmp_path: Path) -> None:
    model, other = Mlp(), Mlp()
    model.fc2.requires_grad_(False)
    assert set(trained(model)) == {"fc1.weight", "fc1.bias"}
    save_weights(trained(model), tmp_path / "w.safetensors")
    before = other.fc2.weight.clone()
    load_weights(other, tmp_path / "w.safetensors")
    assert torch.equal(other.fc1.weight, model.fc1.weight)
    assert torch.equal(other.fc2.weight, before)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"fc3.weight": torch.zeros(2)}, "must hold parameters of this model, got fc3.weight"),
        ({"fc1.bias": torch.zeros(2)}, r"fc1.bias must have shape \(40,\), got \(2,\)"),
        (
            {"fc1.weight": torch.zeros(40, 24), "fc1.weight.absmax": torch.zeros(9)},
            "fc1.weight must have shape",
        ),
        ({"fc1.weight.absmax": torch.zeros(9)}, "must hold fc1.weight, got its constants only"),
    ],
)
def test_files_that_do_not_fit_change_nothing(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    model = Mlp()
    before = {name: p.clone() for name, p in model.named_parameters()}
    good = {"fc2.weight": torch.ones(20, 40)}
    save_weights({**good, **tensors}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "w.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_files_that_are_cut_off_or_lack_something_change_nothing(tmp_path: Path) -> None:
    model, path = peft_model(model=Mlp()), tmp_path / "w.safetensors"
    state = capture(model, frozen=False)
    disturb(model)
    before = capture(model, frozen=False)
    state.pop(next(iter(state)))
    save_weights(state, path)
    for source in (state, path):
        with pytest.raises(ValueError, match="must hold all that trains, misses base_model"):
            restore(model, source)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        restore(model, path)
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "absent.safetensors")
    for name, tensor in capture(model, frozen=False).items():
        assert torch.equal(tensor, before[name]), name


def test_a_wrong_shape_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights({"fc1.weight": torch.zeros(41, 24)}, tmp_path / "w.safetensors")
    monkeypatch.setattr(TensorFiles, "tensor", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match=r"fc1\.weight must have shape"):
        load_weights(Mlp(), tmp_path / "w.safetensors")


def test_a_quantised_weight_needs_a_quantised_model(tmp_path: Path) -> None:
    model = peft_model("nf4", model=Mlp())
    save_weights(unwrapped(base_weights(model)), tmp_path / "w.safetensors")
    assert "fc1.weight.absmax" in load_file(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"fc1.weight must have shape \(40, 24\)"):
        load_weights(Mlp(), tmp_path / "w.safetensors")
