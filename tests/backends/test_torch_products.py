"""Products of the torch backend: their dtype, their operands and their roundings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from equation import FACTORS, Case, check, make
from machines import NATIVE_DTYPES, multiplying
from torch.utils._python_dispatch import TorchDispatchMode

from bench.instruments.accuracy import assert_accurate, assert_same_bits, orders
from lora_fast import functional, set_backend
from lora_fast.backends import torch_products

# Before --cpu-kind puts another in its place.
from lora_fast.backends.torch_products import native_dtypes as native_dtypes_of_this_cpu
from lora_fast.functional import Member, adapted_linears

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def _torch_backend():
    with set_backend("torch"):
        yield


def test_this_cpu_multiplies_what_it_has_instructions_for() -> None:
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert native_dtypes_of_this_cpu() == ((BF16,) if supported else ())


@pytest.mark.parametrize("native", NATIVE_DTYPES.values(), ids=list(NATIVE_DTYPES))
def test_other_16_bit_dtypes_are_multiplied_as_float32(native: tuple[torch.dtype, ...]) -> None:
    with multiplying(native):
        for dtype in (BF16, FP16, FP32, FP64):
            is_wide = dtype in (BF16, FP16) and dtype not in native
            found = torch_products.product_dtypes(torch.empty(99, 4, dtype=dtype))
            assert found == (FP32 if is_wide else dtype,) * 2


@pytest.mark.parametrize("M", [0, 1, 100, 129, 512, 513, 1100])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_products_over_rows(dtype: torch.dtype, M: int) -> None:
    a, b = torch.randn(M, 5).to(dtype), torch.randn(M, 17).to(dtype)
    total = torch_products.rows_product(a, b)
    assert total.dtype == (FP64 if dtype == FP64 else FP32)
    if dtype == FP64:
        return
    exact = a.double().T @ b.double()
    eager = orders(lambda: a.T @ b)
    assert_accurate(total, exact, eager, name="aᵀ b", compute_dtype=dtype)
    if dtype != BF16 or M <= torch_products._FEW:
        eager = orders(lambda: a.float().T @ b.float())
        assert_accurate(total, exact, eager, name="not rounded", compute_dtype=FP32)


@pytest.mark.parametrize("dim", [0, 1])
def test_float16_operands_are_scaled_by_powers_of_two(dim: int) -> None:
    matrix = torch.randn(40, 40) * 2.0 ** torch.arange(-100, 100, 5).float()
    matrix = matrix if dim == 0 else matrix.T.contiguous()
    values, c = torch_products.operand(matrix, FP16, dim)
    assert values.dtype == FP16 and c.dtype == FP32
    assert c.shape == ((1, 40) if dim == 0 else (40, 1))
    mantissa, _ = torch.frexp(c)
    assert mantissa.eq(0.5).all(), "a power of two rounds nothing"
    largest = values.abs().amax(dim)
    assert ((largest >= 1.0) & (largest <= 2.0)).all()
    back = values.double() * c.double()
    assert ((back - matrix).abs() <= c.double() * 2.0**-11).all()


def test_zeros_and_infinities_as_float16_operands() -> None:
    matrix = torch.tensor([[0.0, 1e-30], [0.0, float("inf")], [0.0, 1e6]])
    values, c = torch_products.operand(matrix, FP16, 1)
    assert not values[1].isfinite().all() and values[[0, 2]].isfinite().all()
    assert_same_bits(values[2] * c[2], torch.tensor([0.0, 999936.0]), name="row")
    values, _ = torch_products.operand(torch.zeros(3, 2), FP16, 0)
    assert not values.any()


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_what_has_float32_s_exponents_is_not_scaled(dtype: torch.dtype) -> None:
    matrix = torch.randn(6, 4, dtype=torch.promote_types(dtype, FP32)) * 1e-30
    values, c = torch_products.operand(matrix, dtype, 0)
    assert c is None
    assert_same_bits(values, matrix.to(dtype), name="operand")


def _integers(*shape: int, largest: int = 3) -> torch.Tensor:
    """Small integers: their products and sums are exact in float32, so that what is left over is
    what was rounded on purpose."""
    return torch.randint(-largest, largest + 1, shape).to(FP64)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_the_large_product_is_rounded_once(dtype: torch.dtype) -> None:
    """y = round(round(s S Bᵀ + bias) + x Wᵀ) and dX = round(round(dS A) + dY W), not the other way
    round, in which the larger part is rounded twice."""
    M, K, N, R, largest = 33, 400, 300, 4, 3 if dtype == BF16 else 40
    x, dY = _integers(M, K, largest=largest), _integers(M, N, largest=largest)
    W, A, B = _integers(N, K, largest=largest), _integers(R, K, largest=1), _integers(N, R)
    bias = _integers(N, largest=90)
    for members in (1, 2):
        t: dict[str, Any] = {
            "x": x.to(dtype).requires_grad_(),
            "A": A.to(dtype).requires_grad_(),
            "B": B.to(dtype),
        }
        with multiplying((BF16, FP16)):
            if members == 1:
                y = functional.adapted_linear(
                    t["x"], W.to(dtype), bias.to(dtype), A=t["A"], B=t["B"], scaling=1.0
                )
            else:
                member = Member(W.to(dtype), bias.to(dtype), t["A"], t["B"])
                y, _ = adapted_linears(t["x"], [member, member])
            y.backward(dY.to(dtype))
        # Exact, or the test would test its own arithmetic.
        S, dS = x @ A.T, dY @ B
        assert all(torch.equal(v, v.to(dtype).double()) for v in (S, x, W, dY))
        low = (S @ B.T + bias).to(dtype).double()
        once, twice = low + x @ W.T, (x @ W.T).to(dtype).double() + low
        assert not torch.equal(once.to(dtype), twice.to(dtype)), "the test must be able to fail"
        assert_same_bits(y.detach(), once.to(dtype), name="y")
        low = (dS.to(dtype).double() @ A).to(dtype).double()
        assert_same_bits(t["x"].grad, (low + dY @ W).to(dtype), name="dX")


class _Wide(TorchDispatchMode):
    """Shapes of the float32 tensors that operations make, the names of the operations, and the
    dtypes of their operands."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.operations: list[str] = []
        self.operands: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.operations.append(str(func.overloadpacket))
        if self.operations[-1].endswith((".mm", ".addmm", ".addmm_", ".bmm", "_linear_pointwise")):
            self.operands.append(args[-1].dtype if isinstance(args[-1], torch.Tensor) else FP32)
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == FP32:
                self.shapes.add(tuple(tensor.shape))
        return made


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["p0", "p0.1"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_no_wide_operand_becomes_float32(dtype: torch.dtype, p: float) -> None:
    """Neither x, dY nor W, for any product or gradient, where the dtype is multiplied as it is."""
    case = Case(M=2000, K=520, N=600, R=4, dtype=dtype, adapter_dtype=FP32, factors=FACTORS, p=p)
    operands = make(case)
    t = operands.tensors
    with multiplying((BF16,) if dtype == BF16 else ()), _Wide() as wide:
        y = functional.adapted_linear(
            t["x"], operands.weight, t["bias"], A=t["A"], B=t["B"], b=t["b"], d=t["d"], g=t["g"],
            dropout_p=p, dropout_seed=3 if p else None,
        )  # fmt: skip
        y.backward(operands.dY)
    large = {shape for shape in wide.shapes if len(shape) == 2 and min(shape) > 500}
    # Blocks of rows that stay in the cache are none of them.
    assert not large if dtype == BF16 else {(2000, 520), (2000, 600), (600, 520)} <= large


@pytest.mark.parametrize("native", NATIVE_DTYPES.values(), ids=list(NATIVE_DTYPES))
def test_a_gain_close_to_one_is_not_rounded_to_it(native: tuple[torch.dtype, ...]) -> None:
    """DoRA's g moves by less than bfloat16 can tell from 1; beside a bias, which puts y between
    other numbers than V, the mean over many elements shows it."""
    x, W = torch.randn(2000, 64).to(BF16), torch.randn(50, 64).to(BF16)
    g, bias = torch.full((50,), 1.001), 8 * torch.randn(50)
    with multiplying(native):
        y = functional.adapted_linear(x, W, bias, g=g)
    V = x.double() @ W.double().T
    slope = ((y.double() - bias.double()) * V).sum() / V.square().sum()
    assert 1.0005 < slope < 1.0015


def test_both_kinds_of_cpu_agree_within_the_rule() -> None:
    case = Case(M=600, K=70, N=50, R=6, dtype=BF16, adapter_dtype=FP32, factors=FACTORS)
    for native in NATIVE_DTYPES.values():
        with multiplying(native):
            check(case)
            check(replace(case, p=0.1, nf4=True))


def _plain_step(case: Case) -> _Wide:
    """What forward and backward of plain LoRA do."""
    operands = make(case)
    t = operands.tensors
    with _Wide() as seen:
        y = functional.adapted_linear(t["x"], operands.weight, A=t["A"], B=t["B"], scaling=2.0)
        torch.autograd.grad(y, [t["x"], t["A"], t["B"]], operands.dY)
    return seen


@pytest.mark.usefixtures("allocating_as_users_do")
@pytest.mark.parametrize(("dtype", "M", "most"), [(BF16, 1, 34), (BF16, 64, 21), (FP32, 64, 20)])
def test_operations_of_a_step_of_few_rows(dtype: torch.dtype, M: int, most: int) -> None:
    """The host's time binds there, and every operation adds to it, views included."""
    with multiplying((BF16,)):
        seen = _plain_step(Case(M=M, K=48, N=64, R=4, dtype=dtype, adapter_dtype=dtype))
    assert len(seen.operations) <= most, seen.operations
    if dtype == BF16:
        # Products with W alone are worth the start of a bfloat16 product for one row.
        assert seen.operands.count(BF16) == (2 if M == 1 else 8)


@pytest.mark.parametrize("M", [64, 700, 2000])
def test_plain_lora_converts_no_operand_with_a_row_per_token(M: int) -> None:
    with multiplying((BF16,)):
        seen = _plain_step(Case(M=M, K=520, N=600, R=4, dtype=BF16, adapter_dtype=FP32))
    assert not [shape for shape in seen.shapes if M in shape]


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU by AMD with AVX-512."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(torch_products, "onednn_is_faster", lambda: True)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("native", NATIVE_DTYPES.values(), ids=list(NATIVE_DTYPES))
def test_products_by_onednn_obey_the_rule(native: tuple[torch.dtype, ...]) -> None:
    case = Case(M=300, K=257, N=123, R=5, dtype=FP32, adapter_dtype=FP32)
    with multiplying(native):
        taken = _plain_step(case).operations.count("mkldnn._linear_pointwise")
        assert taken == 2, "x Wᵀ and dY W"
        check(case)
        check(replace(case, factors=FACTORS, p=0.1))
        check(replace(case, dtype=BF16, nf4=True, R=64))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("M", [10, 31])
def test_few_rows_have_the_bits_of_the_base_layer(M: int) -> None:
    """As PEFT's own suite expects of an adapter whose B is zero."""
    x, W, bias = torch.rand(M, 1000), torch.rand(1000, 1000), torch.rand(1000)
    A, B = torch.randn(4, 1000), torch.zeros(1000, 4)
    y = functional.adapted_linear(x, W, bias, A=A, B=B)
    assert_same_bits(y, torch.nn.functional.linear(x, W, bias), name="y")


@pytest.mark.parametrize("M", [9, 129, 513])
@pytest.mark.parametrize("asked", [None, BF16, FP32], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_products_over_rows_are_scaled_and_rounded_once(
    dtype: torch.dtype, asked: torch.dtype | None, M: int
) -> None:
    a, b = torch.randn(M, 5).to(dtype), torch.randn(M, 17).to(dtype)
    total = torch_products.rows_product(a, b, 0.3, dtype=asked)
    assert total.dtype == (asked or (FP64 if dtype == FP64 else FP32))
    exact = 0.3 * (a.double().T @ b.double())
    # In 16 bits as rounded as a product of what is multiplied, or as what is asked for.
    rounds = asked if asked is not None and dtype in (FP32, FP64) else dtype
    eager = orders(lambda: (0.3 * (a.to(rounds).T @ b.to(rounds))).to(total.dtype))
    if rounds != FP64:
        assert_accurate(total, exact, eager, name="s aᵀ b", compute_dtype=rounds)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(("P", "Q"), [(40, 300), (300, 40)])
def test_products_over_rows_by_onednn(P: int, Q: int) -> None:
    a, b = torch.randn(400, P), torch.randn(400, 2 * Q)[:, ::2]
    with _Wide() as seen:
        total = torch_products.rows_product(a, b.contiguous())
    assert seen.operations.count("mkldnn._linear_pointwise") == 1 and total.is_contiguous()
    exact, eager = a.double().T @ b.double(), orders(lambda: a.T @ b)
    assert_accurate(total, exact, eager, name="aᵀ b")
    # Neither rows nor columns side by side: left to PyTorch.
    with _Wide() as seen:
        assert_accurate(torch_products.rows_product(a, b), exact, eager, name="strided")
    assert "mkldnn._linear_pointwise" not in seen.operations


@pytest.mark.usefixtures("onednn")
def test_a_bias_with_gaps() -> None:
    """oneDNN reads its elements one after the other."""
    a, b, bias = torch.randn(400, 300), torch.randn(200, 300), torch.randn(200, 2)[:, 0]
    with _Wide() as seen:
        y = torch_products.linear(a, b, bias)
    assert seen.operations.count("mkldnn._linear_pointwise") == 1
    eager = orders(lambda: a @ b.T + bias)
    assert_accurate(y, a.double() @ b.double().T + bias.double(), eager, name="y")


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("transposed", [False, True])
def test_a_factor_with_gaps_is_left_to_pytorch(transposed: bool) -> None:
    """oneDNN's reference code multiplies with it, a thousand times slower."""
    a, wide = torch.randn(96, 160), torch.randn(160, 2 * 160)
    for b, by in ((wide[:, :160], 0), (wide[:, :160].contiguous(), 1)):
        b = b.T if transposed else b
        for multiply in (
            torch_products.linear,
            lambda a, b: torch_products.add_product(None, a, b),
        ):
            with _Wide() as seen:
                multiply(a, b)
            assert seen.operations.count("mkldnn._linear_pointwise") == by
    with _Wide() as seen:
        torch_products.linear(wide[:, :160], a)
    assert "mkldnn._linear_pointwise" in seen.operations, "gaps between the rows of the first"


@pytest.mark.parametrize(("maker", "width"), [("GenuineIntel", "AVX512"), ("AuthenticAMD", "AVX2")])
def test_other_cpus_multiply_float32_by_mkl(
    maker: str, width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_products, "_vendor", lambda: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: width)
    assert not torch_products.onednn_is_faster.__wrapped__()


@pytest.mark.parametrize("line", ["vendor_id\t: AuthenticAMD\n", ""])
def test_the_maker_of_the_cpu(line: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text(f"processor\t: 0\n{line}model name\t: AMD EPYC\n")
    monkeypatch.setattr("builtins.open", lambda name, **options: told.open(**options))
    assert torch_products._vendor() == ("AuthenticAMD" if line else "")
