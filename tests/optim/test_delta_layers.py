"""Models that Delta-LoRA refuses, with a message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_models import Mlp, lora_config, peft_model
from peft import VeraConfig, get_peft_model
from torch import nn

import lora_fast
from lora_fast.optim import DeltaLoRA


def _wrapped(model: nn.Module, **arguments: Any) -> DeltaLoRA:
    trained = [p for p in model.parameters() if p.requires_grad]
    return DeltaLoRA(torch.optim.SGD(trained, lr=0.1), model, **{"c": 0.5, **arguments})


def _ours(**arguments: Any) -> nn.Module:
    return lora_fast.convert(Mlp(), ["fc1", "fc2"], r=3, **arguments)


def test_dropout() -> None:
    for model in (_ours(lora_dropout=0.1), peft_model(model=Mlp(), lora_dropout=0.1)):
        with pytest.raises(ValueError, match=r"must have no dropout before the adapters, got 0.1"):
            _wrapped(model.eval())


def test_merged_adapters() -> None:
    for model in (_ours(), peft_model(model=Mlp())):
        layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
        optimizer = _wrapped(model)
        layer.merge()
        with pytest.raises(ValueError, match=r"got a merged one at '.*fc1'"):
            _wrapped(model)
        before = layer.base_layer.weight.clone()
        with pytest.raises(RuntimeError, match=r"step\(\) must find unmerged adapters"):
            optimizer.step()
        assert torch.equal(layer.base_layer.weight, before) and optimizer.steps == 0


def test_switched_adapters() -> None:
    model = peft_model(model=Mlp())
    optimizer = _wrapped(model)
    model.add_adapter("other", lora_config())
    optimizer.step()
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"must find \['default'\] active .* got \['other'\]"):
        optimizer.step()
    assert optimizer.steps == 1
    model.set_adapter("default")
    optimizer.step()


def test_several_active_adapters() -> None:
    model = peft_model(model=Mlp())
    model.add_adapter("other", lora_config(r=2))
    model.base_model.set_adapter(["default", "other"])
    optimizer = _wrapped(model)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    names = ("default", "other")

    def product() -> torch.Tensor:
        return sum(
            layer.scaling[n] * layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double()
            for n in names
        ).detach()

    before, W = product(), layer.base_layer.weight.double()
    model(torch.randn(4, 24)).square().sum().backward()
    optimizer.step()
    delta, expected = layer.base_layer.weight.double() - W, 0.5 * (product() - before)
    assert expected.abs().max() > 1e-3
    assert (delta - expected).abs().max() < 1e-6 * expected.abs().max() + 2**-23 * W.abs().max()


@pytest.mark.parametrize("variant", [{"use_dora": True}], ids=str)
def test_variants(variant: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"must use plain LoRA, got DoraLinearVariant"):
        _wrapped(peft_model(model=Mlp(), **variant))


def test_other_methods_and_layers() -> None:
    with pytest.raises(NotImplementedError, match="vera_lambda_b"):
        _wrapped(
            nn.ModuleList([_ours(), get_peft_model(Mlp(), VeraConfig(r=4, target_modules=["fc1"]))])
        )
    model = nn.Sequential(nn.Embedding(5, 24), Mlp())
    with pytest.raises(NotImplementedError, match="lora_embedding_A"):
        _wrapped(get_peft_model(model, lora_config(target_modules=["0", "fc1"])))
    with pytest.raises(ValueError, match="model must have LoRA layers that the optimizer trains"):
        _wrapped(Mlp())


def test_layers_that_the_optimizer_does_not_train() -> None:
    model = _ours()
    optimizer = DeltaLoRA(torch.optim.SGD(model.fc2.parameters(), lr=0.1), model, c=0.5)
    assert [layer.name for layer in optimizer._layers] == ["fc2"]


def test_weights_that_are_shared_or_trained() -> None:
    model = _ours()
    model.head = nn.Linear(24, 40, bias=False)
    model.head.weight = model.fc1.base_layer.weight
    with pytest.raises(ValueError, match="the weight under 'fc1' must be its own"):
        _wrapped(model)
    model = _ours()
    model.fc2.base_layer.weight.requires_grad_()
    with pytest.raises(ValueError, match="the weight under 'fc2' must be frozen"):
        _wrapped(model)


def test_a_layer_with_two_names_is_one_layer() -> None:
    model = _ours()
    model.again = model.fc1
    assert [layer.name for layer in _wrapped(model)._layers] == ["fc1", "fc2"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"c": float("inf")}, ValueError, "c must be finite, got inf"),
        ({"c": "1"}, TypeError, "c must be a number, got str"),
        ({"start_step": -1}, ValueError, "start_step must be at least 0, got -1"),
        ({"start_step": 1.0}, TypeError, "start_step must be an int, got float"),
        ({"keep_start": 1}, TypeError, "keep_start must be a bool, got int"),
    ],
)
def test_wrong_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _wrapped(_ours(), **arguments)


def test_wrong_optimizers() -> None:
    model = _ours()
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got list"):
        DeltaLoRA([], model, c=1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be wrapped yet"):
        DeltaLoRA(_wrapped(model), model, c=1.0)

    class Averaging(torch.optim.SGD):
        def train(self) -> None: ...
        def eval(self) -> None: ...

    with pytest.raises(NotImplementedError, match="got Averaging, which swaps them"):
        DeltaLoRA(Averaging(model.fc1.parameters()), model, c=1.0)
