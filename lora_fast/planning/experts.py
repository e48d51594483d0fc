"""The experts of a mixture: weights that are parameters of their module, not layers.

``--quantize nf4`` applies to them as it does to linear layers, ``--target-modules`` does not;
:func:`about_experts` says what happens to the experts. Activations count top_k · tokens rows of
them, because the real forward pass runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..experts.storage import packed_experts, packed_parameters
from ..magnitudes import short_count
from .states import state_bytes, weight_bytes

# What configs call the number of experts that compute a token.
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")


@dataclass(frozen=True)
class Experts:
    """``weights``: the ids of their frozen parameters, of ``elements`` elements, in ``modules``
    modules; ``sizes``: their bytes by kind; ``decoded``: the elements of the largest one in 4 bits;
    ``trained``: the number of parameters that PEFT's wrappers around them train; ``count`` and
    ``active``: experts of a module, and those of them that compute a token, if it is known.
    """

    weights: frozenset[int]
    elements: int
    modules: int
    sizes: Mapping[str, int]
    decoded: int
    trained: int
    count: int
    active: int | None


def experts_of(modules: Iterable[nn.Module], adapted: Any, *, quantised: bool) -> Experts | None:
    """The expert `modules` of the base as they are in the model that trains; None without any.
    `quantised`: dense ones will be in 4 bits."""
    modules = list(modules)
    if not modules:
        return None
    held = [(m, n, p) for m in modules for n, p in m.named_parameters(recurse=False)]
    held = [(m, n, p) for m, n, p in held if not p.requires_grad or quantised]
    states = {id(p): packed_experts(m, n) for m, n, p in held if n in packed_parameters(m)}
    dense = [p for _, _, p in held if id(p) not in states]
    later = {id(p): p.numel() for p in dense if quantised and p.dim() == 3}  # not biases
    sizes = dict(weight_bytes(dense, later))
    elements = {id(p): p.numel() for p in dense}
    for key, found in states.items():
        assert found is not None
        packed, state = found
        sizes[state.quant_type] = sizes.get(state.quant_type, 0) + state_bytes(packed, state)
        elements[key] = later[key] = state.shape.numel()
    return Experts(
        frozenset(elements),
        sum(elements.values()),
        len(modules),
        sizes,
        max(later.values(), default=0),
        _trained(adapted),
        int(getattr(modules[0], "num_experts", 0)),
        _active(getattr(adapted, "config", None)),
    )


def about_experts(experts: Experts) -> str:
    """One line: the number of parameters, and the settings that do not apply to them."""
    line = f"experts: {short_count(experts.elements)} parameters in {experts.modules} modules, no "
    kind = max(experts.sizes, key=lambda kind: experts.sizes[kind], default="no memory")
    line += f"linear layers; in {kind}, "
    if experts.active:
        line += f"{experts.active} of {experts.count} compute a token, "
    if experts.trained:
        return line + f"and LoRA trains {short_count(experts.trained)} parameters on them"
    return line + "and are not adapted"


def _trained(adapted: Any) -> int:
    wrappers = [m for m in adapted.modules() if hasattr(m, "parameter_name")]
    factors: dict[int, Tensor] = {
        id(p): p for m in wrappers for n, p in m.named_parameters() if "lora_" in n
    }
    return sum(p.numel() for p in factors.values() if p.requires_grad)


def _active(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = (getattr(text, name, None) for name in _ACTIVE)
    return next((n for n in found if isinstance(n, int)), None)
