"""The kernels of the experts' gate against float64, on every machine that runs kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import (
    environment,
    expert_gate_backward,
    expert_gate_forward,
    expert_gate_gradients,
    expert_sums,
    gated_policy,
)
from lora_fast.kernels.expert_gate_tiles import ExpertMember, Glu

from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders
from lora_fast.backends.torch_gated import activated, activation_gradient
from lora_fast.gated import ACTIVATIONS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SILU = Glu()
# gpt-oss's, and the one of DeepSeek-V4; limits that some numbers of the tests exceed.
CLAMPED = Glu("silu", interleaved=True, limit=1.5, alpha=1.702, shift=1.0)
LIMITED = Glu("silu", limit=1.0)
SCALED = Glu("gelu", interleaved=True, alpha=1.5, shift=0.5)


@dataclass(frozen=True)
class Case:
    """rows: of each expert; outside: rows of none; ranks: of the first and the second projection, 0
    without an adapter."""

    rows: tuple[int, ...] = (66, 0, 1)
    outside: int = 2
    I: int = 40  # noqa: E741 - the letter of the equations
    ranks: tuple[int, int] = (8, 8)
    glu: Glu = SILU
    bias: bool = False
    dtype: torch.dtype = BF16
    adapter: torch.dtype = FP32


PLAIN = Case()
# More than a tile of rows, and of one of the wide ones more than a program of columns.
WIDE = {
    "plain": replace(PLAIN, I=136),
    "clamped, bias": replace(PLAIN, I=136, glu=CLAMPED, bias=True, ranks=(16, 16), adapter=BF16),
    "rank 96": replace(PLAIN, rows=(9, 0, 2), I=136, ranks=(96, 80), bias=True, glu=Glu("relu2")),
}
SMALL = replace(PLAIN, rows=(5, 0, 1), I=24)
CASES = {
    "ragged": replace(PLAIN, rows=(0, 3, 65, 0, 5), I=27, ranks=(5, 7), glu=Glu("gelu_tanh")),
    "rank 1, interleaved": replace(SMALL, ranks=(1, 1), glu=SCALED),
    "rank 64": replace(SMALL, ranks=(64, 40), adapter=BF16, glu=LIMITED),
    "rank 64, float16": replace(PLAIN, ranks=(64, 40), dtype=FP16, glu=CLAMPED, bias=True),
    "first alone": replace(SMALL, ranks=(8, 0)),
    "second alone": replace(SMALL, ranks=(0, 8), glu=Glu("relu", interleaved=True), I=37),
    "no adapter": replace(SMALL, ranks=(0, 0), bias=True),
    "float32": replace(PLAIN, rows=(1, 33, 0), dtype=FP32, ranks=(8, 20), bias=True),
    "no rows": replace(SMALL, rows=(0, 0, 0)),
}


class Problem:
    """The operands of a case on a device, and what plain torch makes of them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        I, dtype, (R1, R2) = case.I, case.dtype, case.ranks  # noqa: E741
        E, P = len(case.rows), sum(case.rows) + case.outside
        self.base = torch.randn(P, 2 * I).to(dtype).to(device)
        self.v = torch.randn(P, I).to(dtype).to(device)
        self.order = torch.randperm(P).to(device)
        self.w, self.dots = torch.rand(P).to(device), torch.randn(P).to(device)
        self.S = torch.randn(P, R1).to(dtype).to(device) if R1 else None
        self.dS = torch.randn(P, R2).to(dtype).to(device) if R2 else None
        # The experts' index fastest, as PEFT stores it.
        self.B = self._factor(2 * I, R1, E).permute(2, 0, 1) if R1 else None
        self.A = self._factor(E, R2, I) if R2 else None
        self.bias = torch.randn(E, 2 * I).to(dtype).to(device) if case.bias else None
        self.offsets = torch.tensor(case.rows).cumsum(0).int().to(device)
        self.member = ExpertMember(self.base, self.S, self.B, self.bias, 0.5 if R1 else 1.0)
        self.inside = P - case.outside

    def _factor(self, *shape: int) -> torch.Tensor:
        # Products of about the size of the base products.
        return (torch.randn(shape) / 4).to(self.case.adapter).to(self.device)

    def plain(self, of: Any) -> dict[str, torch.Tensor | None]:
        """Everything, in the dtype that `of` gives, on the CPU."""
        experts = [self._plain_of(of, e, rows) for e, rows in enumerate(self._spans())]
        found = {}
        for name in experts[0]:
            values = [one[name] for one in experts]
            found[name] = torch.stack(values) if name in ("dB", "dA") else torch.cat(values)
        return found

    def _spans(self) -> Iterator[slice]:
        start = 0
        for count in self.case.rows:
            yield slice(start, start + count)
            start += count

    def _plain_of(self, of: Any, e: int, rows: slice) -> dict[str, torch.Tensor]:
        dtype, glu, found = self.case.dtype, self.case.glu, {}
        u, w = of(self.base[rows].cpu()), of(self.w[self.order[rows]].cpu())[:, None]
        if self.B is not None:
            Q = of((self.B[e].cpu().float() * self.member.scaling).to(dtype))
            S = of(self.S[rows].cpu())
            u = u + S @ Q.T
        if self.bias is not None:
            u = u + of(self.bias[e].cpu())
        gate, up = glu.halves(u, 1)
        within, factor, inside = gate, up + glu.shift, torch.ones_like(up)
        if glu.limit is not None:
            within = gate.clamp(max=glu.limit)
            factor = up.clamp(-glu.limit, glu.limit) + glu.shift
            inside = (up.abs() <= glu.limit).to(up.dtype)
        a = activated(within * glu.alpha, glu.activation) / glu.alpha
        h, v = a * factor, of(self.v[rows].cpu())
        found["h"] = h
        if self.A is not None:
            A, dS = of(self.A[e].cpu().to(dtype)), of(self.dS[rows].cpu())
            found["S2"] = h @ A.T
            found["dA"] = dS.T @ (h * w)
            v = v + dS @ A
        found["dw"], found["wh"] = (v * h).sum(1) + of(self.dots[rows].cpu()), h * w
        dh = v * w
        d_gate = activation_gradient(dh * factor, within * glu.alpha, glu.activation)
        if glu.limit is not None:
            d_gate = d_gate * (gate <= glu.limit).to(gate.dtype)
        du = torch.stack([d_gate, dh * a * inside], 2 if glu.interleaved else 1)
        found["du"] = du.flatten(1)
        if self.B is not None:
            found["dB"] = self.member.scaling * (found["du"].T @ S)
            found["dS1"] = found["du"] @ Q
        return found

    def forward(self, **options: Any) -> dict[str, torch.Tensor]:
        h, S2 = expert_gate_forward.activate(
            self.member, self.offsets, self.case.glu, self.A, **options
        )
        return self._inside({"h": h, "S2": S2})

    def backward(self) -> dict[str, torch.Tensor]:
        """By expert_gate_backward where it fits, else du and dw alone."""
        out, glu = self.base.new_empty(self.base.shape), self.case.glu
        arch = environment.current_arch()
        fits = gated_policy.fits_experts(self.case.dtype, self.case.ranks, arch, plain=glu.is_plain)
        return self.strips(out) if fits else self.alone(out)

    def strips(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        R1, R2 = (R > 0 for R in self.case.ranks)
        found = expert_gate_backward.gradients(
            self.member, self.v, self.w, self.order, self.offsets, self.case.glu, self.dS, self.A,
            wanted=expert_gate_backward.Wanted(R1, R2, R1, True), out=out,
        )  # fmt: skip
        named = {"du": found.du, "dB": found.B, "dA": found.A}
        return self._inside(named | self.sums(found.dS, found.dw))

    def alone(self, out: torch.Tensor) -> dict[str, torch.Tensor]:
        dS = self.dS if self.dS is None or self.case.dtype != FP16 else self.dS.float()
        wh = self.v.clone()
        dw = expert_gate_gradients.gradients(
            self.member, wh, self.w, self.order, self.offsets, self.case.glu, dS, self.A,
            out=out, stores_h=True, needs_w=True,
        )  # fmt: skip
        return self._inside({"du": out, "wh": wh} | self.sums(None, dw))

    def sums(self, dS: torch.Tensor | None, dw: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """dS1, and dw in the order of the rows; that of a row of no expert is zero."""
        dS, dw = expert_sums.sums(
            self.offsets, self.order, dS, dw, self.dots, dtype=self.case.dtype, w=self.w
        )
        assert not dw[self.order][self.inside :].any()
        return {"dS1": dS, "dw": dw[self.order]}

    def _inside(self, found: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Without the rows of no expert, which nobody writes."""
        whole = {"dA", "dB"}
        return {
            name: value if name in whole else value[: self.inside]
            for name, value in found.items()
            if value is not None
        }


def check(problem: Problem, found: dict[str, torch.Tensor], name: str) -> None:
    dtype = problem.case.dtype
    exact = problem.plain(lambda t: t.double())
    eager = orders(lambda: problem.plain(lambda t: t.to(dtype)))
    assert_all_accurate(
        found,
        {key: exact[key] for key in found},
        {key: eager[key] for key in found},
        compute_dtype=dtype,
        name=name,
    )


def check_both(case: Case) -> None:
    problem = Problem(case, torch.device("cpu"))
    forward, backward = problem.forward(), problem.backward()
    assert ("S2" in forward) == (case.ranks[1] > 0)
    check(problem, forward | backward, "both directions")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_both_directions(case: Case) -> None:
    check_both(case)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "programs"), [("plain", 1024), ("clamped, bias", 1), ("rank 96", 1024)]
)
def test_more_columns_than_a_tile(
    name: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several programs, as few rows have them, or in one, as many rows do."""
    monkeypatch.setattr(gated_policy, "_PROGRAMS", programs)
    check_both(WIDE[name])


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_limits(activation: str) -> None:
    """Of a model that has not been seen: any activation may have limits, a slope and a shift."""
    glu = Glu(activation, limit=2.0, alpha=1.25, shift=0.5)
    problem = Problem(Case((9, 2), I=24, ranks=(4, 4), glu=glu), torch.device("cpu"))
    problem.base.mul_(4)
    check(problem, problem.forward() | problem.backward(), "both directions")


@pytest.mark.interpreter
@pytest.mark.parametrize("R", [8, 80])
def test_wide_rows_take_S2_beside_h(R: int) -> None:
    problem = Problem(replace(SMALL, ranks=(8, R)), torch.device("cpu"))
    plain = problem.forward()
    wide, S2 = expert_gate_forward.activate(
        problem.member, problem.offsets, problem.case.glu, problem.A, saves_S=False, widens=True
    )
    assert S2 is None
    I, padding, rows = problem.case.I, -(-R // 16) * 16, wide[: problem.inside]  # noqa: E741
    assert_same_bits(rows[:, :I], plain["h"], name="h")
    assert_same_bits(rows[:, I : I + R], plain["S2"], name="S2")
    assert wide.shape[1] == I + padding and not rows[:, I + R :].any()


@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", ["strips", "alone"])
def test_gradients_in_the_memory_of_u(kernel: str) -> None:
    problem = Problem(replace(SMALL, glu=CLAMPED), torch.device("cpu"))
    compute = getattr(problem, kernel)
    apart = compute(problem.base.new_empty(problem.base.shape))
    for name, value in compute(problem.base).items():
        assert_same_bits(value, apart[name], name=name)


@pytest.mark.interpreter
def test_only_what_is_wanted_is_computed() -> None:
    problem = Problem(SMALL, torch.device("cpu"))
    found = expert_gate_backward.gradients(
        problem.member, problem.v, problem.w, problem.order, problem.offsets, problem.case.glu,
        problem.dS, problem.A, wanted=expert_gate_backward.Wanted(A=True),
        out=problem.base.clone(),
    )  # fmt: skip
    assert [value is None for value in found] == [False, True, False, True, True]
    check(problem, {"dA": found.A, "du": found.du[: problem.inside]}, "backward")


@pytest.mark.interpreter
def test_what_is_not_finite_stays_in_its_row() -> None:
    problem = Problem(replace(SMALL, glu=CLAMPED), torch.device("cpu"))
    problem.base[3] = float("nan")
    found = problem.forward() | problem.backward()
    for name in ("h", "S2", "du", "dw"):
        bad = ~found[name].isfinite().view(problem.inside, -1).all(1)
        assert bad.nonzero().flatten().tolist() == [3], name


@pytest.mark.interpreter
def test_rows_of_no_expert_are_left_alone() -> None:
    problem = Problem(replace(SMALL, outside=3), torch.device("cpu"))
    out = problem.base.clone().fill_(7)
    for gradients in (problem.strips, problem.alone):
        gradients(out)
        assert (out[problem.inside :] == 7).all()


# Of compiled code: a walk over several tiles and parts of them, every kernel, and both layouts.
COMPILED = {
    "plain": replace(PLAIN, rows=(65, 0, 3), I=136),
    "clamped, interleaved": replace(PLAIN, rows=(2, 66), I=72, glu=CLAMPED, bias=True),
    "tiles": replace(PLAIN, rows=(0, 65), I=72, ranks=(16, 16), dtype=FP16),
    "eights": replace(PLAIN, rows=(3, 35), I=37, ranks=(8, 24), dtype=FP16),
}


@pytest.mark.parametrize("case", COMPILED.values(), ids=list(COMPILED))
def test_compiled_code_and_any_order_of_its_programs(ptx_executor: Any, case: Case) -> None:
    problem = Problem(case, ptx_executor.device)
    found = problem.forward() | problem.backward()
    check(problem, found, "both directions")
    with ptx_executor.with_options(schedule="reverse", resident=1):
        again = problem.forward() | problem.backward()
    for name, value in found.items():
        assert_same_bits(again[name], value, name=name)
