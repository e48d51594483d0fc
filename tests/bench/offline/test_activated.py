"""A decoder layer's linears and activation: launches, memory and the modelled time of the layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.instruments import stub_driver
from bench.offline import activated, contestants, layers, nemo_graph
from bench.offline.operations import OperationCounter
from lora_fast.tuning.rooflines import ROOFLINES

pytestmark = [pytest.mark.offline, pytest.mark.usefixtures("allocating_as_users_do")]

DENSE, NF4 = activated.CASES
WIDE = DENSE.M * DENSE.shape.intermediate * layers.DTYPE.itemsize


def test_the_adapters_cost_less_than_the_activation_of_the_frozen_layer_saves() -> None:
    """With e = 1 for the products of cuBLAS, and no product of ours."""
    ours = activated.rows((DENSE,), ("lora_fast",))
    assert [row["arch"] for row in ours] == [roofline.arch for roofline in ROOFLINES]
    for row in ours:
        (ratio,) = row["over_frozen"].values()
        assert ratio <= 1.0, row
        assert row["launches"] == 35, row


def test_others_cost_more_and_save_as_much_or_more() -> None:
    found = {row["who"]: row for row in activated.rows((DENSE,), activated.WHO[:-1])}
    ours, _ = contestants.LoraFast(replace(DENSE, activates=True)).step(
        replace(DENSE, activates=True), 90
    )
    assert ours.saved_bytes < found["unsloth"]["saved_bytes"] * 1.02
    order = ("frozen", "nemo, op fuser", "unsloth", "nemo", "peft + liger", "peft")
    times = [found[who]["over_frozen"]["H100"] for who in order]
    assert times == sorted(times) and times[0] == 1.0
    assert found["peft + liger"]["saved_bytes"] < found["peft"]["saved_bytes"]


def test_nemo_saves_the_input_of_every_adapter_beside_gate_and_up() -> None:
    shape, M, R, e = DENSE.shape, 64, 16, layers.DTYPE.itemsize
    inputs = 2 * shape.hidden + shape.q_width + shape.intermediate
    for kind in nemo_graph.KINDS:
        step = nemo_graph.step(shape, M, R, kind)
        assert step.saved_bytes == M * e * (inputs + 4 * R + 2 * shape.intermediate)
        assert step.flops == _flops_of_nemo(shape, M, R)


def _flops_of_nemo(shape: layers.Shape, M: int, R: int) -> int:
    """W twice, A and B three times: one A for q, k and v, one for gate and up."""
    of_weights = sum(N * K for N, K in shape.linears.values())
    inputs = 2 * shape.hidden + shape.q_width + shape.intermediate
    outputs = sum(N for N, _ in shape.linears.values())
    return 2 * M * (2 * of_weights + 3 * R * (inputs + outputs))


@pytest.mark.parametrize(
    ("kind", "launches", "passes_over_y", "passes_over_x"),
    [
        # Scaling and sum, the scaling of dY; A and dA read x, the sum of dX reads two, writes one.
        ("nemo", (21, 29), 1 + 2 + 3 + 2 + 2, 2 + 1 + 3),
        # y and dX are read and written once more by the products that add to them.
        ("nemo, op fuser", (13, 21), 2 + 2, 2 + 1 + 1),
    ],
)
def test_the_graph_of_nemo_moves_what_its_launches_read_and_write(
    kind: str, launches: tuple[int, int], passes_over_y: int, passes_over_x: int
) -> None:
    """Beside the four frozen products and one pass of the activation in each direction."""
    shape, M, R, e = DENSE.shape, 8192, 16, layers.DTYPE.itemsize
    step = nemo_graph.step(shape, M, R, kind)
    assert (len(step.forward), len(step.backward)) == launches
    linears = list(shape.linears.values())
    y = M * e * sum(N for N, _ in linears)
    x = M * e * (2 * shape.hidden + shape.q_width + shape.intermediate)
    frozen = 2 * (x + y + e * sum(N * K for N, K in linears))
    activation = (3 + 5) * M * shape.intermediate * e
    # S is written once and read twice, dS too; A, B, dA and dB are read or written three times.
    narrow = e * R * (4 * 6 * M + 3 * (x + y) // (M * e))
    wide = step.bytes - frozen - activation - narrow
    assert wide == passes_over_y * y + passes_over_x * x


class _Allocations(TorchDispatchMode):
    """Results as large as gate, of PyTorch's operations; the launchers allocate by new_empty."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= WIDE:
                key = t.untyped_storage()._cdata
                if key not in self._seen:
                    self._seen.add(key)
                    self.found.append(func.overloadpacket.__name__)
        return result


def test_no_matrix_is_as_large_as_gate_but_gate_up_h_and_dh() -> None:
    case = replace(DENSE, activates=True)
    ours = contestants.LoraFast(case)
    x = torch.empty(1, case.M, case.shape.hidden, dtype=layers.DTYPE).requires_grad_()
    trained = [p for p in ours.model.parameters() if p.requires_grad]
    allocated = _Allocations()
    with (
        contestants.on_routes(fused=False),
        stub_driver.recording(90),
        OperationCounter(compute=False),
        allocated,
    ):
        y = ours.model(x)
        torch.autograd.grad(y, [x, *trained], torch.empty_like(y))
    # gate, up and dh are products, h is what the kernel writes.
    assert sorted(allocated.found) == ["mm", "mm", "mm", "new_empty"]
