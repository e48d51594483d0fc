"""The specification itself: against finite differences and against the formula written out."""

from __future__ import annotations

import pytest
import torch

from lora_fast import NF4Weight, reference

NAMES = ("x", "weight", "bias", "A", "B", "b", "d", "g")


def operands(M=4, K=6, N=5, R=3):
    shapes = {
        "x": (M, K),
        "weight": (N, K),
        "bias": (N,),
        "A": (R, K),
        "B": (N, R),
        "b": (N,),
        "d": (R,),
        "g": (N,),
    }
    return {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_gradcheck_of_every_factor(p):
    t = operands()

    def call(*values):
        named = dict(zip(NAMES, values, strict=True))
        x, weight, bias = (named.pop(name) for name in ("x", "weight", "bias"))
        return reference.adapted_linear(
            x, weight, bias, **named, scaling=1.7, dropout_p=p, dropout_seed=5
        )

    assert torch.autograd.gradcheck(call, tuple(t[name] for name in NAMES))


def test_element_by_element():
    t = {name: value.detach() for name, value in operands().items()}
    keep = reference.dropout_mask(11, 4, 6, 0.5, "cpu")
    y = reference.adapted_linear(
        t["x"], t["weight"], t["bias"], A=t["A"], B=t["B"], b=t["b"], d=t["d"], g=t["g"],
        scaling=0.3, dropout_p=0.5, dropout_seed=11,
    )  # fmt: skip
    for m in range(4):
        S = [
            sum(float(t["A"][r, k] * t["x"][m, k]) / 0.5 for k in range(6) if keep[m, k])
            for r in range(3)
        ]
        for n in range(5):
            base = sum(float(t["x"][m, k] * t["weight"][n, k]) for k in range(6))
            low_rank = sum(float(t["d"][r] * t["B"][n, r]) * S[r] for r in range(3))
            expected = float(t["g"][n]) * (base + 0.3 * float(t["b"][n]) * low_rank)
            assert float(y[m, n]) == pytest.approx(expected + float(t["bias"][n]), rel=1e-12)


def test_dropout_is_a_function_of_the_seed():
    masks = [reference.dropout_mask(seed, 64, 64, 0.25, "cpu") for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert 0.7 < masks[0].double().mean() < 0.8
    assert reference.dropout_mask(1, 8, 8, 0.0, "cpu").all()
    assert not reference.dropout_mask(1, 8, 8, 1.0, "cpu").any()


def test_dropout_without_seed_is_refused():
    t = operands()
    with pytest.raises(ValueError, match="dropout_seed must be given"):
        reference.adapted_linear(t["x"], t["weight"], A=t["A"], B=t["B"], dropout_p=0.1)


def test_nf4_weight_is_what_it_decodes_to():
    weight = NF4Weight.from_dense(torch.randn(8, 26))
    x = torch.randn(3, 26, dtype=torch.float64)
    torch.testing.assert_close(
        reference.adapted_linear(x, weight), x @ weight.dequantize(torch.float32).double().T
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_of_a_gated_mlp(activation, p):
    gate, up, down = operands(K=6, N=5), operands(K=6, N=5), operands(K=5, N=6)
    members = [{k: v for k, v in t.items() if k != "x"} for t in (gate, up, down)]
    kinds = list(members[0])

    def call(x, *values):
        layers = [dict(zip(kinds, values[i : i + len(kinds)], strict=True)) for i in (0, 7, 14)]
        for seed, layer in zip((5, 5, 6), layers, strict=True):
            layer |= {"scaling": 1.7, "dropout_p": p, "dropout_seed": seed}
        return reference.gated_mlp(x, *layers, activation)

    values = [value for member in members for value in member.values()]
    assert torch.autograd.gradcheck(call, (gate["x"], *values))


@pytest.mark.parametrize(
    ("activation", "by_torch"),
    [
        ("silu", torch.nn.functional.silu),
        ("gelu", torch.nn.functional.gelu),
        ("gelu_tanh", lambda g: torch.nn.functional.gelu(g, approximate="tanh")),
        ("relu", torch.relu),
        ("relu2", lambda g: torch.relu(g) ** 2),
    ],
)
def test_activations_are_torchs(activation, by_torch):
    x, gate_up = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    gate, up = gate_up.chunk(2, dim=-1)
    W = torch.randn(3, 5, dtype=torch.float64)
    expected = (by_torch(gate) * up) @ W.T
    y = reference.gated_mlp(x, gate_up, None, {"weight": W}, activation)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(reference.gated_mlp(x, gate, up, {"weight": W}, activation), y)


def test_an_unknown_activation_is_refused():
    gate = torch.randn(2, 4)
    with pytest.raises(ValueError, match="activation must be a known one"):
        reference.gated_mlp(gate, gate, gate, None, "tanh")


def test_gradcheck_of_experts():
    E, H, INNER, R = 3, 4, 3, 2
    shapes = [
        *((5, H), (5, 2), (E, 2 * INNER, H), (E, 2 * INNER), (E, R, H), (E, 2 * INNER, R)),
        *((E, H, INNER), (E, H), (E, R, INNER), (E, H, R)),
    ]
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    index = torch.tensor([[0, 2], [2, 0], [0, 3], [2, 3], [2, 0]])  # 3 names none, 1 has no rows

    def gate(rows):
        first, second = rows.chunk(2, dim=-1)
        return torch.nn.functional.silu(first) * second

    def call(x, w, *factors):
        names = ("weight", "bias", "A", "B")
        first, second = (dict(zip(names, factors[i : i + 4], strict=True)) for i in (0, 4))
        first["scaling"] = 0.7
        return reference.experts_block(x, index, w, first, second, gate)

    assert torch.autograd.gradcheck(call, tuple(values))
    # By hand, token by token.
    x, w, W1, b1, A1, B1, W2, b2, A2, B2 = (v.detach() for v in values)
    for t in range(5):
        expected = torch.zeros(H, dtype=torch.float64)
        for j, e in enumerate(index[t].tolist()):
            if e < E:
                h = gate((W1[e] + 0.7 * B1[e] @ A1[e]) @ x[t] + b1[e])
                expected += w[t, j] * ((W2[e] + B2[e] @ A2[e]) @ h + b2[e])
        torch.testing.assert_close(call(*values)[t].detach(), expected)
