"""LoRA+ parameter groups, and the optimizers that take them."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from lora_models import K, Mlp, N, lora_config, peft_model
from peft import VeraConfig, get_peft_model
from torch import nn

import lora_fast
from lora_fast.features import installed
from lora_fast.optim import loraplus_param_groups


class Embedded(nn.Module):
    """An embedding, a norm with a bias, two linear layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, K)
        self.norm = nn.LayerNorm(K)
        self.mlp = Mlp()
        self.head = nn.Linear(N, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp(self.norm(self.embed(ids))))


def _names(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in groups}


def test_every_parameter_is_where_the_paper_has_it() -> None:
    config = lora_config(
        target_modules=["embed", "fc1", "fc2"], modules_to_save=["head"], bias="all"
    )
    model = get_peft_model(Embedded(), config)
    groups = loraplus_param_groups(model, 1e-3, 8.0, 0.05, embedding_lr=2e-6)
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert rates == {
        "A": (1e-3, 0.05),
        "embedding": (2e-6, 0.05),
        "B": (8e-3, 0.05),
        "B, no decay": (8e-3, 0.0),
    }
    names = _names(model, groups)
    parts = {group: {n.removeprefix("base_model.model.") for n in names[group]} for group in names}
    assert parts["A"] == {
        "mlp.fc1.lora_A.default.weight",
        "mlp.fc2.lora_A.default.weight",
        "head.modules_to_save.default.weight",
    }
    assert parts["B"] == {"mlp.fc1.lora_B.default.weight", "mlp.fc2.lora_B.default.weight"}
    assert parts["embedding"] == {
        "embed.lora_embedding_A.default",
        "embed.lora_embedding_B.default",
    }
    assert parts["B, no decay"] == {
        "norm.bias",
        "mlp.fc1.base_layer.bias",
        "head.modules_to_save.default.bias",
    }
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_groups_are_those_of_peft() -> None:
    """The same rate and decay for every parameter of an ordinary LoRA model."""
    from peft.optimizers import create_loraplus_optimizer

    model = get_peft_model(Embedded(), lora_config(target_modules=["embed", "fc1", "fc2"]))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    ours = loraplus_param_groups(model, 1e-3, weight_decay=0.1)

    def rates(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
        return {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}

    found, expected = rates(ours), rates(theirs.param_groups)
    embedding = {id(p) for name, p in model.named_parameters() if "lora_embedding" in name}
    assert {found.pop(p) for p in embedding} == {(1e-6, 0.1)}
    # PEFT from 0.21 on gives those of embeddings their own rate, too; before, that of A.
    assert {expected.pop(p) for p in embedding} <= {(1e-6, 0.1), (1e-3, 0.1)}
    assert found == expected


def test_our_own_layers() -> None:
    model = lora_fast.convert(Mlp(), ["fc1", "fc2"], r=3)
    groups = loraplus_param_groups(model, 1e-3)
    assert _names(model, groups) == {
        "A": {"fc1.lora_A", "fc2.lora_A"},
        "B": {"fc1.lora_B", "fc2.lora_B"},
    }
    assert [g["lr"] for g in groups] == [1e-3, 1.6e-2]


def test_vera_vectors_go_to_the_side_they_scale() -> None:
    model = get_peft_model(Mlp(), VeraConfig(r=4, target_modules=["fc1"]))
    names = _names(model, loraplus_param_groups(model, 1e-3, weight_decay=0.1))
    assert {group: len(members) for group, members in names.items()} == {
        "A, no decay": 1,
        "B, no decay": 1,
    }
    assert "vera_lambda_d" in next(iter(names["A, no decay"]))


def test_shared_parameters_are_grouped_once() -> None:
    model = lora_fast.convert(Mlp(), ["fc1"], r=3)
    model.again = model.fc1
    groups = loraplus_param_groups(model, 1e-3)
    assert [len(g["params"]) for g in groups] == [1, 1]
    torch.optim.AdamW(groups)


_OPTIMIZERS = [torch.optim.AdamW, torch.optim.SGD]
if (installed("bitsandbytes") or ()) >= (0, 50):  # from there on they run on a CPU
    _OPTIMIZERS += [bnb.optim.AdamW8bit, bnb.optim.AdamW32bit, bnb.optim.PagedAdamW8bit]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", _OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_any_optimizer(optimizer: type[torch.optim.Optimizer]) -> None:
    """B moves by `ratio` times what it moves by at A's rate; A, at its own rate, as ever."""
    model = peft_model(model=Mlp(), r=8)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved = []
    for ratio in (1.0, 16.0):
        model.load_state_dict(start)
        o = optimizer(loraplus_param_groups(model, 1e-5, ratio))
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p) + 1.5
        o.step()
        moved.append(
            {n: (p.detach() - start[n]).norm().item() for n, p in model.named_parameters()}
        )
    for name in start:
        if "lora_" not in name:
            assert moved[0][name] == moved[1][name] == 0
        else:
            expected = 16.0 if "lora_B" in name else 1.0
            assert moved[1][name] / moved[0][name] == pytest.approx(expected, rel=0.02), name


def test_a_scheduler_keeps_the_ratio() -> None:
    model = lora_fast.convert(Mlp(), ["fc1"], r=3)
    optimizer = torch.optim.SGD(loraplus_param_groups(model, 1e-2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [5e-3, 8e-2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr must be a number of at least 0, got -1.0"),
        ({"lr": "1"}, "lr must be a number of at least 0, got '1'"),
        ({"lr": 1e-3, "ratio": 0}, "ratio must be a positive number, got 0"),
        ({"lr": 1e-3, "ratio": float("nan")}, "ratio must be a positive number, got nan"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay must be a number of at least 0"),
        ({"lr": 1e-3, "embedding_lr": None}, "embedding_lr must be a number of at least 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    model = lora_fast.convert(Mlp(), ["fc1"], r=3)
    with pytest.raises(ValueError, match=message):
        loraplus_param_groups(model, **arguments)


def test_models_without_a_trained_B() -> None:
    with pytest.raises(ValueError, match="model must have a lora_B that trains"):
        loraplus_param_groups(Mlp(), 1e-3)
    frozen = lora_fast.convert(Mlp(), ["fc1"], r=3)
    frozen.fc1.lora_B.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a lora_B that trains"):
        loraplus_param_groups(frozen, 1e-3)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        loraplus_param_groups([], 1e-3)  # type: ignore[arg-type]
