"""FLOPs and bytes of the passes of an operation, from its query alone.

Letters as everywhere: rows M, columns K and N, rank R; ``e`` is the size of an element of x.
Vectors of N or R elements are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

import torch

from ..factors import Needs
from ..kernels import launch_policy, shrink, strips
from ..kernels.launch_policy import GemmConfig
from .plans import Plan, Query

# Columns of the rank in one walk of strips over its rows.
_CHUNK = launch_policy.MAX_BLOCK_R
Weight = torch.dtype | tuple[int, bool]


@dataclass(frozen=True)
class Work:
    """One pass over memory; ``launches`` is 0 where it shares the launch of another.

    ``tile``: that of a Triton product with W, which may decode W on its way; ``added_to``: bytes of
    a matrix that cuBLAS adds its product to; ``is_aten``: PyTorch launches it, not Triton.
    """

    flops: int
    bytes: int
    launches: int = 1
    tile: GemmConfig | None = None
    decodes: bool = False
    added_to: int = 0
    is_aten: bool = False
    issue_seconds: float = 0.0


def works(plan: Plan, q: Query, arch: int | None) -> list[Work]:
    """The passes of a plan."""
    count = {"fused": _Fused, "hybrid": _Hybrid, "augmented": _Augmented}[plan.route](plan, q, arch)
    return list(count.forward() if q.is_forward else count.backward())


class _Counts:
    """What all routes share: decoding, and the kernels that read x or dY for the low rank."""

    def __init__(self, plan: Plan, q: Query, arch: int | None) -> None:
        self.plan, self.q, self.arch = plan, q, arch
        self.M, self.K, self.e = q.M, q.K, q.dtype.itemsize
        self.adapter = self.e if q.adapter is None else q.adapter.itemsize
        self.layers = list(zip(q.N, q.R, q.weights, strict=True))
        self.R = sum(q.R)
        self.float16 = q.dtype == torch.float16

    def forward(self) -> Iterator[Work]:
        raise NotImplementedError

    def input_gradient(self) -> Iterator[Work]:
        """dX, and dS where it is needed, after the strips of the output side."""
        raise NotImplementedError

    def backward(self) -> Iterator[Work]:
        shared = self._blocks_of_shared_strips()
        for i, (N, R, need) in enumerate(self._wanted()):
            needs_T, sums = need.B or need.b or need.d, need.bias or need.g
            if needs_T or sums:
                stores_dS, first = self._stores_dS(N, R, need), i == 0 or not shared
                for work in self._strips(N, R, needs_T, stores_dS, need.B, self._S, shared):
                    yield work if first else replace(work, launches=0)
                if need.g:
                    yield Work(0, self.M * N * self.e, 0)
        yield from self.input_gradient()
        if any(need.A for need in self.q.needs):
            yield from self._strips(self.K, self.R, True, False, True, self._dS)

    def _blocks_of_shared_strips(self) -> int:
        """Blocks of columns in the one launch for all layers of a group; 0: they are not alike."""
        found = [
            (R, need.B, need.bias, self._stores_dS(N, R, need)) for N, R, need in self._wanted()
        ]
        if len(found) == 1 or len(set(found)) > 1 or not found[0][1]:
            return 0
        return sum(_cdiv(N, self._strip(found[0][0]).BLOCK_L) for N, _, _ in self.layers)

    def _wanted(self) -> Iterator[tuple[int, int, Needs]]:
        for (N, R, _), need in zip(self.layers, self.q.needs, strict=True):
            yield N, R, need

    def _needs_dS(self, R: int, need: Needs) -> bool:
        return R > 0 and (need.x or any(n.A for n in self.q.needs))

    def _stores_dS(self, N: int, R: int, need: Needs) -> bool:
        needs_T = need.B or need.b or need.d
        pays = R > 0 and strips.storing_dS_pays(N, R, self.q.dtype, self._strip(R))
        return self._needs_dS(R, need) and needs_T and pays

    def _make_dS(self, N: int, R: int, need: Needs, launches: int) -> Work:
        """dS from its parts, or from dY [M, N]."""
        if self._stores_dS(N, R, need):
            blocks = _cdiv(N, self._strip(R).BLOCK_L)
            return Work(0, blocks * self.M * R * 4 + self._dS(R), launches)
        return replace(self._shrink(N, R, self._dS(R)), launches=launches)

    def _dense(self, N: int, weight: Weight, columns: int = 0) -> Iterator[Work]:
        """The pass that brings W [N, K] into the dtype of x, in rows of `columns` more."""
        written = N * (self.K + columns) * self.e
        if isinstance(weight, torch.dtype):
            if weight != self.q.dtype:
                yield Work(0, N * self.K * weight.itemsize + written, is_aten=True)
            return
        blocksize, nested = weight
        absmax = N * self.K // blocksize * (1 if nested else 4)
        yield Work(0, N * self.K // 2 + absmax + written)

    def _S(self, R: int) -> int:
        """Bytes of S [M, R]."""
        return self.M * R * self.e

    def _dS(self, R: int) -> int:
        """Bytes of dS [M, R]; in float16 it is float32, with the largest of each tile of rows."""
        if not self.float16:
            return self._S(R)
        rows = launch_policy.pick_gemm(self.M, self.q.dtype, self.arch).BLOCK_S
        return 4 * R * (self.M + _cdiv(self.M, rows))

    def _shrink(self, K: int, R: int, S: int) -> Work:
        """S [M, R] from x [M, K], or dS from dY."""
        M, e = self.M, self.e
        return Work(2 * M * K * R, M * K * e + R * K * self.adapter + S)

    def _strips(
        self,
        L: int,
        R: int,
        needs_T: bool,
        stores_dS: bool,
        grad: bool,
        bytes_of_S: Callable[[int], int],
        shared: int = 0,
    ) -> Iterator[Work]:
        """Walks over X [M, L], one for each chunk of the rank; bytes_of_S are those of S or dS, and
        `shared` the blocks of columns of a launch for several layers."""
        M, e, config = self.M, self.e, self._strip(R)
        blocks, chunks = _cdiv(L, config.BLOCK_L), _cdiv(R, _CHUNK) if needs_T else 1
        programs = (shared or blocks) * chunks
        ranges, _ = launch_policy.row_ranges(M, programs, config.BLOCK_M, self.arch)
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
            yield Work(flops, moved, 1 if chunk == 0 else 0)

    def _strip(self, R: int) -> launch_policy.StripConfig:
        return launch_policy.pick_strips(self.q.dtype, R, self.arch)


class _Fused(_Counts):
    """One launch of ticketed_gemm forward; strips, ticketed_gemm, strips backward.

    In a group the first layer's shrink makes S for all, and one launch sums dX.
    """

    def forward(self) -> Iterator[Work]:
        for i, (N, R, weight) in enumerate(self.layers):
            made = self.R if i == 0 else 0
            if made:
                yield self._shrink(self.K, made, self._S(made))
            y = self.M * N * self.e * (2 if self.q.needs[i].g else 1)
            yield from self._gemm(self.K, N, R, weight, y, 0 if made else 1, self._S(R))

    def input_gradient(self) -> Iterator[Work]:
        for i, (N, R, need) in enumerate(self._wanted()):
            first = int(i == 0)
            needs_dS = self._needs_dS(R, need)
            if needs_dS:
                yield self._make_dS(N, R, need, first)
            if need.x:
                dX, launches = first * self.M * self.K * self.e, 0 if needs_dS else first
                weight = self.layers[i][2]
                yield from self._gemm(N, self.K, R, weight, dX, launches, self._dS(R))

    def _gemm(
        self, K: int, N: int, R: int, weight: Weight, y: int, launches: int, S: int
    ) -> Iterator[Work]:
        """X [M, K] W' [K, N] and the low rank on top, after W is decoded where that is a launch."""
        M, e, decodes = self.M, self.e, isinstance(weight, tuple) and not self._workspace()
        if not decodes:
            yield from self._dense(K * N // self.K, weight)
        W = N * K // 2 if decodes else N * K * e
        moved = M * K * e + W + S + N * R * self.adapter + y
        yield Work(2 * M * N * (K + R), moved, launches, self._tile(R), decodes)

    def _workspace(self) -> bool:
        if self.plan.workspace is not None:
            return self.plan.workspace
        reason = launch_policy.why_nf4_workspace(self.M, self.K, self.q.dtype, self.arch)
        return reason is not None

    def _tile(self, R: int) -> GemmConfig:
        if self.plan.gemm is not None:
            return self.plan.gemm
        return launch_policy.pick_gemm(
            self.M, self.q.dtype, self.arch, has_gain=self.q.has("g"), R=R,
            masks_dX=self.q.has("dropout") and not self.q.is_forward,
        )  # fmt: skip


class _Hybrid(_Counts):
    """The low-rank part by one product of cuBLAS or one kernel, then cuBLAS adds the product with
    W; strips as everywhere."""

    def forward(self) -> Iterator[Work]:
        M, K, e = self.M, self.K, self.e
        if self.R:
            wide = max(self.q.R) > launch_policy.MAX_BLOCK_R
            plain = (wide or len(self.layers) == 1) and self._is_plain(max(self.q.R))
            size = (yield from self._stack()) if plain else self.adapter
            work = self._shrink(K, self.R, self._S(self.R))
            less = self.R * K * (self.adapter - size)
            yield replace(work, bytes=work.bytes - less, is_aten=plain)
            yield from self._expand()
        for N, R, weight in self.layers:
            yield from self._dense(N, weight)
            yield self._product(M, K, N, adds=R > 0)
            if self.q.has("g"):
                yield Work(0, 2 * M * N * e, is_aten=True)

    def input_gradient(self) -> Iterator[Work]:
        M, K, e, needs_x = self.M, self.K, self.e, self.q.needs[0].x
        for i, (N, R, need) in enumerate(self._wanted()):
            if self._needs_dS(R, need):
                yield self._make_dS(N, R, need, int(i == 0))
        if self.R and needs_x:
            alone = len(self.layers) == 1 and not self.float16
            plain, size = alone and self._is_plain(max(self.q.R)), self.adapter
            if plain:
                size = yield from self._stack()
            moved = self._dS(self.R) + self.R * K * size + M * K * e
            yield Work(2 * M * self.R * K, moved, is_aten=plain)
        for i, (N, _, weight) in enumerate(self.layers):
            if not needs_x:
                break
            yield from self._dense(N, weight)
            if self.q.has("g"):
                yield Work(0, 2 * e * N * min(M, K), is_aten=True)
            yield self._product(M, N, K, adds=i > 0 or self.R > 0)

    def _stack(self) -> Generator[Work, None, int]:
        """All A below one another, in the dtype of x; the size of an element."""
        if len(self.layers) > 1:
            yield Work(0, 2 * self.R * self.K * self.adapter, is_aten=True)
        if not self._casts():
            return self.adapter
        yield Work(0, self.R * self.K * (self.adapter + self.e), is_aten=True)
        return self.e

    def _expand(self) -> Iterator[Work]:
        """S_i Q_iᵀ of every layer: a product, or one launch of ours for all of several."""
        gains = self.q.has("b") + self.q.has("d")
        wide = max(self.q.R) > launch_policy.MAX_BLOCK_R
        launched = len(self.layers) > 1 or (not wide and (self._casts() or gains > 0))
        for i, (N, R, _) in enumerate(self.layers):
            size = self.adapter if launched else self.e
            moved = self._S(R) + N * R * size + self.M * N * self.e
            if not launched:
                for _ in range(gains):
                    yield Work(0, 2 * 4 * N * R, is_aten=True)
                if gains or self._casts():
                    yield Work(0, N * R * ((4 if gains else self.adapter) + self.e), is_aten=True)
            launches = int(i == 0 or not launched)
            yield Work(2 * self.M * R * N, moved, launches, is_aten=not launched)

    def _is_plain(self, R: int) -> bool:
        """Whether products of x or dS with the factors A of this rank are cuBLAS's."""
        casts = self._casts() and R <= launch_policy.MAX_BLOCK_R
        return not (casts or self.q.has("dropout") or self.q.has("spans"))

    def _casts(self) -> bool:
        return self.q.adapter not in (None, self.q.dtype)

    def _product(self, m: int, k: int, n: int, *, adds: bool) -> Work:
        """[m, k] · [k, n] by cuBLAS, added to what is there."""
        result = m * n * self.e
        moved = (m * k + k * n) * self.e + (2 if adds else 1) * result
        return Work(2 * m * k * n, moved, added_to=result if adds else 0, is_aten=True)


class _Augmented(_Hybrid):
    """[x | S] and [W | Q], each in one pass, and one product of cuBLAS for each layer. Of forward
    passes alone."""

    def forward(self) -> Iterator[Work]:
        M, K, e = self.M, self.K, self.e
        padded = shrink.padding_of(self.R)
        wide = M * (K + padded) * e
        yield self._shrink(K, self.R, self._S(self.R) + wide)
        for N, R, weight in self.layers:
            (decoding,) = self._dense(N, weight, padded)
            yield replace(decoding, bytes=decoding.bytes + N * R * self.adapter)
            yield self._product(M, K + padded, N, adds=False)
            if self.q.has("g"):
                yield Work(0, 2 * M * N * e, is_aten=True)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
