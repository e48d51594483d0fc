"""The routes that a layer's operations take, by the queries that the tuner has met and that can be
this layer's.

A report knows the layer, not its calls: the dtype of x, whether dropout is on and which gradients
are made may be those of several calls. Where such queries have different routes, each is named with
what tells it apart.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..backends.choice import get_backend, uses_triton
from ..base_layer.linear import is_conv1d, weight_shape

# The route of a layer whose base computes its output by itself.
OPAQUE = "opaque base"
# The same with decode_int8, where its weight is in 8 bits.
DECODED = f"{OPAQUE}, decoded"


def route_of(layer: Any, base: Any, *, together: int, is_folded: bool) -> str:
    """The routes of a layer's operations, forward and backward, by rows where they differ;
    `together` layers are computed at once."""
    opaque = _opaque_route(layer)
    if opaque is not None:
        return opaque
    weight = getattr(base, "weight", None)
    if weight is None or not uses_triton(weight.device):
        return "torch"
    if is_folded:
        return "folded"
    if get_backend() == "triton":
        return "fused"
    tuner = sys.modules.get("lora_fast.tuning.tuner")
    met = [] if tuner is None else tuner.tuner.chosen(weight.device)
    own = [(query, plan.route) for query, plan in met if _may_be_of(query, layer, base, together)]
    found = []
    for direction, is_forward in (("forward", True), ("backward", False)):
        words = _in_words([each for each in own if each[0].is_forward == is_forward])
        found += [f"{direction} {words}"] if words else []
    return "; ".join(found) or "chosen at its first call"


def _opaque_route(layer: Any) -> str | None:
    """The route of a layer on an opaque base, None for any other."""
    if "lora_fast.peft_layers" not in sys.modules:
        return None
    from .. import peft_layers
    from ..base_layer.int8 import DecodedInt8

    state = layer.active()[0] if isinstance(layer, peft_layers.FusedForward) else None
    if getattr(state, "opaque", None) is None:
        return None
    return DECODED if isinstance(state.base, DecodedInt8) else OPAQUE  # type: ignore[union-attr]


def _may_be_of(query: Any, layer: Any, base: Any, together: int) -> bool:
    """Whether a query can be one of a call of `layer`."""
    N, K = (getattr(base, name, None) for name in ("out_features", "in_features"))
    if is_conv1d(base):
        N, K = weight_shape(base)
    if (query.K, len(query.N)) != (K, together):
        return False
    factors = _factors(layer)
    if len(factors) == 1 and query.adapter is not factors[0].dtype:
        return False
    # Backward is not given a frozen bias, and of a group the first layer's counts.
    if query.is_forward and together == 1 and query.has("bias") is (base.bias is None):
        return False
    weights = [_kind(base.weight)]
    if not query.is_forward:
        # Where a recomputed forward pass has left W decoded, backward is that of a dense weight.
        weights.append(query.dtype)
    R = sum(A.shape[0] for A in factors)
    layers = list(zip(query.N, query.R, query.weights, strict=True))
    return any((N, R, weight) in layers for weight in weights)


def _kind(weight: Any) -> Any:
    """Of a query's weights: the dtype of a dense weight, (blocksize, nested) of a packed one."""
    state = getattr(weight, "quant_state", None)
    return weight.dtype if state is None else (int(state.blocksize), bool(state.nested))


def _factors(layer: Any) -> list[Any]:
    """A [R, …], or a vector [R], of each adapter that takes part; nothing without A."""
    factors = getattr(layer, "lora_A", getattr(layer, "vera_lambda_d", {}))
    if not hasattr(factors, "keys"):  # of a module of our own
        return [factors]
    active = [factors[name] for name in layer.active_adapters if name in factors]
    return [getattr(each, "weight", each) for each in active]


def _in_words(met: list[tuple[Any, str]]) -> str:
    """The routes of queries in one direction: by rows, and in each bucket by what tells queries
    of different routes apart."""
    if len({route for _, route in met}) == 1:
        return met[0][1]
    parts = []
    for M in sorted({query.M for query, _ in met}):
        alike = [(query, route) for query, route in met if query.M == M]
        rows = f"M ≤ {M}" if M <= 2048 else "more"
        if len({route for _, route in alike}) == 1:
            parts.append(f"{alike[0][1]} ({rows})")
        else:
            queries = [query for query, _ in alike]
            parts += [
                f"{route} ({', '.join([rows, *_apart(query, queries)])})" for query, route in alike
            ]
    return ", ".join(parts)


def _apart(query: Any, others: Sequence[Any]) -> list[str]:
    """What tells a query apart from others of as many rows."""
    told = zip(query.words, *(other.words for other in others), strict=True)
    words = [own for own, *all_ in told if len(set(all_)) > 1]
    return [f"{word} nothing" if word.endswith(":") else word for word in words]
