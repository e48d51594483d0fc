"""The kernels of a gated MLP against float64, on every machine that runs kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import (
    dropout,
    gated_backward,
    gated_forward,
    gated_gradients,
    gated_policy,
    scaling,
)
from lora_fast.kernels.dropout import NO_DROPOUT, Dropout
from lora_fast.kernels.gated_tiles import Member
from lora_fast.kernels.scaling import Shrunk
from lora_fast.kernels.triton_version import VERSION

from bench.instruments.accuracy import (
    assert_accurate,
    assert_all_accurate,
    assert_same_bits,
    orders,
)
from lora_fast.backends.torch_gated import activated, activation_gradient
from lora_fast.gated import ACTIVATIONS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """ranks: of gate, up and down, 0 without an adapter; fused: gate and up are halves of rows."""

    M: int = 70
    I: int = 136  # noqa: E741 - the letter of the equations
    ranks: tuple[int, int, int] = (8, 8, 8)
    activation: str = "silu"
    dtype: torch.dtype = BF16
    adapter: torch.dtype = FP32
    p: float = 0.0
    fused: bool = False


PLAIN = Case()
# More than a tile of each, ragged and not; parts that are one tile of columns, and chunks.
CASES = {
    "plain": PLAIN,
    "dropout": replace(PLAIN, p=0.1, ranks=(16, 16, 16)),
    "ragged": replace(PLAIN, M=131, I=203, ranks=(5, 3, 7), activation="gelu_tanh"),
    "rank 1, fused": replace(PLAIN, ranks=(1, 1, 1), fused=True, activation="gelu"),
    "rank 64": replace(PLAIN, ranks=(64, 20, 40), activation="relu2", adapter=BF16),
    "rank 64, dropout": replace(PLAIN, ranks=(64, 24, 40), p=0.1),
    "rank 100": replace(PLAIN, ranks=(100, 17, 100), p=0.1),
    "gate alone": replace(PLAIN, ranks=(8, 0, 0), activation="relu"),
    "down alone": replace(PLAIN, ranks=(0, 0, 8), p=0.1),
    "no adapter": replace(PLAIN, ranks=(0, 0, 0)),
    "float16": replace(PLAIN, dtype=FP16, p=0.1, activation="gelu"),
    "float16, ragged": replace(PLAIN, dtype=FP16, p=0.1, ranks=(5, 16, 8)),
    "float32": replace(PLAIN, M=37, I=77, dtype=FP32, ranks=(8, 5, 16), p=0.1),
    "float32, rank 20": replace(PLAIN, M=37, I=77, dtype=FP32, ranks=(8, 5, 20)),
    "float32, rank 40": replace(PLAIN, M=37, I=77, dtype=FP32, ranks=(8, 5, 40), p=0.1),
}


class Problem:
    """The operands of a case on a device, and what plain torch makes of them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        M, I, dtype = case.M, case.I, case.dtype  # noqa: E741
        both = torch.randn(M, 2 * I).to(dtype).to(device)
        halves = both.chunk(2, dim=1)
        self.bases = halves if case.fused else [half.contiguous() for half in halves]
        self.S = [torch.randn(M, R).to(dtype).to(device) if R else None for R in case.ranks]
        self.B = [self._factor(I, R) for R in case.ranks[:2]]
        self.A = self._factor(case.ranks[2], I)
        self.dh = torch.randn(M, I).to(dtype).to(device)
        self.scalings = (0.5, 1.5)
        self.drops = Dropout(case.p, 11) if case.p else NO_DROPOUT
        keep = torch.ones(M, I)
        if case.p:
            keep = dropout.dropout_mask(M, I, self.drops, device).cpu() * self.drops.keep_scale
        self.keep = keep

    def _factor(self, rows: int, columns: int) -> torch.Tensor | None:
        if not rows or not columns:
            return None
        # Products of about the size of the base products.
        return (torch.randn(rows, columns) / 4).to(self.case.adapter).to(self.device)

    @property
    def members(self) -> list[Member]:
        made = zip(self.bases, self.S, self.B, self.scalings, strict=False)
        return [Member(base, S, B, s if S is not None else 1.0) for base, S, B, s in made]

    def plain(self, of: Any) -> dict[str, torch.Tensor | None]:
        """Everything, in the dtype that `of` gives, on the CPU."""
        dtype, found = self.case.dtype, {}
        Qs = [None if m.B is None else (m.B.float() * m.scaling).to(dtype) for m in self.members]
        Ss = [None if S is None else of(S.cpu()) for S in self.S]
        x, u = (
            of(base.cpu()) if Q is None else of(base.cpu()) + S @ of(Q.cpu()).T
            for base, Q, S in zip(self.bases, Qs, Ss, strict=False)
        )
        keep, A = of(self.keep), None if self.A is None else of(self.A.cpu().to(dtype))
        a = activated(x, self.case.activation)
        found["h"] = a * u
        h = found["h"] * keep
        dh = of(self.dh.cpu())
        if A is not None:
            found["Sd"], found["dA"] = h @ A.T, Ss[2].T @ h
            dh = dh + keep * (Ss[2] @ A)
        found["dgate"] = activation_gradient(dh * u, x, self.case.activation)
        found["dup"] = dh * a
        for name, S, Q, s in zip(("gate", "up"), Ss, Qs, self.scalings, strict=False):
            if Q is not None:
                found[f"dB {name}"] = s * (found[f"d{name}"].T @ S)
                found[f"dS {name}"] = found[f"d{name}"] @ of(Q.cpu())
        return found

    def forward(self, **options: Any) -> dict[str, torch.Tensor]:
        h, Sd = gated_forward.activate(
            *self.members, self.case.activation, self.A, self.drops, **options
        )
        return {"h": h} if Sd is None else {"h": h, "Sd": Sd}

    def outs(self) -> tuple[torch.Tensor, torch.Tensor]:
        both = self.dh.new_empty(self.case.M, 2 * self.case.I)
        return both.chunk(2, dim=1)

    def backward(self) -> dict[str, torch.Tensor]:
        """By gated_backward where it fits, else dgate and dup alone."""
        R_g, R_u, R_d = self.case.ranks
        outs, (dtype, drops) = self.outs(), (self.case.dtype, self.case.p > 0.0)
        if not gated_policy.fits_registers(dtype, self.case.ranks, drops=drops):
            return self._alone(outs)
        wanted = gated_backward.Wanted(R_g > 0, R_u > 0, R_d > 0, dS=True)
        found = gated_backward.gradients(
            *self.members, self.dh, self.case.activation, self._dS(), self.A, self.drops,
            wanted=wanted, outs=outs,
        )  # fmt: skip
        named = {"dgate": found.dgate, "dup": found.dup, "dB gate": found.gate_B}
        named |= {"dB up": found.up_B, "dA": found.down_A}
        named["dS gate"] = None if found.gate_dS is None else found.gate_dS.sum(0)
        named["dS up"] = None if found.up_dS is None else found.up_dS.sum(0)
        return {name: value for name, value in named.items() if value is not None}

    def _alone(self, outs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        dh = self.dh.clone()
        gated_gradients.gradients(
            *self.members, dh, self.case.activation, self._dS(), self.A, self.drops, outs=outs,
            stores_h=True,
        )  # fmt: skip
        return {"dgate": outs[0], "dup": outs[1], "h": dh}

    def _dS(self) -> Shrunk | None:
        return None if self.S[2] is None else scaled(self.S[2], self.case.dtype)


@pytest.fixture(params=["short walks", "long walks"])
def walks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Programs of one tile, as few rows have them, or of many, as many rows have them."""
    if request.param == "long walks":
        monkeypatch.setattr(gated_policy, "_PROGRAMS", 1)
        monkeypatch.setattr(gated_policy, "_CTAS", 1)
    walked: str = request.param
    return walked


def scaled(values: torch.Tensor, dtype: torch.dtype, tile_rows: int = 32) -> Shrunk:
    """dS as the kernels leave it: of float16 in float32, and beside it the largest of its tiles."""
    if dtype != FP16:
        return Shrunk(values)
    dS = scaling.new_gradient(values.to(dtype), values.shape[1], tile_rows)
    dS.values.copy_(values)
    for i, rows in enumerate(values.split(tile_rows)):
        dS.largest[i] = rows.abs().amax(0)
    return dS


def check(problem: Problem, found: dict[str, torch.Tensor], name: str) -> None:
    dtype = problem.case.dtype
    exact = problem.plain(lambda t: t.double())
    eager = orders(lambda: problem.plain(lambda t: t.to(dtype)))
    keys = found.keys()
    assert_all_accurate(
        found,
        {key: exact[key] for key in keys},
        {key: eager[key] for key in keys},
        compute_dtype=dtype,
        name=name,
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_both_directions(case: Case, walks: str) -> None:
    problem = Problem(case, torch.device("cpu"))
    found = problem.forward()
    assert ("Sd" in found) == (case.ranks[2] > 0)
    check(problem, found, "forward")
    check(problem, problem.backward(), "backward")


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_every_activation(activation: str, dtype: torch.dtype) -> None:
    case = Case(M=33, I=40, ranks=(4, 4, 4), activation=activation, dtype=dtype)
    problem = Problem(case, torch.device("cpu"))
    problem.bases[0].mul_(4)
    check(problem, problem.forward(), "forward")
    check(problem, problem.backward(), "backward")


@pytest.mark.interpreter
@pytest.mark.parametrize("R", [8, 100])
def test_wide_rows_take_S_beside_h(R: int) -> None:
    problem = Problem(replace(PLAIN, ranks=(8, 8, R), p=0.1), torch.device("cpu"))
    plain = problem.forward()
    wide, S = gated_forward.activate(
        *problem.members, "silu", problem.A, problem.drops, saves_S=False, widens=True
    )
    assert S is None
    I, P = problem.case.I, -(-R // 16) * 16  # noqa: E741
    assert_same_bits(wide[:, :I], plain["h"], name="h")
    assert_same_bits(wide[:, I : I + R], plain["Sd"], name="S")
    assert wide.shape[1] == I + P and not wide[:, I + R :].any()


@pytest.mark.interpreter
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_gradients_in_the_memory_of_gate_and_up(p: float) -> None:
    problem = Problem(replace(PLAIN, p=p, fused=True), torch.device("cpu"))
    apart = problem.backward()
    problem.outs = lambda: tuple(problem.bases)  # type: ignore[method-assign]
    for name, value in problem.backward().items():
        assert_same_bits(value, apart[name], name=name)
    assert_same_bits(problem.bases[0], apart["dgate"], name="dgate")


@pytest.mark.interpreter
def test_only_what_is_wanted_is_computed() -> None:
    problem = Problem(PLAIN, torch.device("cpu"))
    found = gated_backward.gradients(
        *problem.members, problem.dh, "silu", Shrunk(problem.S[2]), problem.A,
        wanted=gated_backward.Wanted(up_B=True), outs=problem.outs(),
    )  # fmt: skip
    assert [value is None for value in found] == [False, False, True, False, True, True, True]
    check(problem, {"dB up": found.up_B, "dup": found.dup}, "backward")


@pytest.mark.skipif(VERSION < (3, 7), reason="Triton before 3.7 takes gated_gradients")
@pytest.mark.interpreter
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_float16_does_not_limit_what_dS_and_B_may_be(p: float) -> None:
    """Numbers that it does not hold, and stacked adapters whose columns are of unlike size."""
    problem = Problem(
        replace(PLAIN, M=131, I=203, ranks=(16, 16, 16), dtype=FP16, p=p), torch.device("cpu")
    )
    first, second = slice(0, 8), slice(8, 16)
    dS = problem.S[2].float() * 2.0**-20
    for tensor in (dS, *problem.B):
        tensor[:, second] *= 2.0**-40
    for B in problem.B:
        B.mul_(2.0**-12)
    # dh is what dS and A make of it.
    problem.S[2] = dS
    problem.A.mul_(2.0**12)
    problem.dh.zero_()
    ref64, eager = (problem.plain(of) for of in (torch.Tensor.double, torch.Tensor.float))
    for found in (ref64, eager):
        for name, B, s in zip(("gate", "up"), problem.B, problem.scalings, strict=True):
            found[f"dS {name}"] = found[f"d{name}"] @ (s * B.to(found["dup"].dtype))
    results = problem.backward()
    for name in ("dgate", "dup", "dB gate", "dB up"):
        assert_accurate(results[name], ref64[name], eager[name], name=name, compute_dtype=FP16)
    for name in ("dS gate", "dS up", "dA"):
        for part in (first, second):
            actual, exact, plain = (
                of[name].movedim(0 if name == "dA" else 1, 0)[part]
                for of in (results, ref64, eager)
            )
            assert_accurate(actual, exact, plain, name=f"{name} {part}", compute_dtype=FP16)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    problem = Problem(replace(PLAIN, activation="relu2", dtype=dtype), torch.device("cpu"))
    problem.bases[0][3] = float("nan")
    found = problem.forward() | problem.backward()
    for name in ("h", "Sd", "dgate", "dup"):
        bad = ~found[name].isfinite().all(1)
        assert bad.nonzero().flatten().tolist() == [3], name


# Of compiled code: dropout's shuffles and pairs, and a walk over several tiles and parts of them.
COMPILED = {
    "plain": replace(PLAIN, M=129, I=136),
    "dropout": replace(PLAIN, M=129, I=100, ranks=(16, 16, 16), adapter=BF16, p=0.1),
    "float16": replace(PLAIN, M=129, I=136, ranks=(16, 16, 16), dtype=FP16, p=0.1),
    "rank 64, dropout": replace(PLAIN, M=129, I=72, ranks=(64, 24, 40), p=0.1),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.exhaustive if "64" in name else ())
        for name, case in COMPILED.items()
    ],
)
def test_compiled_code_and_any_order_of_its_programs(
    ptx_executor: Any, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several row tiles in a walk, and several programs for the same columns and rows."""
    monkeypatch.setattr(gated_policy, "_PROGRAMS", 4)
    monkeypatch.setattr(gated_policy, "_CTAS", 3)
    problem = Problem(case, ptx_executor.device)
    forward, backward = problem.forward(), problem.backward()
    check(problem, forward, "forward")
    check(problem, backward, "backward")
    with ptx_executor.with_options(schedule="reverse", resident=1):
        again = {**problem.forward(), **problem.backward()}
    for name, value in {**forward, **backward}.items():
        assert_same_bits(again[name], value, name=name)
