"""A gated MLP as one operation: every result by the rule, and what is saved for backward."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from gated_checks import (
    BF16,
    FP16,
    FP32,
    MEMBERS,
    MLP,
    arguments_of,
    check,
    exact,
    factors_of,
    fused,
    make,
    results_of,
)
from torch.utils.checkpoint import checkpoint

from bench.instruments.accuracy import assert_same_bits
from lora_fast import NF4Weight, reference
from lora_fast.backends import torch_gated_rows
from lora_fast.backends.torch_ops import TorchBackend
from lora_fast.four_bit.decoded import bytes_saved
from lora_fast.gated import ACTIVATIONS, GatedLinears
from lora_fast.operation import gated_mlp

DTYPES = [(FP32, None), (BF16, None), (BF16, FP32), (FP16, FP32)]


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize(("dtype", "adapter"), DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype, adapter):
    # In 16 bits a gate close to 0 may round to the other side of the kink, in plain PyTorch too.
    has_kink = activation.startswith("relu") and dtype is not FP32
    check(MLP(dtype, adapter), activation=activation, ready=("gate",) if has_kink else ())


VARIANTS = {
    "biases": {"biased": MEMBERS},
    "fused": {"fused": True, "biased": ("gate",)},
    "fused in nf4": {"fused": True, "nf4": ("gate", "down")},
    "nf4": {"nf4": MEMBERS},
    "only down in nf4": {"nf4": ("down",)},
    "only h": {"alone": True},
    "only h of a fused layer": {"alone": True, "fused": True},
    "dropout": {"p": 0.3},
    "dropout of a fused layer": {"p": 0.3, "fused": True},
    "all dropped": {"p": 1.0},
    "gate computed elsewhere": {"ready": ("gate",)},
    "up computed elsewhere": {"ready": ("up",), "p": 0.3},
    "both computed elsewhere": {"ready": ("gate", "up"), "p": 0.3},
    "both in one, computed elsewhere": {"ready": ("gate",), "fused": True},
    "only an activation": {"ready": ("gate", "up"), "alone": True},
    "gate frozen elsewhere": {"ready": ("gate",), "frozen": ("gate",)},
    "three dimensions": {"lead": (1, 37)},
    "transposed": {"layout": "transposed"},
    "zero strides": {"layout": "zero-stride"},
    "one row": {"M": 1},
    **{f"only {name}": {"adapted": (name,), "p": 0.3} for name in MEMBERS},
    **{f"not {name}": {"adapted": tuple(m for m in MEMBERS if m != name)} for name in MEMBERS},
    "no adapter": {"adapted": ()},
    "only down trains": {"trains": ("A", "B"), "frozen": ("gate", "up"), "p": 0.3},
}


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))
@pytest.mark.parametrize(("dtype", "adapter"), [(FP32, None), (BF16, FP32)], ids=str)
def test_every_variant(changes, dtype, adapter):
    check(MLP(dtype, adapter), **changes)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("name", ["x", "gate.A", "gate.B", "up.A", "up.B", "down.A", "down.B"])
def test_a_gradient_too_large_by_a_hundredth_is_found(name, dtype, monkeypatch):
    original = TorchBackend.gated_backward

    def wrong(*arguments, **options):
        grads = original(*arguments, **options)
        member, _, kind = name.rpartition(".")
        if not member:
            return grads._replace(x=grads.x * 1.01)
        found = getattr(grads, member)
        factor = getattr(found, kind) * 1.01
        return grads._replace(**{member: found._replace(**{kind: factor})})

    monkeypatch.setattr(TorchBackend, "gated_backward", wrong)
    with pytest.raises(AssertionError, match=f"d{name}"):
        check(MLP(dtype))


SUBSETS = [
    trains
    for count in range(5)
    for trains in itertools.combinations(("x", "bias", "A", "B"), count)
]


@pytest.mark.parametrize("trains", SUBSETS, ids=str)
def test_every_subset_of_gradients(trains):
    check(MLP(biased=MEMBERS), trains=trains)


@pytest.mark.parametrize("frozen", [("gate",), ("up",), ("gate", "up"), ("down",)], ids=str)
@pytest.mark.parametrize("trains", [("A", "B"), ("A",), ("x", "B")], ids=str)
def test_linears_of_which_nothing_trains(frozen, trains):
    check(MLP(biased=MEMBERS), frozen=frozen, trains=trains)


BLOCKS = {
    "float32": {"dtype": FP32, "p": 0.3},
    "bfloat16": {"dtype": BF16, "adapter": FP32, "p": 0.3},
    "float16": {"dtype": FP16, "fused": True, "biased": MEMBERS},
    "only h": {"dtype": BF16, "alone": True},
    "elsewhere": {"dtype": FP32, "ready": ("up",), "biased": ("down",)},
}


@pytest.mark.usefixtures("native_dtypes")
@pytest.mark.parametrize("changes", BLOCKS.values(), ids=list(BLOCKS))
def test_several_blocks_of_rows(changes, monkeypatch):
    monkeypatch.setattr(torch_gated_rows, "_ROWS", 16)
    check(MLP(**changes))
    gate = torch.empty(37, 40)
    assert len(torch_gated_rows._blocks(gate, 24, GatedLinears(gate, gate, None))) == 3


def test_no_rows():
    o = make(MLP(M=0))
    for name, value in results_of(o, fused).items():
        assert value is not None and not value.any(), name


def test_float64():
    o = make(MLP(torch.float64, p=0.3))
    for (name, value), expected in zip(
        results_of(o, fused).items(), results_of(o, exact).values(), strict=True
    ):
        torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_second_backward_pass_gives_the_same_bits(p):
    o = make(MLP(BF16, p=p, biased=MEMBERS))
    leaves = o.leaves
    before = {name: t.detach().clone() for name, t in leaves.items()}
    y = fused(o, leaves)
    first = torch.autograd.grad(y, list(leaves.values()), o.dY, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), o.dY)
    again = torch.autograd.grad(fused(o, leaves), list(leaves.values()), o.dY)
    for name, a, b, c in zip(leaves, first, second, again, strict=True):
        assert_same_bits(a, b, name=name)
        assert_same_bits(a, c, name=name)
        assert_same_bits(leaves[name].detach(), before[name], name=f"{name} is as before")


def test_differentiating_twice_is_refused():
    o = make(MLP())
    loss = fused(o, o.leaves).square().sum()
    asked = [o.leaves["x"], o.leaves["gate.A"]]
    found = torch.autograd.grad(loss, asked, create_graph=True)
    for grad, of in itertools.product(found, asked):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.square().sum(), of, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        found[0].sum().backward()


def test_memory_of_gate_and_up_is_offered_where_nobody_reads_it_again(monkeypatch):
    told = []

    original = torch_gated_rows.gated_backward

    def method(self, dY, x, saved, linears, activation, needs, *, in_place):
        told.append(in_place)
        return original(dY, x, saved, linears, activation, needs)

    monkeypatch.setattr(TorchBackend, "gated_backward", method)
    o = make(MLP())

    def run(x=o.leaves["x"]):
        return fused(o, o.leaves | {"x": x}).sum()

    run().backward()
    loss = run()
    loss.backward(retain_graph=True)
    loss.backward()
    checkpoint(run, o.leaves["x"], use_reentrant=True).backward()
    torch.autograd.grad(run(), o.leaves["x"], create_graph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hooked = run()
    hooked.backward()
    checkpoint(run, use_reentrant=False).backward()
    assert told == [True, False, True, True, False, False, False]


def test_a_backward_pass_that_failed_is_not_repeated_on_what_it_overwrote(monkeypatch):
    def fails(*arguments, **options):
        raise torch.OutOfMemoryError("planted")

    o = make(MLP())
    loss = fused(o, o.leaves).sum()
    with monkeypatch.context() as patch:
        patch.setattr(TorchBackend, "gated_backward", fails)
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
    with pytest.raises(RuntimeError, match="the forward pass must run again"):
        loss.backward()


def test_a_second_backward_pass_of_a_freed_graph_raises_as_torch_does():
    o = make(MLP())
    loss = fused(o, o.leaves).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("packed", [(), MEMBERS], ids=["dense", "nf4"])
def test_checkpointing_draws_the_same_masks(reentrant, packed):
    """Seeds are drawn from torch's generator, whose state is restored for the second forward."""
    o = make(MLP(BF16, FP32, nf4=packed, p=0.3))
    found = []
    for recompute in (False, True):
        torch.manual_seed(7)

        def run(x):
            layers = [factors_of(o, o.leaves, name) for name in MEMBERS]
            return gated_mlp.compute(x, *layers, "silu")

        x = o.leaves["x"]
        y = checkpoint(run, x, use_reentrant=reentrant) if recompute else run(x)
        y.backward(o.dY)
        found.append([y.detach(), *(leaf.grad for leaf in o.leaves.values())])
        for leaf in o.leaves.values():
            leaf.grad = None
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b, name="recomputed")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_decodes_for_its_backward(reentrant, monkeypatch):
    decoded, original = [], NF4Weight.dequantize

    def counted(self, dtype=None):
        decoded.append(tuple(self.shape))
        return original(self, dtype)

    o = make(MLP(BF16, nf4=MEMBERS))
    monkeypatch.setattr(NF4Weight, "dequantize", counted)
    monkeypatch.setattr(bytes_saved, "told", 1 << 30)
    fused(o, o.leaves).sum().backward()
    assert len(decoded) == 6, "forward and backward"
    decoded.clear()
    run = lambda x: fused(o, o.leaves | {"x": x}).sum()  # noqa: E731
    checkpoint(run, o.leaves["x"], use_reentrant=reentrant).backward()
    assert len(decoded) == 6, "forward, and recomputed forward"


