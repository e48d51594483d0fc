"""Layers that share their input, in torch.compile: one operator with the bits of eager mode."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from attentions import Attention, layer_of, stock_model
from lora_models import K, accelerated_copy, compare, lora_layers, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_fast
from bench.instruments.accuracy import assert_same_bits

GROUP, ALONE = "lora_fast.adapted_linears.default", "lora_fast.adapted_linear.default"
TOGETHER, APART = {GROUP: 1}, {ALONE: 3}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with lora_fast.set_backend("torch"):
        yield
    torch._dynamo.reset()


def compiled(model: Any, backend: str = "aot_eager", **options: Any) -> tuple[Any, Any]:
    """The compiled model, and the counter of its graphs."""
    counter = CompileCounterWithBackend(backend)
    options = {"fullgraph": True, **options}
    return torch.compile(model, backend=counter, **options), counter


def operators(counter: Any, graph: int = -1) -> dict[str, int]:
    """How often each of our operators stands in a graph, subgraphs included."""
    found: Counter[str] = Counter()
    for module in counter.graphs[graph].modules():
        if isinstance(module, torch.fx.GraphModule):
            found.update(str(node.target) for node in module.graph.nodes)
    return {name: count for name, count in found.items() if name in (GROUP, ALONE)}


def assert_equal(model: Any, graph: Any, x: Tensor) -> None:
    """Output and gradients: eager mode's bits."""
    torch.manual_seed(1)
    expected = run(model, x)
    torch.manual_seed(1)
    actual = {name.removeprefix("_orig_mod."): value for name, value in run(graph, x).items()}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None and actual[name] is not None, name
        assert_same_bits(actual[name], value, name=name)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_operator_with_the_bits_of_eager_mode(kind: str, p: float) -> None:
    model = accelerated_copy(stock_model(kind, lora_dropout=p))
    graph, counter = compiled(model)
    assert_equal(model, graph, torch.randn(3, K))
    assert_equal(model, graph, torch.randn(2, 5, K))
    assert [operators(counter, i) for i in range(counter.frame_count)] == [TOGETHER] * 2
    assert all(layer.siblings and layer.alone is None for layer in lora_fast.report(model).layers)


class _Three(Attention):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)


