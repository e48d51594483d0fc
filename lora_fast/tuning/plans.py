"""Descriptions of an operation (Query) and of the ways to compute it (Plan).

A plan follows one of three routes, forward or backward:

    fused       the Triton kernels, with the tiles that launch_policy.py picks or others;
                an NF4 weight is decoded by a launch of its own (workspace) or inside the GEMM
    hybrid      the low-rank part first, then the product with W by cuBLAS on top of it
    augmented   [x | S] [W | Q]ᵀ as one product by cuBLAS, for a W that is decoded anyway: NF4, and
                forward alone (the gradient would need W above A)

Any route may take the backward pass of any other: all save the same tensors. There are no
candidates for strips, the launches of dB and dA: one read of dY or x is bound by memory whatever
its tiles, and timing must not decide the order of sums (launch_policy.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..factors import Factors, Needs
from ..kernels import launch_policy
from ..kernels.environment import multiplies_in_tf32
from ..kernels.launch_policy import GemmConfig
from ..nf4 import NF4Weight
from .product_speed import tile_name

SWITCHES = ("bias", "b", "d", "g", "dropout", "spans")
_BUCKETS = (16, 64, 2048)
MANY_ROWS = 8192
FORWARD, BACKWARD = "forward", "backward"
FORWARD_GROUP, BACKWARD_GROUP = "forward_group", "backward_group"


Route = Literal["fused", "hybrid", "augmented"]


class Plan(NamedTuple):
    """One way to compute an operation; for a field of None launch_policy.py decides by shape.

    workspace and gemm are those of the fused route.
    """

    route: Route = "fused"
    workspace: bool | None = None
    gemm: GemmConfig | None = None

    @property
    def name(self) -> str:
        """The name stored in the cache: ``fused 128x256x64/8/3 workspace``."""
        words: list[str] = [self.route]
        if self.gemm is not None:
            words.append(tile_name(self.gemm))
        if self.workspace is not None:
            words.append("workspace" if self.workspace else "in-gemm")
        return " ".join(words)


FUSED = Plan()
HYBRID = Plan("hybrid")
AUGMENTED = Plan("augmented")
"""Of a forward pass over NF4 weights; its backward pass is HYBRID."""


class Query(NamedTuple):
    """An operation on one layer, or on a group of layers that read the same x; rows in buckets.

    weights: the dtype of a dense weight, or NF4's (blocksize, nested); switches: which of SWITCHES
    are on; needs: gradients that the backward pass makes, one Needs for each layer (forward: only
    whether V is saved); cublas: whether cuBLAS may be used; tf32: whether products of
    float32 are TF32's.
    """

    op: str
    M: int
    K: int
    N: tuple[int, ...]
    R: tuple[int, ...]
    dtype: torch.dtype
    adapter: torch.dtype | None
    weights: tuple[torch.dtype | tuple[int, bool], ...]
    switches: tuple[bool, ...]
    needs: tuple[Needs, ...]
    cublas: bool
    tf32: bool = False

    @property
    def is_forward(self) -> bool:
        return self.op in (FORWARD, FORWARD_GROUP)

    @property
    def is_nf4(self) -> bool:
        return any(isinstance(weight, tuple) for weight in self.weights)

    @property
    def can_augment(self) -> bool:
        """Whether AUGMENTED computes it: a forward pass, every weight NF4 with a low-rank part."""
        nf4 = all(isinstance(weight, tuple) for weight in self.weights)
        return self.is_forward and nf4 and all(self.R)

    def has(self, switch: str) -> bool:
        return self.switches[SWITCHES.index(switch)]

    @property
    def summary(self) -> str:
        """A few words for the terminal."""
        sizes = "+".join(map(str, self.N))
        passes = self.op.replace("_", " of a ")
        rows = f"up to {self.M}" if self.M < MANY_ROWS else f"more than {_BUCKETS[-1]}"
        return f"the {passes} of {self.K} → {sizes}, {rows} rows, {self._products}"

    @property
    def _products(self) -> str:
        return _name(self.dtype) + "-tf32" * self.tf32

    @property
    def key(self) -> str:
        """The query as text, the key of the cache."""
        return " ".join(self.words)

    @property
    def words(self) -> tuple[str, ...]:
        """Its fields as text, in an order of their own."""
        needs = "+".join(
            ",".join(name for name, wanted in zip(Needs._fields, need, strict=True) if wanted)
            for need in self.needs
        )
        return (
            self.op,
            f"M{self.M}",
            f"K{self.K}",
            "N" + "+".join(map(str, self.N)),
            "R" + "+".join(map(str, self.R)),
            self._products,
            "adapter:" + _name(self.adapter),
            "weight:" + "+".join(_name(weight) for weight in self.weights),
            "with:" + ",".join(name for name in SWITCHES if self.has(name)),
            "needs:" + needs,
            "any" if self.cublas else "triton",
        )


def query(
    op: str, rows: Tensor, fs: Sequence[Factors], needs: Sequence[Needs], *, cublas: bool
) -> Query:
    """The query for rows x [M, K] or dY [M, N] of the layers `fs`."""
    f = fs[0]
    switches = (
        f.bias is not None, f.b is not None, f.d is not None, f.g is not None,
        f.constants.dropout_p > 0.0, f.constants.rank_spans is not None,
    )  # fmt: skip
    # This runs before every launch: list comprehensions take half the time of generators.
    return Query(
        op,
        bucket(rows.shape[0]),
        f.weight.shape[1],
        tuple([f.weight.shape[0] for f in fs]),
        tuple([0 if f.A is None else f.A.shape[0] for f in fs]),
        rows.dtype,
        None if f.A is None else f.A.dtype,
        tuple([_kind(f.weight) for f in fs]),
        switches,
        tuple(needs),
        cublas,
        multiplies_in_tf32(rows.dtype),
    )


def bucket(M: int) -> int:
    """The rows that stand for M: 16 and 64, where one launch does all, then up to 2048 and more."""
    return next((most for most in _BUCKETS if most >= M), MANY_ROWS)


def candidates(q: Query, arch: int | None) -> tuple[Plan, ...]:
    """The plans that compute it; the first is that of launch_policy.py."""
    plans = [Plan(workspace=route) for route in _routes(q, arch)]
    masks_dX = q.has("dropout") and not q.is_forward
    columns = max(q.N) if q.is_forward else q.K
    for gemm in launch_policy.other_gemms(
        q.M, columns, q.dtype, arch, has_gain=q.has("g"), masks_dX=masks_dX
    ):
        plans.append(Plan(workspace=True if q.is_nf4 else None, gemm=gemm))
    if q.cublas:
        plans += [HYBRID, *([AUGMENTED] if q.can_augment else [])]
    return tuple(plans)


def _routes(q: Query, arch: int | None) -> tuple[bool | None, ...]:
    """Where an NF4 weight may be decoded, the modelled choice first; None without a choice."""
    reads_weight = q.is_forward or q.needs[0].x
    if not q.is_nf4 or q.K % 2 or not reads_weight:
        return (None,)
    workspace = launch_policy.why_nf4_workspace(q.M, q.K, q.dtype, arch) is not None
    return (workspace, not workspace)


def _kind(weight: Tensor | NF4Weight) -> torch.dtype | tuple[int, bool]:
    """What the time depends on; the kernels read the tables of NF4 and FP4 alike."""
    if not isinstance(weight, NF4Weight):
        return weight.dtype
    # One that a recomputed forward pass has left decoded is multiplied like a dense one.
    W = None if weight.decoded is None else weight.decoded.dense
    return (weight.blocksize, weight.nested) if W is None else W.dtype


def _name(what: torch.dtype | tuple[int, bool] | None) -> str:
    if isinstance(what, tuple):
        return f"nf4-{what[0]}" + "-nested" * what[1]
    return str(what).removeprefix("torch.")
