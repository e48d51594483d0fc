"""FLOPs and bytes of the passes of an operation, from its query alone.

Letters as everywhere: rows M, columns K and N, rank R; ``e`` is the size of an element of x.
Vectors of N or R elements are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..kernels import launch_policy, strips
from .plans import Plan, Query

# Columns of the rank in one walk of strips over its rows.
_CHUNK = launch_policy.MAX_BLOCK_R


@dataclass(frozen=True)
class Work:
    """One pass over memory; ``launches`` is 0 where it shares the launch of another."""

    flops: int
    bytes: int
    launches: int = 1


def works(plan: Plan, q: Query, arch: int | None) -> list[Work]:
    """The passes of FUSED or HYBRID."""
    count = _Hybrid(q, arch) if plan.route != "fused" else _Fused(q, arch)
    return count.forward() if q.is_forward else count.backward()


class _Counts:
    def __init__(self, q: Query, arch: int | None) -> None:
        self.q, self.arch = q, arch
        self.M, self.K, self.e = q.M, q.K, q.dtype.itemsize
        self.adapter = self.e if q.adapter is None else q.adapter.itemsize
        self.layers = list(zip(q.N, q.R, q.weights, strict=True))
        self.R = sum(q.R)

    def dense(self, N: int, weight: torch.dtype | tuple[int, bool]) -> list[Work]:
        """The passes that bring W [N, K] into the dtype of x."""
        if isinstance(weight, torch.dtype):
            size = weight.itemsize
            return [] if weight == self.q.dtype else [Work(0, N * self.K * (size + self.e))]
        blocksize, nested = weight
        absmax = N * self.K // blocksize * (1 if nested else 4)
        return [Work(0, N * self.K // 2 + absmax + N * self.K * self.e)]


class _Fused(_Counts):
    """One launch of ticketed_gemm forward; strips, ticketed_gemm, strips backward.

    In a group the first layer's shrink makes S for all if there are many rows, and one launch sums
    dX.
    """

    def forward(self) -> list[Work]:
        found = []
        for i, (N, R, weight) in enumerate(self.layers):
            decoding, W = self._operand(N, weight)
            made = R
            if launch_policy.shares_shrink(self.M):
                made = self.R if i == 0 else 0
            if made:
                found.append(self._shrink(self.K, made, self._S(made)))
            y = self.M * N * self.e * (2 if self.q.needs[i].g else 1)
            found += [*decoding, self._gemm(self.K, N, R, W, y, 0 if made else 1, self._S(R))]
        return found

    def backward(self) -> list[Work]:
        found = []
        for i, ((N, R, weight), need) in enumerate(zip(self.layers, self.q.needs, strict=True)):
            needs_dS = R > 0 and (need.x or any(n.A for n in self.q.needs))
            first = int(i == 0)
            needs_T, sums = need.B or need.b or need.d, need.bias or need.g
            stores_dS = (
                needs_dS and needs_T and strips.storing_dS_pays(N, R, self.q.dtype, self._strip(R))
            )
            if needs_T or sums:
                found += self._strips(N, R, needs_T, stores_dS, need.B, self._S)
                if need.g:
                    found.append(Work(0, self.M * N * self.e, 0))
            if needs_dS or need.x:
                if needs_dS:
                    dS = self._sum(N, R) if stores_dS else self._shrink(N, R, self._dS(R))
                    found.append(replace(dS, launches=first))
                if need.x:
                    decoding, W = self._operand(N, weight)
                    dX, launches = first * self.M * self.K * self.e, 0 if needs_dS else first
                    found += [*decoding, self._gemm(N, self.K, R, W, dX, launches, self._dS(R))]
        if any(need.A for need in self.q.needs):
            found += self._strips(self.K, self.R, True, False, True, self._dS)
        return found

    def _operand(self, N: int, weight: torch.dtype | tuple[int, bool]) -> tuple[list[Work], int]:
        """Launches before the GEMM, and the bytes of W that it reads."""
        in_gemm = launch_policy.why_nf4_workspace(self.M, self.K, self.q.dtype, self.arch) is None
        if isinstance(weight, tuple) and in_gemm:
            return [], N * self.K // 2
        return self.dense(N, weight), N * self.K * self.e

    def _S(self, R: int) -> int:
        """Bytes of S [M, R]."""
        return self.M * R * self.e

    def _dS(self, R: int) -> int:
        """Bytes of dS [M, R]; in float16 it is float32, with the largest of each tile of rows."""
        if self.q.dtype != torch.float16:
            return self._S(R)
        rows = launch_policy.pick_gemm(self.M, self.q.dtype, self.arch).BLOCK_S
        return 4 * R * (self.M + _cdiv(self.M, rows))

    def _shrink(self, K: int, R: int, S: int) -> Work:
        """S [M, R] from x [M, K], or dS from dY; it shares the launch of the GEMM after it."""
        M, e = self.M, self.e
        return Work(2 * M * K * R, M * K * e + R * K * self.adapter + S)

    def _sum(self, N: int, R: int) -> Work:
        blocks = _cdiv(N, self._strip(R).BLOCK_L)
        return Work(0, blocks * self.M * R * 4 + self._dS(R))

    def _gemm(self, K: int, N: int, R: int, W: int, y: int, launches: int, S: int) -> Work:
        M, e = self.M, self.e
        low_rank = S + N * R * self.adapter
        return Work(2 * M * N * (K + R), M * K * e + W + low_rank + y, launches)

    def _strips(
        self,
        L: int,
        R: int,
        needs_T: bool,
        stores_dS: bool,
        grad: bool,
        bytes_of_S: Callable[[int], int],
    ) -> list[Work]:
        """Walks over X [M, L], one for each chunk of the rank; bytes_of_S are those of S or dS."""
        M, e, config = self.M, self.e, self._strip(R)
        blocks, chunks = _cdiv(L, config.BLOCK_L), _cdiv(R, _CHUNK) if needs_T else 1
        ranges, _ = launch_policy.row_ranges(M, blocks * chunks, config.BLOCK_M)
        found = []
        for chunk in range(chunks):
            width = min(_CHUNK, R - chunk * _CHUNK)
            moved, flops = M * L * e, 0
            if stores_dS:
                moved += L * width * self.adapter + blocks * M * width * 4
                flops += 2 * M * L * width
            if needs_T:
                moved += bytes_of_S(width) + ranges * L * width * 4
                flops += 2 * M * L * width
            if needs_T and chunk == chunks - 1:
                moved += ranges * L * R * 4 + (L * R * self.adapter if grad else 0)
            found.append(Work(flops, moved, 1 if chunk == 0 else 0))
        return found

    def _strip(self, R: int) -> launch_policy.StripConfig:
        return launch_policy.pick_strips(self.q.dtype, R, self.arch)


class _Hybrid(_Counts):
    """The operations of torch_ops.py; those on [M, R], [R, K] or [N, R] count as launches only."""

    def forward(self) -> list[Work]:
        M, K, e = self.M, self.K, self.e
        found = self._cast(self.R * K)
        if self.R:
            found += self._dropped_x()
            found.append(self._product(M, K, self.R))
        for N, R, weight in self.layers:
            if R:
                found += self._cast(N * R)
                found.append(self._product(M, R, N))
            found += [*self.dense(N, weight), self._product(M, K, N, adds=R > 0)]
            if self.q.has("g"):
                found.append(Work(0, 2 * M * N * e))
        return found

    def backward(self) -> list[Work]:
        M, K, e = self.M, self.K, self.e
        found: list[Work] = []
        for i, ((N, R, weight), need) in enumerate(zip(self.layers, self.q.needs, strict=True)):
            needs_dS = R > 0 and (need.x or any(n.A for n in self.q.needs))
            if needs_dS:
                found += [*self._cast(N * R), self._product(M, N, R)]
            if need.B or need.b or need.d:
                found += [self._product(N, M, R, out=4), Work(0, 2 * N * R * 4)]
                found += self._cast(N * R, 4, self.adapter)
            if need.bias:
                found.append(Work(0, M * N * e))
            if need.g:
                widened = 0 if e == 4 else 2 * M * N * (e + 4)
                found.append(Work(0, widened + 2 * M * N * 4))
            if need.x:
                found += [*self.dense(N, weight), self._product(M, N, K, adds=i > 0 or R > 0)]
        if self.R and self.q.needs[0].x:
            found += [*self._cast(self.R * K), self._product(M, self.R, K), *self._dropped_dX()]
            # In float16 the product is scaled back.
            found += [Work(0, 2 * M * K * e)] * (self.q.dtype == torch.float16)
        if any(need.A for need in self.q.needs):
            found += [*self._dropped_x(), self._product(self.R, M, K, out=4)]
            found += self._cast(self.R * K, 4, self.adapter)
        return found

    def _product(self, m: int, k: int, n: int, *, adds: bool = False, out: int = 0) -> Work:
        """[m, k] · [k, n]; ``out`` is the size of an element of the result, if not that of x."""
        result = m * n * (out or self.e)
        return Work(2 * m * k * n, (m * k + k * n) * self.e + result * (2 if adds else 1))

    def _cast(self, count: int, size: int = 0, to: int = 0) -> list[Work]:
        """The elements of a factor, from its own dtype to that of x; nothing if they are equal."""
        size, to = size or self.adapter, to or self.e
        return [] if size == to else [Work(0, count * (size + to))]

    def _dropped_x(self) -> list[Work]:
        """The mask as bytes, as booleans and as numbers, and its product with x."""
        if not self.q.has("dropout"):
            return []
        count, e = self.M * self.K, self.e
        return [
            Work(0, count),
            Work(0, 2 * count),
            Work(0, count * (1 + e)),
            Work(0, 3 * count * e),
        ]

    def _dropped_dX(self) -> list[Work]:
        if not self.q.has("dropout"):
            return []
        count, e = self.M * self.K, self.e
        return [Work(0, count * (1 + e)), Work(0, 3 * count * e)]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
