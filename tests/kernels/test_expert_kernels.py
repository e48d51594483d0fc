"""The kernels of experts against float64, on every machine that runs kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import machines
import pytest
import torch
from machines import Executor, started

pytest.importorskip("triton")
from lora_fast.kernels import expert_gradients, expert_product, expert_scatter, expert_shrink
from lora_fast.kernels.expert_product import LowRank

from bench.instruments.accuracy import assert_all_accurate, assert_same_bits, orders

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """counts: the rows of each expert; `beyond` more belong to none. The rows are those of tokens
    with k choices each; K in, N out. The rows of B are in one piece, or as PEFT stores them."""

    counts: tuple[int, ...] = (9, 0, 40, 1, 18)
    beyond: int = 0
    k: int = 2
    K: int = 72
    N: int = 136
    R: int = 8
    dtype: torch.dtype = BF16
    adapter: torch.dtype = FP32
    whole_rows: bool = False

    @property
    def rows(self) -> int:
        return sum(self.counts) + self.beyond

    @property
    def tokens(self) -> int:
        return self.rows // self.k


PLAIN = Case()
CASES = {
    "plain": PLAIN,
    "rows of no expert": replace(PLAIN, beyond=22),
    "ragged": replace(PLAIN, K=51, N=93, R=5, k=4),
    "one choice, rank 1": replace(PLAIN, k=1, R=1),
    "eight choices, rank 100": replace(PLAIN, counts=(33, 31), k=8, R=100),
    "rank 256": replace(PLAIN, counts=(3, 17, 20), R=256, adapter=BF16),
    "float16": replace(PLAIN, dtype=FP16, R=20),
    "rows of B": replace(PLAIN, K=51, N=93, R=12, whole_rows=True),
    "float32": replace(PLAIN, dtype=FP32, K=40, N=50, R=20),
    "no rows": replace(PLAIN, counts=(0, 0, 0)),
}
SMALL = replace(PLAIN, counts=(9, 0, 20, 1), beyond=4, K=64, N=72, R=16)


class Problem:
    """The operands of a case on a device, and what plain torch makes of them."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        E, (K, N, R) = len(case.counts), (case.K, case.N, case.R)
        stops = torch.tensor(case.counts).cumsum(0).int()
        self.bounds = list(pairwise([0, *stops.tolist()]))
        self.offsets = stops.to(device)
        self.order = torch.randperm(case.rows).to(device)
        self.x = self._draw(case.tokens, K)
        self.dY = self._draw(case.tokens, N)
        self.W = self._draw(E, N, K) / 8
        self.A = self._draw(E, R, K, dtype=case.adapter) / 4
        # As PEFT stores B: the experts fastest.
        self.B = self._draw(N, R, E, dtype=case.adapter).permute(2, 0, 1) / 4
        if case.whole_rows:
            self.B = self.B.contiguous()
        self.bias = self._draw(E, N, dtype=case.adapter)
        self.w = self._draw(case.tokens, case.k, dtype=FP32)
        self.S = self._draw(case.rows, R)
        self.dS = self._draw(case.rows, R)
        self.y = self._draw(case.rows, N)
        self.s = 0.7

    def _draw(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape).to(dtype or self.case.dtype).to(self.device)

    def run(self) -> dict[str, torch.Tensor]:
        """Everything that the kernels make, rows of no expert left out of what has none."""
        o, dtype, used = self, self.case.dtype, sum(self.case.counts)
        forward = expert_shrink.gather(o.x, o.order, o.offsets, o.A.mT)
        wide = expert_shrink.gather(o.x, o.order, o.offsets, o.A.mT, saves_S=False, widens=True)
        backward = expert_shrink.gather(
            o.dY, o.order, o.offsets, o.B, o.s, vector=o.bias, is_grad=True
        )
        rows, padding = forward.rows, wide.rows.shape[1] - self.case.K
        assert wide.S is None and padding == -(-self.case.R // 16) * 16
        widened = torch.cat([rows, forward.S, rows.new_zeros(len(rows), padding - o.case.R)], 1)
        assert_same_bits(wide.rows[:used], widened[:used], name="[x | S]")
        assert torch.equal(forward.back.cpu().long(), o.order.cpu().argsort())
        dS = expert_shrink.shrunk_dtype(dtype)
        low, bias = LowRank(o.S, o.B, o.s), o.bias.to(dtype)
        rows[used:] = 0.0  # nobody writes them
        dB, dbias = expert_gradients.gradients(
            o.dY, o.S, o.offsets, scaling=o.s, factor=o.B, bias=o.bias, order=o.order, w=o.w,
            gathers=True,
        )  # fmt: skip
        dA, _ = expert_gradients.gradients(rows, o.dS.to(dS), o.offsets, factor=o.A, is_A=True)
        back = forward.back
        return {
            "rows": rows[:used],
            "S": forward.S[:used],
            "dS": backward.S[:used],
            "dots": backward.dots[:used],
            "product": expert_product.product(rows, o.W, o.offsets, low, bias),
            "base": expert_product.product(rows, o.W, o.offsets),
            "added": expert_product.add_(o.y.clone(), o.offsets, low, bias),
            "dX": expert_product.add_(o.y.clone(), o.offsets, LowRank(o.dS.to(dS), o.B)),
            "dB": dB,
            "dA": dA,
            "dbias": dbias,
            "out": expert_scatter.scatter(o.y, back, o.offsets, o.case.tokens, o.w),
            "sum": expert_scatter.scatter(o.y, back, o.offsets, o.case.tokens),
        }

    def plain(self, of: Any) -> dict[str, torch.Tensor]:
        """The same, in the dtype that `of` gives, on the CPU."""
        c, dtype = self.case, self.case.dtype
        names = ("x", "dY", "W", "A", "B", "bias", "w", "S", "dS", "y")
        o = {name: of(getattr(self, name).cpu().to(dtype)) for name in names}
        o["w"] = of(self.w.cpu())
        token = self.order.cpu() // c.k
        made: dict[str, list[torch.Tensor]] = {}
        out, total = torch.zeros_like(o["dY"]), torch.zeros_like(o["dY"])
        for e, (start, stop) in enumerate(self.bounds):
            at = slice(start, stop)
            x, dY, S, dS, y = o["x"][token[at]], o["dY"][token[at]], *(o[n][at] for n in names[7:])
            W, A, B, bias = (o[n][e] for n in ("W", "A", "B", "bias"))
            w = o["w"].reshape(-1)[self.order.cpu()[at]].unsqueeze(1)
            Q = of((self.B[e].cpu().float() * self.s).to(dtype))
            found = {
                "rows": x, "S": x @ A.T, "dS": self.s * (dY @ B), "dots": (dY * bias).sum(1),
                "product": x @ W.T + S @ Q.T + bias, "base": x @ W.T, "added": y + S @ Q.T + bias,
                "dX": y + dS @ B.T, "dB": [self.s * (dY.T @ (w * S).to(S.dtype))],
                "dA": [dS.T @ x], "dbias": [(w * dY).sum(0)],
            }  # fmt: skip
            for name, value in found.items():
                per_expert = isinstance(value, list)
                made.setdefault(name, []).append(value[0].unsqueeze(0) if per_expert else value)
            out.index_add_(0, token[at], (w * y).to(out.dtype))
            total.index_add_(0, token[at], y)
        results = {name: torch.cat(parts) for name, parts in made.items()}
        nothing = torch.zeros(c.beyond, c.N, dtype=out.dtype)
        for name in ("product", "added", "dX"):
            results[name] = torch.cat([results[name], nothing])
        results["base"] = torch.cat([results["base"], nothing])
        return {**results, "out": out, "sum": total}


def _check(problem: Problem, found: dict[str, torch.Tensor]) -> None:
    dtype = problem.case.dtype
    exact = problem.plain(lambda t: t.double())
    eager = orders(lambda: problem.plain(lambda t: t.to(dtype)))
    assert_all_accurate(found, exact, eager, compute_dtype=dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_every_result(case: Case) -> None:
    problem = Problem(case, torch.device("cpu"))
    _check(problem, problem.run())


def test_compiled_code(ptx_executor: Executor) -> None:
    problem = Problem(SMALL, ptx_executor.device)
    found = problem.run()
    _check(problem, found)
    with ptx_executor.with_options(schedule="reverse", resident=1):
        again = problem.run()
    for name, value in found.items():
        assert_same_bits(again[name], value, name=name)


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("arch", "case"),
    [
        pytest.param(90, replace(SMALL, dtype=FP16, R=5), id="float16, ragged"),
        pytest.param(80, replace(SMALL, R=4, K=51, N=93, whole_rows=True), id="rank 4"),
        pytest.param(90, replace(SMALL, R=24, K=51, N=93, whole_rows=True), id="rank 24"),
        pytest.param(100, replace(SMALL, R=8, whole_rows=True), id="rank 8"),
        pytest.param(80, CASES["float32"], id="float32", marks=pytest.mark.exhaustive),
        pytest.param(100, CASES["rank 256"], id="rank 256", marks=pytest.mark.exhaustive),
    ],
)
def test_other_compiled_code(arch: int, case: Case) -> None:
    with started(machines.ptx(arch)) as machine:
        problem = Problem(case, machine.device)
        _check(problem, problem.run())
