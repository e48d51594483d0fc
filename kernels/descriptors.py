"""Tensor descriptors: operands that ticketed_gemm reads through TMA instead of pointers.

One instruction of one thread then fetches a block, and elements outside the matrix arrive as zeros.
Descriptors made by the host are parameters of the launch: they need no memory, and a CUDA graph
keeps them. Triton accepts them only as separate arguments, not within a tuple, so their number is
that of ticketed_gemm's parameters.
"""

import os

from triton.tools.tensor_descriptor import TensorDescriptor

from .triton_version import VERSION

# Layers of one launch that may be described: q, k and v.
MOST_LAYERS = 3
# Tests cannot execute the launches with descriptors of other Triton versions.
EXECUTED = (3, 7) <= VERSION < (3, 9)


def wanted(value: str | None) -> bool:
    """Whether to describe, by LORA_FAST_DESCRIPTORS: 1, 0 or, not set, what tests execute.

    ValueError: it is another value.
    """
    if value not in (None, "", "0", "1"):
        raise ValueError(f"LORA_FAST_DESCRIPTORS must be 0 or 1, got {value!r}")
    return value == "1" if value else EXECUTED


DESCRIBES = wanted(os.environ.get("LORA_FAST_DESCRIPTORS"))
_NONE = (None,) * (2 * MOST_LAYERS)


def can_describe(matrix) -> bool:
    """Whether TMA can read a matrix: 16-bit numbers in rows that start at multiples of 16 bytes."""
    rows, columns = matrix.shape
    row_stride, column_stride = matrix.stride()
    return (
        matrix.dtype.itemsize == 2
        and column_stride == 1
        and row_stride >= columns
        and row_stride * matrix.dtype.itemsize % 16 == 0
        and row_stride * matrix.dtype.itemsize < 2**40
        and matrix.data_ptr() % 16 == 0
        and 0 < rows < 2**31
        and 0 < columns < 2**31
    )


def descriptors_of(layers, config, arch, is_grad):
    """(X, W, X, W, …) of the layers' X and W [N, K]; Nones unless all can be described.

    Blocks of W keep their memory layout, which the forward pass transposes. Before Hopper Triton
    would turn descriptors back into pointers, and not pipeline those.
    """
    if not (DESCRIBES and config.descriptors) or (arch or 90) < 90 or len(layers) > MOST_LAYERS:
        return _NONE
    # An Nf4Operand is not a tensor, and TMA cannot read it.
    operands = [layer[:2] for layer in layers]
    if not all(hasattr(w, "stride") and can_describe(x) and can_describe(w) for x, w in operands):
        return _NONE
    x_block = [config.BLOCK_M, config.BLOCK_K]
    w_block = [config.BLOCK_K, config.BLOCK_N] if is_grad else [config.BLOCK_N, config.BLOCK_K]
    found = []
    for x, w in operands:
        found.append(TensorDescriptor(x, x.shape, x.stride(), x_block))
        found.append(TensorDescriptor(w, w.shape, w.stride(), w_block))
    return (*found, *_NONE[len(found) :])
