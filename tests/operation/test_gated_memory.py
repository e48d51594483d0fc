"""The memory of a gated MLP: what is saved for backward, and that all of it is written."""

from __future__ import annotations

import pytest
import torch
from gated_checks import BF16, MEMBERS, MLP, eager, exact, make
from gated_checks import fused as fused_mlp

from bench.instruments.accuracy import assert_accurate, orders
from bench.instruments.saved_tensors import SavedTensors
from lora_fast import set_backend
from lora_fast.backends import torch_gated_rows
from lora_fast.gated import ACTIVATIONS

BYTES = {
    "three linears": ({}, 1.06),
    "one linear for gate and up": ({"fused": True}, 1.06),
    "biases": ({"biased": MEMBERS}, 1.06),
    "NF4": ({"nf4": MEMBERS}, 1.06),
}


def saved_bytes(M, H, width, **changes):
    """Storages, each once, without parameters; and what x, gate, up and the S take."""
    mlp = MLP(BF16, M=M, H=H, intermediate=width, ranks=(8, 8, 8), **changes)
    o = make(mlp)
    parameters = [t for n, t in o.leaves.items() if n != "x"]
    parameters += [getattr(weight, "packed", weight) for weight in o.weights.values()]
    with SavedTensors(parameters) as saved:
        y = fused_mlp(o, o.leaves)
    assert y.requires_grad
    elements = H + 2 * width + 8 * len(mlp.members)
    return saved.bytes, M * 2 * elements


@pytest.mark.parametrize(("changes", "most"), BYTES.values(), ids=list(BYTES))
def test_saved_bytes(changes, most):
    M, H, width = 64, 512, 1408
    found, expected = saved_bytes(M, H, width, **changes)
    assert found == expected
    assert found <= most * M * 2 * (H + 2 * width)


@pytest.mark.interpreter
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_that_the_kernels_save(p):
    """With dropout no more: its seeds are numbers."""
    with set_backend("triton"):
        found, expected = saved_bytes(16, 64, 176, p=p)
    assert found == expected


@pytest.fixture
def filled_with_nan(monkeypatch):
    """Memory that is offered holds NaN until something is written to it."""
    offered = torch_gated_rows._Product.memory_beside_S

    def filled(self, rows):
        memory = offered(self, rows)
        return memory if memory is None else memory.fill_(torch.nan)

    monkeypatch.setattr(torch_gated_rows._Product, "memory_beside_S", filled)


@pytest.mark.usefixtures("native_dtypes", "filled_with_nan")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "in one"])
def test_every_activation_writes_where_it_is_told(activation, fused):
    """More rows than columns: h lies beside its S, and both are read at once."""
    o = make(MLP(BF16, M=70, H=32, intermediate=48, activation=activation, fused=fused))
    double = {name: leaf.detach().double() for name, leaf in o.leaves.items()}
    with torch.no_grad():
        y = fused_mlp(o, o.leaves)
        eagers = orders(lambda: eager(o, o.leaves))
        expected = exact(o, double)
    assert_accurate(y, expected, eagers, name="y", compute_dtype=BF16, layers=2)
