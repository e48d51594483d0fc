"""The traffic model, byte by byte, against what the kernels load and store in the interpreter."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from gated_checks import MLP, fused, make
from lora_fast.kernels import gated_policy, launch_policy, ticketed_gemm
from triton.runtime import interpreter

import lora_fast
from bench.instruments import traffic
from lora_fast.backends.triton_ops import TritonBackend
from lora_fast.factors import Constants, Factors, Needs
from lora_fast.functional import Member, adapted_linear, adapted_linears
from lora_fast.tuning.plans import AUGMENTED, HYBRID

pytestmark = pytest.mark.interpreter


@dataclass
class Observed:
    """One interpreted launch and the addresses that it touched, by pass and argument."""

    name: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constexprs: dict[str, Any] = field(default_factory=dict)
    loads: dict[tuple[int, str], list[np.ndarray]] = field(
        default_factory=lambda: defaultdict(list)
    )
    stores: dict[tuple[int, str], list[np.ndarray]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def pass_of(self, program: tuple[int, int, int]) -> int:
        """Tickets are taken in the order of the programs; strips has a pass for each chunk."""
        if self.name == "strips":
            return program[2]
        if self.name == "ticketed_gemm" and self.arguments["sync_ptr"] is not None:
            return int(self._is_gemm_tile(program[0]))
        return 0

    def _is_gemm_tile(self, ticket: int) -> bool:
        """A group of row blocks after the other: the tiles that make its S, then its products."""
        a = {**self.arguments, **self.arguments["TILES"]._asdict()}
        rows = a["GROUP_M"] * a["BLOCK_M"]
        for first in range(0, a["M"], rows):
            here = min(rows, a["M"] - first)
            producers = -(-here // a["BLOCK_S"]) * a["num_chunks"]
            if ticket < producers:
                return False
            ticket -= producers
            products = -(-here // a["BLOCK_M"]) * -(-a["N"] // a["BLOCK_N"])
            if ticket < products:
                return True
            ticket -= products
        raise AssertionError(f"{ticket} tickets too many")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        given = (part for value in self.arguments.items() for part in traffic.spread(*value))
        yield from ((name, value) for name, value in given if isinstance(value, torch.Tensor))

    def argument_at(self, addresses: np.ndarray) -> str:
        for name, value in self.tensors():
            start = value.untyped_storage().data_ptr()
            if start <= addresses.min() < start + value.untyped_storage().nbytes():
                return name
        raise AssertionError(f"{self.name} touches memory of none of its arguments")

    def record(self, into: Any, program: tuple[int, int, int], ptrs: Any, mask: Any) -> None:
        addresses = np.asarray(ptrs.data)[np.asarray(mask.data)].ravel()
        if addresses.size:
            into[self.pass_of(program), self.argument_at(addresses)].append(addresses)

    def as_observed(self, modelled: Counter[str]) -> dict[str, int]:
        """By argument, those that share memory (S of two layers side by side, a gradient in place)
        under the name of the first."""
        found: Counter[str] = Counter()
        tensors = dict(self.tensors())
        for name, count in modelled.items():
            where = np.asarray([tensors[name].untyped_storage().data_ptr()])
            found[self.argument_at(where)] += count
        return dict(found)

    def distinct(self, into: Any, number: int) -> dict[str, int]:
        return self._bytes(into, number, lambda chunks: len(np.unique(np.concatenate(chunks))))

    def issued(self, into: Any, number: int) -> dict[str, int]:
        return self._bytes(into, number, lambda chunks: sum(len(c) for c in chunks))

    def _bytes(self, into: Any, number: int, count: Any) -> dict[str, int]:
        itemsize = {name: value.dtype.itemsize for name, value in self.tensors()}
        return {
            name: count(chunks) * itemsize[name]
            for (p, name), chunks in into.items()
            if p == number and name != "sync_ptr"
        }


@contextlib.contextmanager
def observing() -> Iterator[list[Observed]]:
    """The interpreted launches inside ``with``, and every address they load or store."""
    launches: list[Observed] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    call, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store

    def called(self: Any, *args: Any, **kwargs: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        known = {name: value for name, value in kwargs.items() if name in names}
        arguments = inspect.getcallargs(self.fn, *args, **known)
        grid = self.grid(arguments) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1)[:3]
        launches.append(Observed(self.fn.__name__, grid, arguments))
        call(self, *args, **kwargs)

    def loaded(self: Any, ptrs: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        launches[-1].record(launches[-1].loads, self.grid_idx, ptrs, mask)
        return load(self, ptrs, mask, *rest, **kwargs)

    def stored(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
        launches[-1].record(launches[-1].stores, self.grid_idx, ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", called)
        patch.setattr(builder, "create_masked_load", loaded)
        patch.setattr(builder, "create_masked_store", stored)
        yield launches


def _step(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout_p: float, nf4: bool
) -> list[Observed]:
    torch.manual_seed(0)
    W: Any = torch.randn(N, K, dtype=dtype)
    if nf4:
        W = lora_fast.NF4Weight.from_dense(W)
    x, A, B = (torch.randn(shape, dtype=dtype) for shape in ((M, K), (R, K), (N, R)))
    for tensor in (x, A, B):
        tensor.requires_grad_()
    with lora_fast.set_backend("triton"), observing() as launches:
        y = adapted_linear(x, W, A=A, B=B, scaling=2.0, dropout_p=dropout_p, dropout_seed=3)
        y.backward(torch.ones_like(y))
    return launches


# M, N, K, R, dtype, dropout_p, nf4
CASES = {
    "plain": (256, 256, 128, 16, torch.bfloat16, 0.0, False),
    "ragged": (200, 328, 136, 24, torch.bfloat16, 0.1, False),
    "chunks of the rank": (130, 64, 72, 136, torch.bfloat16, 0.0, False),
    "few rows": (9, 96, 64, 8, torch.bfloat16, 0.0, False),
    "float16": (150, 96, 72, 20, torch.float16, 0.0, False),
    "float16, chunks of the rank": (130, 64, 72, 136, torch.float16, 0.1, False),
    "float32": (70, 80, 48, 20, torch.float32, 0.0, False),
    "two groups of row blocks": (270, 40, 16, 5, torch.float32, 0.0, False),
    "nf4": (40, 72, 320, 16, torch.bfloat16, 0.0, True),
    "nf4, many rows": (400, 72, 64, 16, torch.bfloat16, 0.0, True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_the_model_counts_the_bytes_that_the_kernels_move(case: tuple[Any, ...]) -> None:
    launches = _step(*case)
    names = [launch.name for launch in launches]
    gemms = ["ticketed_gemm", "strips", "ticketed_gemm", "strips"]
    assert [name for name in names if name != "nf4_decode"] == gemms
    assert names.count("nf4_decode") == (2 if case[-1] and case[0] == 400 else 0)
    _compare(launches)


def test_parts_of_what_dropout_masks_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(launch_policy.pick_gemm(200, torch.bfloat16, None), MASK_PARTS=4)
    monkeypatch.setattr(ticketed_gemm, "pick_gemm", lambda *args, **kwargs: config)
    _compare(_step(*CASES["ragged"]))


@pytest.mark.parametrize("widths", [(96, 64), (96, 128)], ids=["apart", "one launch of strips"])
def test_groups_of_layers_with_one_input_are_counted_too(widths: tuple[int, int]) -> None:
    """Parts of dS pay off for widths of 80 or more."""
    M, K, R = 140, 72, 20
    x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
    members = []
    for N in widths:
        W, A, B = (torch.randn(size, dtype=torch.bfloat16) for size in ((N, K), (R, K), (N, R)))
        members.append(Member(W, None, A.requires_grad_(), B.requires_grad_(), 2.0))
    with lora_fast.set_backend("triton"), observing() as launches:
        ys = adapted_linears(x, members)
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    names = [launch.name for launch in launches]
    apart = 2 if min(widths) < 80 else 1
    assert names == ["ticketed_gemm"] * 2 + ["strips"] * apart + ["ticketed_gemm", "strips"]
    assert [len(launch.arguments["members"]) for launch in (launches[0], launches[-2])] == [1, 2]
    _compare(launches)


# M, N, K, R, dtype, dropout_p, whether W is NF4 and x lies beside S: the kernels of other routes.
ROUTES = {
    "hybrid": (150, 136, 72, 20, torch.bfloat16, 0.0, False),
    "hybrid, float16": (150, 96, 72, 136, torch.float16, 0.1, False),
    "hybrid, float32": (70, 80, 48, 20, torch.float32, 0.1, False),
    "augmented": (70, 72, 128, 20, torch.bfloat16, 0.1, True),
}


@pytest.mark.parametrize("case", ROUTES.values(), ids=list(ROUTES))
def test_routes_of_cublas_are_counted_too(case: tuple[Any, ...]) -> None:
    M, N, K, R, dtype, p, nf4 = case
    x, dY, W = (torch.randn(shape).to(dtype) for shape in ((M, K), (M, N), (N, K)))
    weight = lora_fast.NF4Weight.from_dense(W) if nf4 else W
    bias = None if nf4 else torch.randn(N).to(dtype)
    f = Factors(weight, bias, torch.randn(R, K), torch.randn(N, R), constants=Constants(2.0, p, 3))
    ops, needs = TritonBackend(cublas=True), Needs(x=True, A=True, B=True)
    with observing() as launches:
        _, saved = ops.forward(x, [f], [needs], AUGMENTED if nf4 else HYBRID)
        ops.backward([dY], x, saved, [f], [needs], HYBRID)
    there = ["shrink", "nf4_decode_augmented"] if nf4 else ["shrink", "expand"]
    back = ["strips", "ticketed_gemm", "expand", *["nf4_decode"] * nf4, "strips"]
    names = [launch.name for launch in launches]
    if dtype == torch.float32:
        # Factors in the dtype of x, which dropout is no part of: S Bᵀ is a product of cuBLAS.
        there = ["shrink"]
    assert names == [*there, *back]
    _compare(launches)


def test_groups_of_the_routes_of_cublas_are_counted_too() -> None:
    M, K = 70, 72
    x = torch.randn(M, K).to(torch.bfloat16)
    fs = [
        Factors(torch.randn(N, K).to(torch.bfloat16), A=torch.randn(R, K), B=torch.randn(N, R))
        for N, R in ((72, 5), (136, 16))
    ]
    ops, needs = TritonBackend(cublas=True), [Needs(x=True)] * 2
    with observing() as launches:
        ys, saved = ops.forward(x, fs, needs, HYBRID)
        ops.backward(ys, None, saved, fs, needs, HYBRID)
    assert [launch.name for launch in launches] == ["shrink", "expand", "ticketed_gemm", "expand"]
    _compare(launches)


# The gated MLP: ranks of its linears, what differs from bfloat16 without dropout.
GATED: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "plain": ((8, 8, 8), {}),
    "nf4, dropout": ((16, 5, 20), {"nf4": ("down",), "p": 0.25}),
    "ranks of several chunks": ((70, 20, 100), {}),
    "float16": ((8, 8, 8), {"dtype": torch.float16, "p": 0.25}),
    "float32": ((8, 8, 8), {"dtype": torch.float32}),
    "down alone": ((8, 8, 8), {"adapted": ("down",)}),
    "no adapter": ((8, 8, 8), {"adapted": ()}),
}


@pytest.mark.parametrize("walks", ["short", "long"])
@pytest.mark.parametrize("case", GATED.values(), ids=list(GATED))
def test_a_gated_mlp_is_counted_too(
    case: tuple[Any, Any], walks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if walks == "long":
        monkeypatch.setattr(gated_policy, "_PROGRAMS", 1)
        monkeypatch.setattr(gated_policy, "_CTAS", 1)
    mlp = MLP(**{"dtype": torch.bfloat16, "adapter": torch.float32, "M": 70, **case[1]})
    # Rows of whole blocks of NF4.
    with lora_fast.set_backend("triton"):
        o = make(replace(mlp, ranks=case[0], intermediate=64))
        with observing() as launches:
            fused(o, o.leaves).backward(o.dY)
    names = {launch.name for launch in launches}
    assert "gated_forward" in names and names & {"gated_backward", "gated_gradients"}
    _compare(launches)


def _compare(launches: list[Observed]) -> None:
    for launch in launches:
        for number, modelled in enumerate(traffic.traffic(launch)):
            where = f"{launch.name} {modelled.name}"
            read = launch.distinct(launch.loads, number)
            # Which of the 256 entries a weight uses depends on its data.
            if "code2_ptr" in read:
                assert read.pop("code2_ptr") <= modelled.read.pop("code2_ptr")
            assert read == launch.as_observed(modelled.read), where
            assert launch.distinct(launch.stores, number) == launch.as_observed(modelled.written), (
                where
            )
            assert launch.issued(launch.loads, number) == launch.as_observed(modelled.loaded), where
            assert launch.issued(launch.stores, number) == launch.as_observed(modelled.stored), (
                where
            )


def test_flops_are_those_of_the_equation() -> None:
    M, N, K, R = 64, 96, 128, 16
    launches = _step(M, N, K, R, torch.bfloat16, 0.0, False)
    flops = sum(p.flops for launch in launches for p in traffic.traffic(launch))
    base, shrink, expand = 4 * M * N * K, 2 * M * K * R, 2 * M * N * R
    # x A, S B | dY B, dYᵀ S, dS A, dSᵀ x
    assert flops == base + 3 * shrink + 3 * expand


def test_what_the_model_does_not_know_is_refused() -> None:
    (launch, *_) = _step(64, 64, 64, 16, torch.bfloat16, 0.0, False)
    launch.arguments["extra_ptr"] = launch.arguments["y_ptr"]
    with pytest.raises(NotImplementedError, match=r"must model the arguments \['extra_ptr'\]"):
        traffic.traffic(launch)
    launch.name = "unheard_of"
    with pytest.raises(NotImplementedError, match="unheard_of"):
        traffic.traffic(launch)
