"""The reader of PTX finds fences and orderings of products that were removed from kernels."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")
from lora_fast.kernels import strips
from lora_fast.kernels.dropout import Dropout
from lora_fast.kernels.scaling import Shrunk

from bench.async_products import serialised, unfenced
from bench.instruments import stub_driver

HEAD = ".visible .entry kernel(\n)\n{\n"


def _writes(body: str) -> list[list[str]]:
    return [sorted(read.writes) for read in unfenced(HEAD + body + "\nret;\n}")]


WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, 0, 1, 1, 0, 1;"
FENCE = "fence.proxy.async.shared::cta;"
STORE = "st.shared.v2.b32 [ %r1 + 0 ], { %r2, %r3 };"
COPY = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"
LOOP = "$L__BB0_1:\n{}\n@%p1 bra \t$L__BB0_1;"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([STORE, FENCE, WGMMA], []),
        ([STORE, WGMMA], [["st.shared"]]),
        ([FENCE, STORE, COPY, WGMMA], [["cp.async.cg.shared", "st.shared"]]),
        ([FENCE, WGMMA, STORE], []),
        ([FENCE, LOOP.format("\n".join([WGMMA, STORE]))], [["st.shared"]]),
        ([STORE, LOOP.format("\n".join([FENCE, WGMMA, STORE]))], []),
        (["@%p1 bra \t$L__BB0_1;", STORE, FENCE, "$L__BB0_1:", WGMMA], []),
        (["@%p1 bra \t$L__BB0_1;", STORE, "$L__BB0_1:", WGMMA], [["st.shared"]]),
        ([STORE, "@%p1 bra \t$L__BB0_1;", FENCE, "$L__BB0_1:", WGMMA], [["st.shared"]]),
        (["bra.uni \t$L__BB0_2;", "$L__BB0_1:", WGMMA, "ret;", "$L__BB0_2:", STORE], []),
        ([STORE, WGMMA.replace("wgmma.mma_async.sync", "tcgen05.mma")], [["st.shared"]]),
    ],
)
def test_a_write_is_followed_along_every_path(lines, expected):
    assert _writes("\n".join(lines)) == expected


@pytest.fixture(scope="module")
def ptx():
    """dA under dropout, whose operand is made in registers, and the other one comes by cp.async."""
    with stub_driver.recording(90) as log:
        x = torch.empty(256, 512, dtype=torch.bfloat16, device="meta")
        dS = torch.empty(256, 32, dtype=torch.bfloat16, device="meta")
        strips.grad_shrink(x, Shrunk(dS), torch.float32, Dropout(0.1, 3))
    return log.launches[0].kernel.text("ptx")


@pytest.mark.offline
@pytest.mark.pinned
def test_a_fence_taken_from_a_kernel_is_missed(ptx):
    assert unfenced(ptx) == []
    without = re.sub(r"fence\.proxy\.async\S*;", "", ptx)
    assert {kind for read in unfenced(without) for kind in read.writes} >= {"cp.async.cg.shared"}


@pytest.mark.offline
@pytest.mark.pinned
def test_an_accumulator_written_between_two_products_is_noticed(ptx):
    assert serialised(ptx) == ()
    product = re.search(r"wgmma\.mma_async\S* \{(%r\d+),[^\n]*\n\s*// end inline asm\n", ptx)
    assert product is not None
    spoilt = ptx[: product.end()] + f"\tmov.b32 {product[1]}, 0;\n" + ptx[product.end() :]
    assert len(serialised(spoilt)) == 1