def test_an_output_that_no_loss_reads_has_the_gradients_of_a_stock_graph() -> None:
    """Zeros, from torch.compile, which gives every output of a graph a gradient; in eager mode
    there are none."""
    stock = stock_model(base=_Three)
    found = []
    for model in (stock, accelerated_copy(stock)):
        attention = model.get_base_model()
        graph, _ = compiled(attention)
        for run_forward in (graph, attention):
            attention.zero_grad()
            run_forward(torch.randn(3, K))[0].sum().backward()
            weights = [attention.k_proj.lora_A, attention.k_proj.lora_B]
            found.append([weight["default"].weight.grad for weight in weights])
    for of_graph, eager in (found[:2], found[2:]):
        assert all(grad is not None and not grad.any() for grad in of_graph)
        assert eager == [None, None]


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_each_pass_decodes_a_weight_once(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_fast import nf4

    decode, decoded = nf4.decode, []
    monkeypatch.setattr(nf4, "decode", lambda *given: decoded.append(given) or decode(*given))
    model = accelerated_copy(stock_model("nf4"))
    graph = compiled(model)[0] if compiles else model
    x = torch.randn(70, K, requires_grad=True)
    graph(x).sum().backward()
    decoded.clear()
    y = graph(x)
    assert len(decoded) == 3
    y.sum().backward()
    assert len(decoded) == 6


def test_inductor_computes_what_stock_peft_does() -> None:
    stock = stock_model()
    model = accelerated_copy(stock)
    graph, counter = compiled(model, "inductor")
    compare(_WithoutPrefix(graph), stock, torch.randn(7, K), compute_dtype=torch.float32)
    assert operators(counter) == TOGETHER


class _WithoutPrefix(nn.Module):
    """A compiled model whose parameters have the names of the model."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.__dict__["graph"] = graph

    def forward(self, x: Tensor) -> Tensor:
        return self.graph(x)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.graph._orig_mod.named_parameters(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.graph.zero_grad(set_to_none)


def _scale(model: Any) -> None:
    layer_of(model, "k_proj").set_scale("default", 3.0)


def _replace(model: Any) -> None:
    layer_of(model, "k_proj").lora_B["default"] = nn.Linear(5, 12, bias=False)


def _add_adapter(model: Any) -> None:
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")


def _evaluate(model: Any) -> None:
    model.eval()


# Stock PEFT's graphs do not either.
notices_dropout = pytest.mark.skipif(
    torch.__version__.startswith("2.11."),
    reason="graphs of torch 2.11 notice no change of a dropout's mode or p",
)


@pytest.mark.parametrize(
    "change",
    [_scale, _replace, _add_adapter, pytest.param(_evaluate, marks=notices_dropout)],
)
def test_changes_between_calls_reach_the_graph(change: Callable[[Any], None]) -> None:
    model = accelerated_copy(stock_model(lora_dropout=0.3))
    graph, counter = compiled(model)
    x = torch.randn(3, K)
    assert_equal(model, graph, x)
    change(model)
    assert_equal(model, graph, x)
    assert operators(counter) == TOGETHER


def _hook(model: Any) -> None:
    layer_of(model, "k_proj").lora_A["default"].register_forward_hook(lambda *_: None)


def _merge(model: Any) -> None:
    layer_of(model, "k_proj").merge()


def _other_dropout(model: Any) -> None:
    layer_of(model, "k_proj").lora_dropout["default"].p = 0.5


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (_hook, {GROUP: 1}),
        (_merge, {GROUP: 1}),
        pytest.param(_other_dropout, {GROUP: 1, ALONE: 1}, marks=notices_dropout),
    ],
)
def test_a_sibling_that_changed_leaves_the_operator(
    change: Callable[[Any], None], left: dict[str, int]
) -> None:
    model = accelerated_copy(stock_model(lora_dropout=0.3))
    graph, counter = compiled(model)
    x = torch.randn(3, K)
    graph(x)
    change(model)
    y = graph(x)
    assert operators(counter) == left and y.shape == (3, 32)


def test_dropout_is_one_mask() -> None:
    model = accelerated_copy(stock_model(lora_dropout=0.5))
    graph, counter = compiled(model)
    graph(torch.randn(3, K))
    draws = [n for n in counter.graphs[-1].graph.nodes if n.target is torch.randint]
    assert operators(counter) == TOGETHER and len(draws) == 1


def _write_A(model: Any) -> None:
    with torch.no_grad():
        layer_of(model, "k_proj").lora_A["default"].weight.add_(0.5)


def _scale_by_number(model: Any) -> None:
    layer_of(model, "k_proj").scaling["default"] = 3.0


@pytest.mark.parametrize("action", [_write_A, _scale_by_number])
def test_a_change_after_the_first_sibling_is_noticed(action: Callable[[Any], None]) -> None:
    """Within the graph: what was computed before it is not taken."""
    model = accelerated_copy(stock_model()).requires_grad_(False)
    undone = copy.deepcopy(model)
    for m in (model, undone):
        layer_of(m, "between").action = action
    graph, counter = compiled(model)
    x = torch.randn(3, K)
    assert_same_bits(graph(x), undone(x), name="y")
    assert operators(counter) == {GROUP: 1, ALONE: 1}


class Doubling(nn.Module):
    """Doubles x in place, and returns y."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return y


class Overwriting(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.doubling = Doubling()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        q = self.doubling(self.q_proj(x), x)
        return torch.cat([q, self.k_proj(x) * self.v_proj(x)], dim=-1)


def test_an_input_changed_in_place_is_noticed() -> None:
    model = accelerated_copy(stock_model(base=Overwriting)).requires_grad_(False)
    alone = lora_fast.accelerate(copy.deepcopy(model), group_shared_inputs=False)
    graph, counter = compiled(model)
    x = torch.randn(3, K)
    torch.testing.assert_close(graph(x), alone(x))
    assert operators(counter) == {GROUP: 1, ALONE: 2}


def test_blocks_compiled_one_by_one_share_a_graph() -> None:
    """As regional compilation has it; copies of a model, too."""
    model = nn.Sequential(*(stock_model().base_model.model for _ in range(10)))
    model = copy.deepcopy(lora_fast.accelerate(model))
    counter = CompileCounterWithBackend("aot_eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    for block in model:
        block(torch.randn(3, K))
    assert counter.frame_count == 1
    assert operators(counter) == TOGETHER


def test_a_layer_compiled_by_itself_is_alone() -> None:
    model = accelerated_copy(stock_model())
    x, counter = torch.randn(3, K), CompileCounterWithBackend("aot_eager")
    expected = model(x)
    for layer in lora_layers(model):
        layer.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(x), expected)
    assert [operators(counter, i) for i in range(counter.frame_count)] == [{ALONE: 1}] * 3
    for layer in lora_fast.report(model).layers:
        assert layer.alone == "torch.compile: called by another forward"
    assert "torch.compile: called by another forward" in str(lora_fast.report(model))


def test_an_unpickled_copy_is_alone_until_it_was_called() -> None:
    model = accelerated_copy(stock_model())
    read = pickle.loads(pickle.dumps(model))
    graph, counter = compiled(read)
    x = torch.randn(3, K)
    torch.testing.assert_close(graph(x), model(x))
    assert operators(counter) == APART
    assert "a copy that was never called" in str(lora_fast.report(read))
    torch._dynamo.reset()
    assert_equal(read, graph, x)
    assert operators(counter) == TOGETHER


class Broken(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        torch._dynamo.graph_break()
        return torch.cat([q, self.k_proj(x) * self.v_proj(x)], dim=-1)


def test_after_a_graph_break_layers_are_alone_and_nothing_is_held() -> None:
    model = accelerated_copy(stock_model(base=Broken))
    graph, counter = compiled(model, fullgraph=False)
    x = torch.randn(3, K)
    for _ in range(3):
        torch.testing.assert_close(graph(x), model(x))
    assert counter.frame_count == 2
    assert layer_of(model, "q_proj")._lora_fast_group[0].held is None


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_checkpointed_group_is_recomputed_together() -> None:
    model = Checkpointed(accelerated_copy(stock_model(lora_dropout=0.3)))
    graph, counter = compiled(model)
    assert_equal(model, graph, torch.randn(3, K))
    assert operators(counter) == TOGETHER


@pytest.mark.offline
@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_a_graph_takes_the_routes_of_eager_mode(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with one graph for many rows and few: cuBLAS multiplies with W, or one launch
    does all."""
    from bench.instruments import stub_driver
    from lora_fast.backends import selection, triton_plans

    backend = triton_plans.PlannedTritonBackend(cublas=True)
    monkeypatch.setattr(selection, "_triton", lambda name: backend)
    model = lora_fast.accelerate(stock_model(kind, lora_dropout=0.1)).train()
    graph, counter = compiled(model, dynamic=True)
    launched = []
    for call in (model, graph):
        with stub_driver.recording(90) as log, lora_fast.set_backend("triton"):
            for rows in (80, 200, 30):
                call(torch.randn(rows, K, requires_grad=True)).sum().backward()
        launched.append(log.names)
    assert operators(counter) == TOGETHER
    assert launched[0] == launched[1]
    many = ["shrink", "expand"] if kind == "dense" else ["shrink", *3 * ["nf4_decode_augmented"]]
    few = ["ticketed_gemm"] * 3 + ["strips", "ticketed_gemm", "strips"]
    assert launched[1][: len(many)] == many and launched[1][-len(few) :] == few