def test_no_more_than_one_weight_is_decoded_at_a_time(monkeypatch):
    alive, most, original = [], [0], NF4Weight.dequantize

    def counted(self, dtype=None):
        W = original(self, dtype)
        alive.append(weakref.ref(W))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return W

    o = make(MLP(BF16, nf4=MEMBERS, M=300))
    monkeypatch.setattr(NF4Weight, "dequantize", counted)
    fused(o, o.leaves).sum().backward()
    assert len(alive) == 6 and most[0] == 1


def _with(o, name, **changes):
    """y with changed factors of a linear, and by the reference."""
    layers, plain = [], []
    for member in MEMBERS:
        f, arguments = factors_of(o, o.leaves, member), arguments_of(o, o.leaves, member)
        if member == name:
            constants = {k: v for k, v in changes.items() if k in ("scaling", "dropout_p")}
            others = {k: v for k, v in changes.items() if k not in constants}
            f = f._replace(constants=f.constants._replace(**constants), **others)
            arguments = arguments | changes | {"dropout_seed": 0}
        layers.append(f)
        plain.append(arguments)
    return (
        gated_mlp.compute(o.leaves["x"], *layers, "silu"),
        reference.gated_mlp(o.leaves["x"], *plain, "silu"),
    )


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("kind", ["weight", "g", "b", "d", "scaling"])
def test_what_a_linear_has_beyond_its_low_rank_is_computed_by_itself(name, kind):
    o = make(MLP(torch.float64))
    N, K = o.weights[name].shape
    R = o.leaves[f"{name}.A"].shape[0]
    shapes = {"weight": (N, K), "g": (N,), "b": (N,), "d": (R,), "scaling": (1,)}
    factor = torch.randn(shapes[kind], dtype=torch.float64, requires_grad=kind != "scaling")
    y, expected = _with(o, name, **{kind: factor})
    torch.testing.assert_close(y, expected)
    leaves = [*o.leaves.values(), *([factor] if factor.requires_grad else [])]
    for a, b in zip(*(torch.autograd.grad(t, leaves, o.dY) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_other_rates_of_dropout_draw_other_masks():
    o = make(MLP(torch.float64))
    y, expected = _with(o, "up", dropout_p=1.0)
    torch.testing.assert_close(y, expected)


def test_an_output_in_another_dtype_is_promoted_as_torch_does():
    o = make(MLP(BF16, ready=("gate",)))
    leaves = o.leaves | {"gate": o.leaves["gate"].detach().float().requires_grad_()}
    layers = [factors_of(o, leaves, name) for name in MEMBERS[:2]]
    h = gated_mlp.compute(leaves["x"], *layers, None, "silu")
    assert h.dtype is FP32
    h.sum().backward()
    assert leaves["gate"].grad is not None


def test_autocast():
    o = make(MLP(FP32))
    with torch.autocast("cpu", dtype=BF16):
        y = fused(o, o.leaves)
    assert y.dtype is BF16
    wanted = {k: v.detach().requires_grad_() for k, v in o.leaves.items()}
    x = wanted["x"]
    wanted["x"] = x.to(BF16)
    by_hand = fused(o, wanted)
    assert_same_bits(y.detach(), by_hand.detach(), name="y")
    y.backward(o.dY.to(BF16))
    by_hand.backward(o.dY.to(BF16))
    assert_same_bits(o.leaves["x"].grad, x.grad, name="dx")
    assert o.leaves["x"].grad.dtype is FP32
