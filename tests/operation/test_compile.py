"""torch.compile: full graphs of fused layers, bitwise equal to eager, for any number of rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lora_models import K, N, method_model, nf4_linear, peft_model, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast import DoRALinear, LoRALinear, VeRALinear, functional


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with lora_fast.set_backend("torch"):
        yield
    torch._dynamo.reset()


class Sum(nn.Module):
    """The sum of what several modules make of x, in a checkpointed region if `context` is given."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.context: Callable[[], Any] | None = None
        self.checkpointed = False

    def _sum(self, x: Tensor) -> Tensor:
        return sum(part(x) for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        if not self.checkpointed:
            return self._sum(x)
        options = {} if self.context is None else {"context_fn": self.context}
        return checkpoint(self._sum, x, use_reentrant=False, **options)


def own_layers(kind: str, dropout: float = 0.2) -> list[nn.Module]:
    """A layer of each of our modules, every number moved off its start."""
    layers: list[nn.Module] = []
    for cls in (LoRALinear, DoRALinear, VeRALinear):
        linear: nn.Module = nn.Linear(K, N)
        if kind != "dense":
            linear = nf4_linear(linear, quant_storage=getattr(torch, kind))
        name = "vera_dropout" if cls is VeRALinear else "lora_dropout"
        layers.append(cls.from_linear(linear, r=5, **{name: dropout}))
        for parameter in layers[-1].parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return layers


def assert_compiles(model: nn.Module, compiled: Any, *leads: tuple[int, ...]) -> None:
    """Equal bits for each shape of x, dropout included."""
    for seed, lead in enumerate(leads):
        x = torch.randn(*lead, K)
        torch.manual_seed(seed)
        actual = run(compiled, x)
        torch.manual_seed(seed)
        expected = run(model, x)
        actual = {name.removeprefix("_orig_mod."): t for name, t in actual.items()}
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert (value is None) == (actual[name] is None), name
            if value is not None:
                assert_same_bits(actual[name], value, name=name)


def operators(counter: CompileCounterWithBackend) -> set[str]:
    nodes = [node for graph in counter.graphs for node in graph.graph.nodes]
    return {str(node.target) for node in nodes if "lora_fast" in str(node.target)}


def test_own_modules() -> None:
    model = Sum(*own_layers("bfloat16"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_compiles(model, compiled, (2, 3), (2, 5), (2, 9))
    # One graph for the first size, one for all others.
    assert counter.frame_count == 2
    assert {
        "lora_fast.adapted_linear.default",
        "lora_fast.row_norms.default",
    } == operators(counter)
    report = lora_fast.report(model)
    assert all(layer.compiled for layer in report.layers) and report.all_fused
    assert "+ compiled" in str(report)


@pytest.mark.parametrize(
    ("kind", "methods"),
    [("dense", ["lora", "dora", "vera", "adalora", "ia3"]), ("nf4", ["lora", "dora", "ia3"])],
)
def test_peft_layers(kind: str, methods: list[str]) -> None:
    layers = [method_model(method, kind, dropout=0.1).base_model.model for method in methods]
    model = lora_fast.accelerate(Sum(*layers))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_compiles(model, compiled, (3,))
    assert counter.frame_count == 1
    assert all(layer.compiled for layer in lora_fast.report(model).layers)


def keep_our_outputs(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    ours = op is torch.ops.lora_fast.adapted_linear.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True], ids=["all", "selective"])
def test_checkpointing(selective: bool) -> None:
    """Recomputed with the same masks; a policy may name the operator to keep its results."""
    model = Sum(*own_layers("dense"))
    expected = copy.deepcopy(model)
    model.checkpointed = True
    if selective:
        model.context = partial(create_selective_checkpoint_contexts, keep_our_outputs)
    calls = Calls()
    compiled = torch.compile(model, backend=calls.backend(), fullgraph=True)
    assert_compiles(expected, compiled, (4,))
    layers = len(model.parts)
    assert calls.forward_ops == ([layers, 0] if selective else [layers, layers])


class Calls:
    """How often the forward operator stands in each compiled graph: forward, then backward."""

    def __init__(self) -> None:
        self.forward_ops: list[int] = []

    def _compile(self, graph: Any, _: Any) -> Any:
        nodes = graph.graph.find_nodes(
            op="call_function", target=torch.ops.lora_fast.adapted_linear.default
        )
        self.forward_ops.append(len(nodes))
        return torch._functorch.aot_autograd.make_boxed_func(graph.forward)

    def backend(self) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        return aot_autograd(
            fw_compiler=self._compile,
            bw_compiler=self._compile,
            partition_fn=min_cut_rematerialization_partition,
        )


def test_dropout_under_inductor() -> None:
    """Inductor has a random generator of its own: masks differ from eager's, but forward, dX and dA
    share one, through a checkpoint, too; y − Wx is linear in each of x, A and B."""
    layer = own_layers("dense", dropout=0.4)[0]
    model = Sum(layer)
    model.checkpointed = True
    compiled = torch.compile(model, fullgraph=True)
    x, dY = torch.randn(9, K, requires_grad=True), torch.randn(9, N)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        x.grad = None
        y = compiled(x)
        y.backward(dY)
        outputs.append(y.detach())
        base: Any = layer.base_layer
        terms = (dY * (y - base(x))).detach()
        # y is a sum of K + 1 products, and each product of a term has y's rounding in it.
        bound = torch.finfo(torch.float32).eps * (K + 1) * (dY * y).abs().sum().item()
        dX = x.grad - dY @ base.weight
        for factor, gradient in ((x, dX), (layer.lora_A, None), (layer.lora_B, None)):
            gradient = factor.grad if gradient is None else gradient
            assert abs((factor * gradient).sum() - terms.sum()) <= bound < terms.sum().abs() / 100
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.interpreter
def test_kernels_in_a_graph() -> None:
    """The Triton backend saves no mask and draws it again in the backward pass."""
    with lora_fast.set_backend("triton"):
        model = Sum(*own_layers("uint8"))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_compiles(model, compiled, (3,))


def test_layers_compiled_one_by_one_share_their_graph() -> None:
    layers = [own_layers("dense")[0] for _ in range(3)]
    counter = CompileCounterWithBackend("aot_eager")
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    for layer in layers:
        layer(torch.randn(3, K))
    assert counter.frame_count == 1
    assert all(layer.compiled for layer in lora_fast.report(nn.ModuleList(layers)).layers)


def test_changes_reach_a_compiled_model() -> None:
    """A scaling is a guard, and layers that PEFT disables run PEFT's code."""
    fused = lora_fast.accelerate(peft_model(lora_dropout=0.0))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_compiles(fused, compiled, (3,))
    (layer,) = (m for m in fused.modules() if hasattr(m, "lora_A"))
    layer.set_scale("default", 3.0)
    assert_compiles(fused, compiled, (3,))
    fused.merge_adapter()
    x = torch.randn(3, K)
    torch.testing.assert_close(compiled(x), fused(x))
    assert lora_fast.report(fused).fallback_calls == {"torch.compile: merged": 1, "merged": 1}


def test_outputs_kept_by_an_eager_call_do_not_enter_a_graph() -> None:

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(K, N), nn.Linear(K, N)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) * self.k_proj(x)

    fused = lora_fast.accelerate(peft_model(model=Attention(), target_modules=["q_proj", "k_proj"]))
    x = torch.randn(3, K)
    fused.base_model.model.q_proj(x)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert_compiles(fused, compiled, (3,))
    assert torch.equal(compiled(x), fused(x))


def test_members_of_a_group_share_their_mask() -> None:
    A, B = torch.randn(3, K), torch.randn(N, 3)
    member = functional.Member(torch.randn(N, K), None, A, B, 0.5)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def together(x: Tensor, seed: int | None) -> tuple[Tensor, ...]:
        return functional.adapted_linears(x, [member, member], dropout_p=0.4, dropout_seed=seed)

    x = torch.randn(5, K)
    torch.testing.assert_close(*together(x, None))
    eager = functional.adapted_linears(x, [member, member], dropout_p=0.4, dropout_seed=7)
    for actual, expected in zip(together(x, 7), eager, strict=True):
        assert_same_bits(actual, expected, name="y")


def test_autocast_and_inference() -> None:
    model = Sum(own_layers("dense", dropout=0.0)[1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, K)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(compiled(x), model(x), name="autocast")
    with torch.inference_mode():
        assert_same_bits(compiled(x), model(x), name="inference")


def test_export_leaves_plain_operators() -> None:
    """An exported program must run where lora_fast is not installed."""
    layer = own_layers("dense", dropout=0.0)[0].eval()
    x = torch.randn(3, K)
    program = torch.export.export(layer, (x,))
    assert not any("lora_fast" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_torch_func_inside_a_graph() -> None:
    layer = own_layers("dense", dropout=0.0)[0]
    gradient = torch.func.grad(lambda x: layer(x).square().sum())
    x = torch.randn(3, K)
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gradient(x))
