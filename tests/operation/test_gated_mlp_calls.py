"""functional.gated_mlp: beside stock PEFT, in torch.compile and torch.func, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import lora_fast
from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree, assert_same_bits
from lora_fast import functional
from lora_fast.functional import Member, gated_mlp

H, WIDTH, R, M = 24, 40, 4, 30
LINEARS = ("gate_proj", "up_proj", "down_proj")


class LlamaMLP(nn.Module):
    """As in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(H, WIDTH, bias=False)
        self.up_proj = nn.Linear(H, WIDTH, bias=False)
        self.down_proj = nn.Linear(WIDTH, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def _stock(targets: tuple[str, ...] = LINEARS) -> Any:
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=list(targets), use_rslora=True)
    model = get_peft_model(LlamaMLP(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def _members(model: Any) -> list[Member]:
    found = []
    for name in LINEARS:
        layer = getattr(model.base_model.model, name)
        if not hasattr(layer, "lora_A"):
            found.append(Member(layer.weight.detach()))
            continue
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found.append(Member(layer.base_layer.weight, None, A, B, layer.scaling["default"]))
    return found


@pytest.mark.parametrize(
    "targets", [LINEARS, ("gate_proj",), ("up_proj", "down_proj"), ("down_proj",)], ids=str
)
def test_gradients_equal_those_of_stock_peft(targets: tuple[str, ...]) -> None:
    model, x = _stock(targets), torch.randn(2, M, H, requires_grad=True)
    dY = torch.randn(2, M, H)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    results = []
    for y in (model(x), gated_mlp(x, *_members(model), "silu")):
        results.append([y.detach(), *torch.autograd.grad(y, trained, dY)])
    for stock, ours in zip(*results, strict=True):
        assert_agree(ours, stock, within=ORDER_DIFFERENCE)


def test_a_linear_that_another_library_computes() -> None:
    """gate by its own module, as for DoRA or an 8-bit layer; autograd takes its gradient."""
    model, x = _stock(), torch.randn(M, H, requires_grad=True)
    members = _members(model)
    inner = model.base_model.model
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(model(x).square().sum(), trained)
    y = gated_mlp(x, inner.gate_proj(x), members[1], members[2], "silu")
    h = gated_mlp(x, members[0], inner.up_proj(x), None, "silu")
    for found in (y, inner.down_proj(h)):
        for ours, stock in zip(
            torch.autograd.grad(found.square().sum(), trained), expected, strict=True
        ):
            assert_agree(ours, stock, within=ORDER_DIFFERENCE)


def test_without_gradients_the_same_output() -> None:
    model, x = _stock(), torch.randn(M, H)
    members = _members(model)
    recorded = gated_mlp(x, *members, "silu").detach()
    with torch.no_grad():
        assert_same_bits(gated_mlp(x, *members, "silu"), recorded, name="no_grad")
    with torch.inference_mode():
        assert_same_bits(gated_mlp(x, *members, "silu").clone(), recorded, name="inference")


def test_only_down_trains_as_a_layer_by_itself() -> None:
    """h and its S are saved, and neither gate nor up."""
    model, x, saved = _stock(("down_proj",)), torch.randn(M, H), []
    members = _members(model)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        gated_mlp(x, *members, "silu")
    rows = [shape for shape in saved if shape[0] == M]
    assert sorted(rows) == [(M, R), (M, WIDTH)]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled_as_eager(p: float) -> None:
    model, x = _stock(), torch.randn(M, H, requires_grad=True)
    members = _members(model)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step(x: Tensor) -> Tensor:
        return gated_mlp(x, *members, "gelu_tanh", dropout_p=p, dropout_seeds=(3, 4))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = step(x), compiled(x)
    assert_agree(actual, expected, within=ORDER_DIFFERENCE)
    for a, b in zip(
        torch.autograd.grad(actual.sum(), trained),
        torch.autograd.grad(expected.sum(), trained),
        strict=True,
    ):
        assert_agree(a, b, within=ORDER_DIFFERENCE)


def test_torch_func_as_for_other_operations() -> None:
    """Outside of a gradient transform the layers run one by one, within they refuse as ever."""
    members = [m._replace(A=m.A.detach(), B=m.B.detach()) for m in _members(_stock())]
    x = torch.randn(3, M, H)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: x * 2.0)(x)
        assert_same_bits(
            gated_mlp(mapped, *members, "relu"), gated_mlp(2.0 * x, *members, "relu"), name="y"
        )
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: gated_mlp(x, *members, "relu").sum())(x)


