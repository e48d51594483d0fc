"""Gated MLPs are found by what their forward computes, and nothing else is taken for one."""

from __future__ import annotations

import copy
import functools
from importlib import import_module
from importlib.util import find_spec
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


def linears_of(module: nn.Module) -> dict[str, Any]:
    return {n: c for n, c in module._modules.items() if isinstance(c, nn.Linear)}


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


class MLP(nn.Module):
    """The parts of a gated MLP; a subclass has the forward."""

    def __init__(self, act: Any = None, width: int = 6) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, width), nn.Linear(4, width)
        self.down, self.gate_up = nn.Linear(width, 4), nn.Linear(4, 2 * width)
        self.act = nn.SiLU() if act is None else act
        self.width, self.sparsity, self.calls = width, 0.0, 0
        self.config = SimpleNamespace(pretraining=SimpleNamespace(tp=1), parts=[])

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Reordered(MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up(hidden)
        y = up * self.act(self.gate(hidden))
        return self.down(y)


class ByNames(MLP):
    """Which of the layers is the gate does not depend on its name."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.mul(self.gate(x), F.silu(self.up(x))))


class ReLUSquared(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.gate(x)) ** 2 * self.up(x))


class ReLUTimesReLU(MLP):
    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x).relu()
        return self.down(g * g * self.up(x))


class Chunked(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.chunk(self.gate_up(x), 2, dim=-1)
        return self.down(F.silu(gate) * up)


class Split(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).split(self.width, dim=-1)
        return self.down(up * F.silu(gate))


class Sliced(MLP):
    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        return self.down(F.silu(both[..., : self.width]) * both[..., self.width :])


def swiglu(x: Any) -> Any:
    x = torch.chunk(x, 2, dim=-1)
    return F.silu(x[0]) * x[1]


class ByFunction(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))


class Conditional(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if self.config.pretraining.tp > 1:
            return sum(self.config.parts)  # type: ignore[return-value]
        gate = self.gate(x)
        if self.sparsity > 0.0:
            gate = gate - gate.mean()
        return self.down(self.act(gate) * self.up(x))


class ByMethod(MLP):
    @property
    def activation(self) -> Any:
        return self.act

    def gated(self, x: Tensor) -> Tensor:
        return self.activation(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gated(x))


class BySuper(ByMethod):
    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        return super().forward(x)


TANH = functools.partial(F.gelu, approximate="tanh")


@pytest.mark.parametrize(
    ("module", "mlp"),
    [
        (MLP(), SILU),
        (Reordered(), SILU),
        (ByNames(), GatedMLP("silu", "up", "gate", "down")),
        (MLP(nn.GELU()), SILU._replace(activation="gelu")),
        (MLP(nn.GELU(approximate="tanh")), SILU._replace(activation="gelu_tanh")),
        (MLP(TANH), SILU._replace(activation="gelu_tanh")),
        (MLP(F.silu), SILU),
        (MLP(torch.relu), SILU._replace(activation="relu")),
        (MLP(nn.ReLU()), SILU._replace(activation="relu")),
        (MLP(nn.Sequential()), None),
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
    module = MLP()
    before, state = dict(module.__dict__), torch.get_rng_state()
    with torch.device("meta"):
        proof = prove(module, linears_of(module))
    assert proof.mlp == SILU
    assert module.__dict__ == before
    assert torch.equal(torch.get_rng_state(), state)


COUNTS = {"calls": 0}
SEEN: list[Any] = []
SCALE = 1.0


class Counts(MLP):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class CountsGlobally(MLP):
    def forward(self, x: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return super().forward(x)


class Appends(MLP):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(1)
        return super().forward(x)


class Prints(MLP):
    def forward(self, x: Tensor) -> Tensor:
        print("forward")
        return super().forward(x)


class Catches(MLP):
    def forward(self, x: Tensor) -> Tensor:
        try:
            y = x + 1
        except Exception:
            y = x
        return super().forward(y)


class ChangesX(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x *= x
        return super().forward(x)


class InPlace(MLP):
    def forward(self, x: Tensor) -> Tensor:
        F.silu(x, inplace=True)
        return super().forward(x)


class OtherHalf(MLP):
    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class OtherDim(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=1)
        return self.down(F.silu(gate) * up)


class Thirds(MLP):
    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        return self.down(F.silu(both[..., :4]) * both[..., 4:])


class CallsTwice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        self.up(x)
        return super().forward(x)


class GateOfGate(MLP):
    def forward(self, x: Tensor) -> Tensor:
        g = self.gate(x)
        return self.down(self.act(g) * g)


class ActivatesTwice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.act(self.up(x)))


class Adds(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Branches(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class InTuple(MLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class ReadsWeight(MLP):
    def forward(self, x: Tensor) -> Any:
        return self.down(F.silu(F.linear(x, self.gate.weight)) * self.up(x))


class Draws(MLP):
    def forward(self, x: Tensor) -> Any:
        torch.rand(3)
        return super().forward(x)


class Drops(MLP):
    def forward(self, x: Tensor) -> Any:
        return self.down(F.dropout(self.act(self.gate(x)) * self.up(x), 0.1, self.training))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Counts, "changes calls"),
        (CountsGlobally, "changes a value"),
        (Appends, "SEEN"),
        (Prints, "calls print"),
        (Catches, "calls add"),
        (ChangesX, "calls imul"),
        (InPlace, "in place"),
        (OtherHalf, "not down"),
        (OtherDim, "chunk"),
        (Thirds, "no half"),
        (CallsTwice, "more than once"),
        (GateOfGate, "not down"),
        (ActivatesTwice, "not down"),
        (Adds, "calls"),
        (Branches, "reads sum"),
        (InTuple, "not down"),
        (ReadsWeight, "reads weight of gate"),
        (Draws, "calls rand"),
        (Drops, "drops elements"),
    ],
)
def test_what_is_no_gated_mlp(cls: type[MLP], reason: str) -> None:
    module = cls()
    proof = prove(module, linears_of(module))
    assert proof.mlp is None
    assert reason in str(proof.reason)
    assert module.calls == 0
    assert (COUNTS, SEEN) == ({"calls": 0}, [])


def act_is_gelu(module: Any) -> None:
    module.act = nn.GELU()


def forward_is_replaced(module: Any) -> None:
    module.forward = MethodType(lambda self, x: x, module)


def forward_of_class_is_replaced(module: Any) -> None:
    type(module).forward = lambda self, x: x


def method_is_replaced(module: Any) -> None:
    module.gated = lambda x: x


def forward_of_activation_is_replaced(module: Any) -> None:
    module.act.forward = lambda x: x


@pytest.mark.parametrize(
    "change",
    [
        act_is_gelu,
        forward_is_replaced,
        forward_of_class_is_replaced,
        method_is_replaced,
        forward_of_activation_is_replaced,
    ],
)
def test_what_a_proof_relies_on_may_change(change: Any) -> None:
    class Own(ByMethod):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gated(x))

    module = Own()
    proof = prove(module, linears_of(module))
    assert proof.mlp == SILU
    assert proof.holds(module)
    assert not proof.holds(copy.deepcopy(module))
    change(module)
    assert not proof.holds(module)
    expected = SILU._replace(activation="gelu") if change is act_is_gelu else None
    assert prove(module, linears_of(module)).mlp == expected


class OfConfig(MLP):
    def forward(self, x: Tensor) -> Tensor:
        if self.config.pretraining.tp > 1 or self.sparsity > SCALE:
            return x
        return super().forward(x)


@pytest.mark.parametrize("changed", ["config", "attribute", "global"])
def test_a_condition_may_change(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = OfConfig()
    proof = prove(module, linears_of(module))
    assert proof.mlp == SILU
    if changed == "config":
        module.config.pretraining.tp = 2
    elif changed == "attribute":
        module.sparsity = 2.0
    else:
        monkeypatch.setitem(globals(), "SCALE", -1.0)
    assert not proof.holds(module)
    assert prove(module, linears_of(module)).mlp is None


def test_linears_are_read_at_each_call_and_no_part_of_a_proof() -> None:
    module: Any = MLP()
    proof = prove(module, linears_of(module))
    module.gate = nn.Linear(4, 6)
    assert proof.holds(module)
    module = Split()
    proof = prove(module, linears_of(module))
    module.gate_up = nn.Linear(4, 14)  # its width was read
    assert not proof.holds(module)
    assert prove(module, linears_of(module)).mlp is None


def liger_class(name: str) -> Any:
    """A forward that calls a kernel, in the module and under the name of Liger's."""

    def forward(self: Any, x: Tensor) -> Tensor:
        raise AssertionError("runs on a GPU")

    forward.__module__, forward.__qualname__ = "liger_kernel.transformers.swiglu", f"{name}.forward"
    return forward


@pytest.mark.parametrize("on_instance", [True, False])
@pytest.mark.parametrize(
    ("name", "mlp"),
    [
        ("LigerSwiGLUMLP", GatedMLP("silu", "gate_proj", "up_proj", "down_proj")),
        ("LigerGEGLUMLP", GatedMLP("gelu_tanh", "gate_proj", "up_proj", "down_proj")),
        ("LigerPhi3SwiGLUMLP", GatedMLP("silu", "gate_up_proj", None, "down_proj")),
        ("LigerUnknown", None),
    ],
)
def test_liger_is_known_by_its_class(name: str, mlp: GatedMLP | None, on_instance: bool) -> None:
    class Patched(nn.Module):
        forward = liger_class(name)

    module = MLP() if on_instance else Patched()
    if on_instance:
        module.forward = MethodType(liger_class(name), module)  # type: ignore[method-assign]
    assert prove(module, linears_of(module)).mlp == mlp
