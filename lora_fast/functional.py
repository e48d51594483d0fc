"""The operation itself, for users with their own modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .backends.torch_gates import GluForm, gate_of
from .experts.nf4_experts import NF4Experts
from .experts.operands import Projection
from .factors import Constants, Factors
from .gated import Activation
from .nf4 import NF4Weight
from .operation import expert_layers as experts
from .operation import expert_validation as validation
from .operation import gated_mlp as gated
from .operation.autograd import compute


def adapted_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    bias: Tensor | None = None,
    *,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    b: Tensor | None = None,
    d: Tensor | None = None,
    g: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    rank_spans: Tensor | None = None,
) -> Tensor:
    """y = g ⊙ (x Wᵀ + s · b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)) + bias, fused forward and backward.

    x [..., K] · weight [N, K], dense or :class:`NF4Weight` · bias, b, g [N] · A [R, K] · B [N, R] ·
    d [R] → y [..., N]. Absent factors cost nothing. The compute dtype, and y's, is autocast's if
    autocast is on, else x's; products accumulate in float32; gradients arrive in the dtype of their
    factor. ``scaling`` may be a tensor of one element, which is read on its device and must not
    require a gradient: use d or b for that. ``dropout_p`` drops elements of x on
    their way into A, with a mask that is a pure function of ``dropout_seed``, row and column;
    without a seed one is drawn from torch's generator of x's device. A seed may be a tensor of one
    int64 on that device, with the mask of the number in it; while a CUDA graph is captured it is
    such a tensor, and every replay draws another. ``rank_spans`` [samples, 2] (int32) gives samples
    of one batch different adapters, stacked along R: sample i, the i-th of equal parts of the rows
    of x, uses only columns start ≤ r < stop of S.

    Raises TypeError or ValueError that names the argument for operands that do not fit together.
    Differentiating twice raises RuntimeError.
    Sources: LoRA (Hu et al. 2021, eq. 3), QLoRA (Dettmers et al. 2023, eq. 5), VeRA (Kopiczko et
    al. 2023, eq. 2: b, d), DoRA (Liu et al. 2024, eq. 5: g), IA3 (Liu et al. 2022: g).
    """
    constants = Constants(scaling, dropout_p, 0, rank_spans)  # type: ignore[arg-type]
    return compute(x, [Factors(weight, bias, A, B, b, d, g, constants)], dropout_seed)[0]


class Member(NamedTuple):
    """One of several plain LoRA layers: y = x Wᵀ + s · (x Aᵀ) Bᵀ + bias.

    Only in a gated MLP A and B may be None, for a layer that is not adapted."""

    weight: Tensor | NF4Weight
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    scaling: float = 1.0


def adapted_linears(
    x: Tensor,
    members: Sequence[Member],
    *,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """y_i = x W_iᵀ + s_i · (drop(x) A_iᵀ) B_iᵀ + bias_i for several layers that read the same x.

    x [..., K] · weight [N_i, K] · bias [N_i] · A [R_i, K] · B [N_i, R_i] → y_i [..., N_i]. The
    numbers are those of :func:`adapted_linear`, up to rounding, but x is read once by one shrink
    for all A_i, once by one product for all of their gradients, and the gradient of x is one sum.
    All members share drop(x). The weights must be frozen. A layer whose output does not reach the
    loss gets no gradients.

    Raises as :func:`adapted_linear` does, and ValueError without members or for trained weights.
    """
    if not members:
        raise ValueError("members must hold at least one layer, got none")
    fs = []
    for W, bias, A, B, scaling in members:
        if A is None or isinstance(scaling, Tensor):
            raise ValueError("members must have A and B and a scaling that is a number")
        if isinstance(W, Tensor) and W.requires_grad:
            raise ValueError("members must have frozen weights, got one that requires a gradient")
        constants = Constants(scaling, dropout_p)
        fs.append(Factors(W, bias, A, B, constants=constants))
    return tuple(compute(x, fs, dropout_seed))


def gated_mlp(
    x: Tensor,
    gate: Member | Tensor,
    up: Member | Tensor | None,
    down: Member | None,
    activation: Activation,
    *,
    dropout_p: float = 0.0,
    dropout_seeds: tuple[int | Tensor | None, int | Tensor | None] = (None, None),
) -> Tensor:
    """y = down(act(gate(x)) ⊙ up(x)), a gated MLP of LoRA layers, fused forward and backward.

        gate = x Wgᵀ + s (drop(x) Agᵀ) Bgᵀ          up = x Wuᵀ + s (drop(x) Auᵀ) Buᵀ
        h = act(gate) ⊙ up                          y = h Wdᵀ + s (drop(h) Adᵀ) Bdᵀ

    x [..., H] · gate, up: weight [I, H], bias [I], A [R, H], B [I, R] · down: weight [N, I], bias
    [N], A [R, I], B [N, R] → y [..., N]. Each layer has its own rank and scaling; without A and B
    it is not adapted. A tensor [..., I] in the place of gate or up is its output, computed
    elsewhere. If up is None, gate is both layers in one, [2I, H], the rows of gate first; if down
    is None, the result is h [..., I]. ``activation``: "silu", "gelu" (with the error function),
    "gelu_tanh", "relu", or "relu2", the square of relu. ``dropout_p`` drops elements of x and of h
    on their way into A; gate and up share the mask of x. ``dropout_seeds``: of the masks of x and
    of h, each as for :func:`adapted_linear`.

    Saved for backward are x, gate, up and the three S = drop(·) Aᵀ: H + 2I + 3R elements a token. h
    is computed again. Dtypes are those of :func:`adapted_linear`. A layer whose weight trains is
    computed by itself; so is every layer in torch.func and torch.compile, and beside an output of
    another dtype: then h may be saved as well.

    Raises TypeError or ValueError that names the argument for operands that do not fit together.
    Differentiating twice raises RuntimeError.
    Source: GLU Variants Improve Transformer (Shazeer 2020, eq. 6).
    """
    of_gate, of_up, of_down = (_layer(member, dropout_p) for member in (gate, up, down))
    return gated.compute(x, of_gate, of_up, of_down, activation, dropout_seeds)


def _layer(member: Any, dropout_p: float) -> Any:
    if not isinstance(member, Member):
        return member
    W, bias, A, B, scaling = member
    return Factors(W, bias, A, B, constants=Constants(scaling, dropout_p))


def adapted_experts(
    x: Tensor,
    weight: Tensor | NF4Experts,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    A: Tensor | None = None,
    B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """y_r = W_e x_r + s · B_e A_e x_r + bias_e: one projection of the experts e of a mixture.

    x [T, K], its rows sorted by expert · expert_offsets [E] (int32 or int64): where the rows of
    each expert end, as ``torch.nn.functional.grouped_mm`` takes them · weight [E, N, K], frozen,
    of any strides (a stored [E, K, N] is ``stored.transpose(1, 2)``), or :class:`NF4Experts` · bias
    [E, N] · A [E, R, K] · B [E, N, R] → y [T, N]. Rows beyond the last offset belong to no expert:
    their y and their gradient are zero. The compute dtype, and y's, is autocast's if autocast is
    on, else x's; gradients of bias, A and B arrive in the dtype of their factor. Neither W + s B A
    nor a gradient of W is made. Bitwise reproducible.

    Raises TypeError or ValueError that names the argument for operands that do not fit together;
    on a GPU the values of the offsets are not checked. Differentiating twice raises RuntimeError.
    Source: LoRA (Hu et al. 2021, eq. 3) for each expert.
    """
    validation.check_rows("x", x)
    projection = Projection(weight, bias, A, B, scaling)
    validation.check_projection(projection, x)
    E, _, K = weight.shape
    validation.check_rows("x", x, K)
    validation.check_offsets(expert_offsets, E, x)
    return experts.project(x.to(experts.compute_dtype(x)), expert_offsets, projection)


def experts_block(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    first: Projection,
    second: Projection,
    *,
    activation: Activation | GluForm | Callable[[Tensor], Tensor] = "silu",
    gated: bool = True,
    interleaved: bool = False,
) -> Tensor:
    """out_t = Σ_j w_tj · y_e(h_e(x_t)), e = top_k_index[t, j]: all experts of a mixture, fused.

        u = W1_e x + s1 · B1_e A1_e x + bias1_e        h = act(gate) ⊙ up, [gate | up] = u
        y = W2_e h + s2 · B2_e A2_e h + bias2_e

    hidden_states [T, H] · top_k_index [T, k] (int32 or int64), an index ≥ E names no expert and
    adds nothing · top_k_weights [T, k] · ``first`` and ``second``: :class:`Projection` s, weight
    [E, P, H] and [E, H', I], as for :func:`adapted_experts` → out [T, H'], in the dtype of
    hidden_states. ``activation``: silu, gelu, gelu_tanh, relu, relu2, a :class:`GluForm`, which has
    limits, or a function of the rows u [M, P] → h [M, I], each row by itself, without parameters
    that train; ``gated`` and ``interleaved`` (u = gate₀, up₀, gate₁, …) say what a named one reads.
    Saved for backward are
    hidden_states, u, x Aᵀ of both projections and the routing; h and y are rebuilt, for the
    gradient of top_k_weights, too. Bitwise reproducible.

    Raises TypeError or ValueError that names the argument for operands that do not fit together.
    Differentiating twice raises RuntimeError. Sources: LoRA (Hu et al. 2021, eq. 3); Shazeer et al.
    2017, eq. 1, for the mixture.
    """
    validation.check_rows("hidden_states", hidden_states)
    validation.check_projection(first, hidden_states, "first.")
    validation.check_projection(second, hidden_states, "second.")
    gate = gate_of(activation, gated=gated, interleaved=interleaved)
    validation.check_rows("hidden_states", hidden_states, first.weight.shape[2])
    validation.check_routing(top_k_index, top_k_weights, hidden_states)
    validation.check_block(first, second, halves=isinstance(activation, (str, GluForm)) and gated)
    x = hidden_states.to(experts.compute_dtype(hidden_states))
    out = experts.block(x, top_k_index, top_k_weights, first, second, gate)
    return out.to(hidden_states.dtype)
