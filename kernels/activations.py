"""The activations of a gated MLP, h = act(gate) ⊙ up, and their slopes, in float32.

    silu       x σ(x)                                    gelu   x Φ(x) = x (1 + erf(x / √2)) / 2
    gelu_tanh  x σ(2u), u = √(2/π) (x + 0.044715 x³)     relu   max(x, 0)        relu2  max(x, 0)²

gelu_tanh is x (1 + tanh u) / 2 without the cancellation. NaN stays NaN in all of them.
"""

import triton
import triton.language as tl

from . import triton_version  # noqa: F401


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x); what a kernel does not use of them costs nothing."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        a = x * sigmoid
        slope = sigmoid + a * (1.0 - sigmoid)
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        a = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        square = x * x
        sigmoid = tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * square))
        a = x * sigmoid
        inner = 1.5957691216057308 + 0.21406444881780074 * square
        slope = sigmoid + a * (1.0 - sigmoid) * inner
    else:
        positive = tl.where(x <= 0.0, 0.0, x)
        if ACTIVATION == "relu":
            a = positive
            slope = tl.where(x <= 0.0, 0.0, 1.0)
        else:
            a = positive * positive
            slope = 2.0 * positive
    return a, slope
