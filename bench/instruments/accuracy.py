"""The accuracy rule that every numeric test uses; no test carries a tolerance of its own.

For a result ``actual``, the same quantity ``ref64`` in float64 and ``eager`` from plain PyTorch in
the dtypes under test, in three orders of summation (:func:`orders`):

    finite(actual)
    max|actual - ref64| <= 2 · (largest of the three max|eager - ref64| + eps · max|ref64|)
    rms(actual - ref64) <= ceiling · rms(ref64)

One order is one sample of the error, and of a result of few elements it can be 0 by luck.
``eps`` and ``ceiling`` belong to the coarser of ``actual.dtype`` and the compute dtype: a float32
gradient accumulated from bfloat16 products inherits the error of the products, a bfloat16 result
of float32 products the rounding of its store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A sequence for what products and sums made; one tensor for what was only rounded or copied.
Eager = torch.Tensor | Sequence[torch.Tensor]
RMS_CEILING = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 1e-5}

aten = torch.ops.aten
# Operators that contract a dimension: where their two factors are, and which dimension of each.
_PRODUCTS = {
    aten.mm: ((0, 1), (1, 0)),
    aten.addmm: ((1, 1), (2, 0)),
    aten.bmm: ((0, 2), (1, 1)),
    aten.baddbmm: ((1, 2), (2, 1)),
    aten.mv: ((0, 1), (1, 0)),
    aten.addmv: ((1, 1), (2, 0)),
    aten.dot: ((0, 0), (1, 0)),
}
# Reductions: the position of the dimensions that they run over.
_REDUCTIONS = {aten.sum: 1, aten.linalg_vector_norm: 2}


def orders(compute: Callable[[], Any]) -> Any:
    """`eager` for the rule: what plain PyTorch computes, in three orders of summation.

    `compute` returns a tensor or a mapping of tensors (or None); the result has a list in the place
    of each tensor. It is called three times and must not change what it reads.
    """
    first, *others = _in_three_orders(compute)
    if isinstance(first, torch.Tensor):
        return [first, *others]
    return {
        name: None if value is None else [value, *(other[name] for other in others)]
        for name, value in first.items()
    }


def assert_accurate(
    actual: torch.Tensor,
    ref64: torch.Tensor,
    eager: Eager,
    *,
    name: str,
    compute_dtype: torch.dtype | None = None,
    layers: int = 1,
) -> None:
    """Assert the rule of this module for one tensor.

    ``compute_dtype`` is the dtype of the factors of the matrix products; by default that of
    ``actual``. Pass it for every gradient of a parameter that is kept in a wider dtype.

    ``layers``: how many of them one follows the other within the operation. What each rounds is
    independent, so that the ceiling grows with the root.

    AssertionError: ``actual`` breaks the rule; the message has the figures and the worst element.
    ValueError: the yardstick itself is unusable (wrong dtype or shape, not finite).
    """
    dtype = _coarser(actual.dtype, compute_dtype or actual.dtype)
    actual64, ref64 = actual.detach().cpu(), ref64.detach().cpu()
    samples = [eager] if isinstance(eager, torch.Tensor) else eager
    samples = [sample.detach().cpu() for sample in samples]
    _check_yardstick(ref64, samples, name)
    assert actual64.shape == ref64.shape, (
        f"{name}: shape must be {tuple(ref64.shape)}, got {tuple(actual64.shape)}"
    )
    if actual64.numel() == 0:
        return
    actual64 = actual64.double()

    finite = torch.isfinite(actual64)
    assert finite.all(), (
        f"{name}: {int((~finite).sum())} of {actual64.numel()} elements are not finite, "
        f"the first at {_index_of(~finite)}"
    )
    scale = ref64.abs().max().item()
    error = (actual64 - ref64).abs()
    errors = [sample.double() - ref64 for sample in samples]
    err, err_eager = error.max().item(), max(e.abs().max().item() for e in errors)
    eps = torch.finfo(dtype).eps
    bound = 2 * (err_eager + eps * scale)
    rms_ref = _rms(ref64)
    rms, rms_eager = _rms(actual64 - ref64), max(map(_rms, errors))
    ceiling = RMS_CEILING[dtype] * layers**0.5
    worst = _index_of(error == err)
    figures = (
        f"{name} ({dtype}, shape {tuple(ref64.shape)}): max|error| {err:.3e}, allowed {bound:.3e} "
        f"(eager {err_eager:.3e}, eps·max|ref| {eps * scale:.3e}); "
        f"rms {rms:.3e}, allowed {ceiling * rms_ref:.3e} "
        f"(eager {rms_eager:.3e}, rms(ref) {rms_ref:.3e}); "
        f"worst at {worst}: got {actual64[worst].item():.6g}, must be {ref64[worst].item():.6g}; "
        f"best fit actual ≈ {_fitted_scale(actual64, ref64):.5f} · ref"
    )
    assert err <= bound, figures
    if rms_ref > 0:
        assert rms <= ceiling * rms_ref, figures


def assert_all_accurate(
    actual: Mapping[str, torch.Tensor | None],
    ref64: Mapping[str, torch.Tensor | None],
    eager: Mapping[str, Eager | None],
    *,
    compute_dtype: torch.dtype | None = None,
    name: str = "",
    layers: int = 1,
) -> None:
    """Assert the rule for every entry (an output or a gradient) of three mappings with equal keys.

    An entry that is None in the reference (no gradient) must be None in ``actual``, and vice versa.
    """
    assert actual.keys() == ref64.keys() == eager.keys(), (
        f"{name}: keys differ: {sorted(actual)}, {sorted(ref64)}, {sorted(eager)}"
    )
    failures = []
    for key, ref in ref64.items():
        got, plain = actual[key], eager[key]
        label = f"{name}.{key}" if name else key
        if ref is None or got is None or plain is None:
            if not (ref is None and got is None and plain is None):
                failures.append(
                    f"{label}: None in {_absent(actual=got, ref64=ref, eager=plain)} alone"
                )
            continue
        try:
            assert_accurate(got, ref, plain, name=label, compute_dtype=compute_dtype, layers=layers)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


def assert_as_close(actual: torch.Tensor, ref64: torch.Tensor, eager: Eager, *, name: str) -> None:
    """Assert that ``actual`` is finite and, in the 2-norm, no further from ``ref64`` than twice
    ``eager`` is: of results that have come through a whole model, whose rounding stock PEFT has as
    well and which no ceiling knows."""
    actual64, ref64 = actual.detach().cpu().double(), ref64.detach().cpu()
    samples = [eager] if isinstance(eager, torch.Tensor) else eager
    samples = [sample.detach().cpu() for sample in samples]
    _check_yardstick(ref64, samples, name)
    assert torch.isfinite(actual64).all(), f"{name}: not finite"
    err = (actual64 - ref64).norm().item()
    err_eager = max((sample.double() - ref64).norm().item() for sample in samples)
    assert err <= 2 * err_eager, (
        f"{name}: |error| {err:.3e}, allowed {2 * err_eager:.3e}, |ref| {ref64.norm().item():.3e}"
    )


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, *, name: str) -> None:
    """Assert equal dtype, shape and bit pattern (NaN equals the same NaN, -0 differs from +0)."""
    assert actual.dtype == expected.dtype, (
        f"{name}: dtype must be {expected.dtype}, got {actual.dtype}"
    )
    assert actual.shape == expected.shape, (
        f"{name}: shape must be {tuple(expected.shape)}, got {tuple(actual.shape)}"
    )
    left, right = (_bits(t) for t in (actual, expected))
    differ = left != right
    if differ.any():
        where = _index_of(differ)
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {differ.numel()} elements differ in their bits, the "
            f"first at {where}: got {actual[where].item()!r}, must be {expected[where].item()!r}"
        )


def _in_three_orders(compute: Callable[[], Any]) -> Iterator[Any]:
    """The results of `compute`, with the same random numbers: its sums as they come, backwards, and
    the even terms before the odd ones."""
    state = torch.get_rng_state()
    yield compute()
    after = torch.get_rng_state()
    for order in (_backwards, _even_first):
        torch.set_rng_state(state)
        with _Reordered(order):
            yield compute()
    torch.set_rng_state(after)


def _backwards(count: int) -> torch.Tensor:
    return torch.arange(count).flip(0)


def _even_first(count: int) -> torch.Tensor:
    terms = torch.arange(count)
    return torch.cat([terms[::2], terms[1::2]])


class _Reordered(TorchDispatchMode):
    """Every sum, forward and backward, in the order that `order` gives for a number of terms."""

    def __init__(self, order: Callable[[int], torch.Tensor]) -> None:
        super().__init__()
        self._order = order

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet, changed = func._overloadpacket, list(args)
        for position, dim in _PRODUCTS.get(packet, ()):
            changed[position] = self._reordered(args[position], dim)
        if packet in _REDUCTIONS:
            place = _REDUCTIONS[packet]
            given = args[place] if len(args) > place else None
            for dim in given or range(args[0].dim()):
                changed[0] = self._reordered(changed[0], dim)
        return func(*changed, **(kwargs or {}))

    def _reordered(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.index_select(dim, self._order(tensor.shape[dim]).to(tensor.device))


def _check_yardstick(ref64: torch.Tensor, samples: Sequence[torch.Tensor], name: str) -> None:
    if ref64.dtype != torch.float64:
        raise ValueError(f"{name}: ref64 must be float64, got {ref64.dtype}")
    if not samples:
        raise ValueError(f"{name}: eager must hold at least one tensor, got none")
    for eager in samples:
        if eager.dtype not in RMS_CEILING:
            raise ValueError(f"{name}: eager must be in a dtype under test, got {eager.dtype}")
        if eager.shape != ref64.shape:
            raise ValueError(
                f"{name}: eager must have the shape {tuple(ref64.shape)}, got {tuple(eager.shape)}"
            )
    for label, tensor in (("ref64", ref64), *(("eager", sample) for sample in samples)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: {label} must be finite, or it would excuse any error")


def _coarser(*dtypes: torch.dtype) -> torch.dtype:
    for dtype in dtypes:
        if dtype not in RMS_CEILING:
            raise ValueError(f"dtype must be one of {list(RMS_CEILING)}, got {dtype}")
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _rms(tensor: torch.Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _fitted_scale(actual: torch.Tensor, ref: torch.Tensor) -> float:
    """The least-squares factor: tells a wrong scale apart from noise at a glance."""
    energy = ref.square().sum().item()
    return (actual * ref).sum().item() / energy if energy > 0 else float("nan")


def _index_of(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def _absent(**tensors: Eager | None) -> str:
    return " and ".join(name for name, tensor in tensors.items() if tensor is None)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.dtype.is_floating_point:
        return tensor.detach().cpu()
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.detach().cpu().contiguous().view(width)


# Of the norm of a tensor, by which two whole models in float32 may differ: layers amplify what
# each of them rounds, and no yardstick of one operation holds.
MODEL_DIFFERENCE = 2e-4


# The same float32 sums in another order: some tens of roundings, of which most cancel.
ORDER_DIFFERENCE = 1e-5
# Losses, logits and parameters of float32 runs of a few steps, each of which adds its roundings.
RUN_DIFFERENCE = 1e-4
# The same in bfloat16, whose operations round by up to 2⁻⁹ each.
BFLOAT16_RUN_DIFFERENCE = 2**-4


def assert_agree(
    actual: Any, expected: Any, *, within: float, beside: float = 0.0, name: str = ""
) -> None:
    """Assert ‖actual − expected‖ ≤ within · ‖expected‖, of tensors, arrays or lists of numbers.

    `within` is one of the bounds of this file. `beside` is the norm of the largest tensor of their
    kind, whose roundings in another order are allowed on top: some gradients are zero but for them.
    NaN and infinity agree with nothing.
    """
    found, wanted = (torch.as_tensor(v).detach().double() for v in (actual, expected))
    assert found.shape == wanted.shape, (name, tuple(found.shape), tuple(wanted.shape))
    norm, difference = wanted.norm().item(), (found - wanted).norm().item()
    allowed = within * norm + ORDER_DIFFERENCE * beside
    assert difference <= allowed, f"{name}: norm {norm:.3e}, difference {difference:.3e}"


def assert_models_agree(
    actual: Mapping[str, torch.Tensor | None], stock: Mapping[str, torch.Tensor | None]
) -> None:
    """Assert ‖actual − stock‖ ≤ 2·10⁻⁴ ‖stock‖ for every float32 output and gradient of a model."""
    assert actual.keys() == stock.keys(), sorted(actual.keys() ^ stock.keys())
    failures = []
    for key, expected in stock.items():
        found = actual[key]
        if expected is None or found is None:
            if expected is not found:
                failures.append(f"{key}: None in one of them alone")
            continue
        assert found.shape == expected.shape and found.dtype == expected.dtype, key
        norm = expected.double().norm().item()
        difference = (found.double() - expected.double()).norm().item()
        if not difference <= MODEL_DIFFERENCE * norm:
            failures.append(f"{key}: norm {norm:.3e}, difference {difference:.3e}")
    assert not failures, "\n".join(failures)