def test_x_may_change_in_place_after_dropout_as_with_stock() -> None:
    members = _members(_stock())
    grads = []
    for changes in (False, True):
        leaf = torch.ones(M, H, requires_grad=True)
        x = leaf * 1.5
        y = gated_mlp(x, *members, "silu", dropout_p=0.3, dropout_seeds=(1, 2))
        if changes:
            x.add_(1.0)
        y.sum().backward()
        grads.append(leaf.grad)
    assert_same_bits(*grads, name="dx")
    leaf = torch.ones(M, H, requires_grad=True)
    x = leaf * 1.5
    y = gated_mlp(x, *members, "silu")
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_strange_layouts_are_read() -> None:
    members = _members(_stock())
    x = torch.randn(H, 2, M).permute(2, 1, 0)
    assert_agree(
        gated_mlp(x, *members, "silu"),
        gated_mlp(x.contiguous(), *members, "silu"),
        within=ORDER_DIFFERENCE,
    )


WRONG = {
    "activation must be one of": lambda x, g, u, d: (x, g, u, d, "tanh"),
    "x must be a torch.Tensor": lambda x, g, u, d: (None, g, u, d, "silu"),
    "gate: x must have K = 24": lambda x, g, u, d: (x[..., 1:], g, u, d, "silu"),
    "up must have as many features as gate": lambda x, g, u, d: (
        x, g, u._replace(weight=u.weight[1:], B=u.B[1:]), d, "silu"
    ),
    "gate without up must have an even": lambda x, g, u, d: (
        x, g._replace(weight=g.weight[1:], B=g.B[1:]), None, d, "silu"
    ),
    "down must have a weight": lambda x, g, u, d: (x, g, u, u, "silu"),
    "up must have shape": lambda x, g, u, d: (x, g, torch.randn(M + 1, WIDTH), d, "silu"),
    "up must be a torch.Tensor": lambda x, g, u, d: (x, g, "up", d, "silu"),
    "up must be float64": lambda x, g, u, d: (x, g, torch.ones(M, WIDTH).int(), d, "silu"),
    "up must be on x's device": lambda x, g, u, d: (
        x, g, torch.ones(M, WIDTH, device="meta"), d, "silu"
    ),
    "down must be a layer or None": lambda x, g, u, d: (x, g, u, x, "silu"),
    "down: A must have shape": lambda x, g, u, d: (x, g, u, d._replace(A=g.A), "silu"),
    "gate: B must be given when A is": lambda x, g, u, d: (x, g._replace(B=None), u, d, "silu"),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_is_refused(message: str) -> None:
    arguments = WRONG[message](torch.randn(M, H), *_members(_stock()))
    with pytest.raises((TypeError, ValueError), match=message):
        gated_mlp(*arguments)


def test_dropout_is_checked() -> None:
    x, members = torch.randn(M, H), _members(_stock())
    with pytest.raises(ValueError, match="gate: dropout_p must lie in"):
        gated_mlp(x, *members, "silu", dropout_p=1.5)
    with pytest.raises(TypeError, match="down: dropout_seed must be an integer"):
        gated_mlp(x, *members, "silu", dropout_p=0.5, dropout_seeds=(1, "2"))  # type: ignore[arg-type]


def test_members_without_a_low_rank_are_for_a_gated_mlp_alone() -> None:
    with pytest.raises(ValueError, match="members must have A and B"):
        functional.adapted_linears(torch.randn(M, H), [Member(torch.randn(WIDTH, H))])


def test_seeds_follow_torchs_generator() -> None:
    x, members = torch.randn(M, H), _members(_stock())
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(gated_mlp(x, *members, "silu", dropout_p=0.5).detach())
    assert_same_bits(found[0], found[1], name="the same seed")
    assert not torch.equal(found[0], found[2])
    assert lora_fast.functional.gated_mlp is gated_mlp
