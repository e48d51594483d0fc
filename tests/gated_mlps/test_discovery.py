"""Gated MLPs are found by what their forward computes, and nothing else is taken for one."""

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gated_models import ByMethod, Parts, Split, linears_of
from model_families import tiny_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lora_fast.gated_mlps.discovery import GatedMLP, Proof, prove

SILU = GatedMLP("silu", "gate", "up", "down")
OF_LLAMA = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FUSED = {"gate": "gate_up_proj", "up": None, "down": "down_proj"}
FAMILIES: dict[str, GatedMLP] = {
    **{
        name: GatedMLP("silu", **OF_LLAMA)  # type: ignore[arg-type]
        for name in (
            "llama", "qwen2", "qwen3", "mistral", "granite", "olmo", "olmo2", "smollm3",
            "deepseek_v2", "deepseek_v3", "stablelm", "qwen2_moe", "glm4_moe", "seed_oss",
        )
    },
    **{
        name: GatedMLP("gelu_tanh", **OF_LLAMA)  # type: ignore[arg-type]
        for name in ("gemma", "gemma2", "gemma3_text", "recurrent_gemma")
    },
    **{
        name: GatedMLP("silu", **FUSED)  # type: ignore[arg-type]
        for name in ("phi3", "glm", "glm4")
    },
    "lfm2": GatedMLP("silu", "w1", "w3", "w2"),
    "modernbert": GatedMLP("gelu", "Wi", None, "Wo"),
}  # fmt: skip
# Families whose MLP computes something else, and what.
OTHERS = {
    "gpt_neox": "not down",
    "falcon_h1": "multiplies by a value",
    "bitnet": "reads dtype",
    "umt5": "multiplies by a value",
    "t5": "reads weight of wo",
}


def proofs_of(model: nn.Module) -> dict[str, Proof]:
    """By the class of the module, of those that are not for attention or a head."""
    return {
        type(m).__name__: prove(m, linears_of(m)) for m in model.modules() if len(linears_of(m)) > 1
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    found = [proof.mlp for proof in proofs_of(tiny_model(family)).values()]
    assert [mlp for mlp in found if mlp is not None] == [FAMILIES[family]]


@pytest.mark.parametrize("family", OTHERS)
def test_other_family(family: str) -> None:
    proofs = proofs_of(tiny_model(family))
    assert not any(proof.mlp for proof in proofs.values())
    assert any(OTHERS[family] in str(proof.reason) for proof in proofs.values())


# Families whose whole models are large, or younger than the oldest transformers.
CLASSES = {
    "gemma3n.modeling_gemma3n.Gemma3nTextMLP": "gelu_tanh",
    "gemma4.modeling_gemma4.Gemma4TextMLP": "gelu_tanh",
    "llama4.modeling_llama4.Llama4TextMLP": "silu",
    "qwen3_5.modeling_qwen3_5.Qwen3_5MLP": "silu",
    "qwen3_next.modeling_qwen3_next.Qwen3NextMLP": "silu",
}


@pytest.mark.parametrize(
    "path", [p for p in CLASSES if find_spec(f"transformers.models.{p.partition('.')[0]}")]
)
def test_class(path: str) -> None:
    home, _, name = path.rpartition(".")
    cls = getattr(import_module(f"transformers.models.{home}"), name)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for child in ("gate_proj", "up_proj", "down_proj"):
        setattr(module, child, nn.Linear(4, 4))
    act = ACT2FN["silu" if CLASSES[path] == "silu" else "gelu_pytorch_tanh"]
    module.act_fn = module.activation_fn = act
    module.activation_sparsity = 0.0
    found = prove(module, linears_of(module))
    assert found.mlp == GatedMLP(CLASSES[path], **OF_LLAMA)  # type: ignore[arg-type]
    module.activation_sparsity = 0.5
    assert found.holds(module) == ("gemma3n" not in path)


class Reordered(Parts):
    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up(hidden)
        y = up * self.act(self.gate(hidden))
        return self.down(y)


class ByNames(Parts):
    """Which of the layers is the gate does not depend on its name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.mul(self.gate(x), F.silu(self.up(x))))


class ReLUSquared(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.gate(x)) ** 2 * self.up(x))


class ReLUTimesReLU(Parts):
    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x).relu()
        return self.down(g * g * self.up(x))


class Chunked(Parts):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.chunk(self.gate_up(x), 2, dim=-1)
        return self.down(F.silu(gate) * up)


class Sliced(Parts):
    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        return self.down(F.silu(both[..., : self.width]) * both[..., self.width :])


def swiglu(x: Any) -> Any:
    x = torch.chunk(x, 2, dim=-1)
    return F.silu(x[0]) * x[1]


class ByFunction(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Conditional(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if self.config.pretraining.tp > 1:
            return sum(self.config.parts)  # type: ignore[return-value]
        gate = self.gate(x)
        if self.sparsity > 0.0:
            gate = gate - gate.mean()
        return self.down(self.act(gate) * self.up(x))


class BySuper(ByMethod):
    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        return super().forward(x)


TANH = functools.partial(F.gelu, approximate="tanh")


@pytest.mark.parametrize(
    ("module", "mlp"),
    [
        (Parts(), SILU),
        (Reordered(), SILU),
        (ByNames(), GatedMLP("silu", "up", "gate", "down")),
        (Parts(nn.GELU()), SILU._replace(activation="gelu")),
        (Parts(nn.GELU(approximate="tanh")), SILU._replace(activation="gelu_tanh")),
        (Parts(TANH), SILU._replace(activation="gelu_tanh")),
        (Parts(F.silu), SILU),
        (Parts(torch.relu), SILU._replace(activation="relu")),
        (Parts(nn.ReLU()), SILU._replace(activation="relu")),
        (Parts(nn.Sequential()), None),
        (ReLUSquared(), SILU._replace(activation="relu2")),
        (ReLUTimesReLU(), SILU._replace(activation="relu2")),
        (Chunked(), GatedMLP("silu", "gate_up", None, "down")),
        (Split(), GatedMLP("silu", "gate_up", None, "down")),
        (Sliced(), GatedMLP("silu", "gate_up", None, "down")),
        (ByFunction(), GatedMLP("silu", "gate_up", None, "down")),
        (Conditional(), SILU),
        (ByMethod(), SILU),
        (BySuper(), SILU),
    ],
    ids=lambda value: type(value).__name__,
)
def test_forms(module: nn.Module, mlp: GatedMLP | None) -> None:
    assert prove(module, linears_of(module)).mlp == mlp


def test_a_proof_computes_nothing_and_changes_nothing() -> None:
    module = Parts()
    before, state = dict(module.__dict__), torch.get_rng_state()
    with torch.device("meta"):
        proof = prove(module, linears_of(module))
    assert proof.mlp == SILU
    assert module.__dict__ == before
    assert torch.equal(torch.get_rng_state(), state)
