"""What an adapter changes in each tensor of its base, read from the adapter's file layer by layer.

    W' = round( g ⊙ (W + Σ s · (b ⊙ (B d)) A) )          bias' = g ⊙ bias + s · bias of B

(IA)³ of feed-forward layers multiplies the columns of W instead of its rows. The products and sums
are those of :mod:`lora_fast.merging`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..merging import LowRank, add_low_rank
from ..row_norms import RowNorms
from ..vera import VeRAProjections
from .adapter_files import PREFIX

Read = Callable[[str], Tensor]
NAME = "default"


@dataclass(frozen=True, eq=False)
class Change:
    """New values of one tensor: a weight gets ``term`` and gains, a bias ``shift`` and ``g``, and
    ``value`` takes the place of what was there.

    ``magnitude``: DoRA's m, divided by the norms of the rows. ``transposed``: the weight is stored
    as [K, N]. ``columns``: g [K] multiplies columns.
    """

    term: LowRank | None = None
    magnitude: Tensor | None = None
    g: Tensor | None = None
    columns: bool = False
    transposed: bool = False
    shift: Tensor | None = None
    value: Tensor | None = None

    def apply(self, old: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The new values in `dtype`, rounded once."""
        if self.value is not None:
            return self.value.to(dtype)
        assert old is not None
        if old.dim() == 1:
            wide = old.float() if self.g is None else old.float() * self.g.float()
            return (wide if self.shift is None else wide + self.shift.float()).to(dtype)
        weight = old.t().contiguous() if self.transposed else old
        merged = self._weight(weight, dtype)
        return merged.t().contiguous() if self.transposed else merged

    def _weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if self.columns:
            assert self.g is not None
            return (weight.float() * self.g.float()).to(dtype)
        gain, terms = self.g, [] if self.term is None else [self.term]
        if self.magnitude is not None and self.term is not None:
            norms = RowNorms()(weight, self.term.A, self.term.B, self.term.scaling)
            gain = self.magnitude.float() / norms
        out = torch.empty_like(weight, dtype=dtype)
        add_low_rank(weight, terms, gain, out=out)
        return out


@dataclass(frozen=True)
class Changes:
    """By the name of the tensor in the base model: what makes its change when it is wanted.
    ``replaced`` are the names whose whole value the adapter has, with their keys in its file."""

    makers: dict[str, Callable[[], Change]]
    replaced: dict[str, str]


def changes_of(model: Any, keys: set[str], read: Read) -> Changes:
    """What an adapter changes. `model` is PEFT's, on the meta device; `keys` are those of the
    adapter's file, all of which belong to it; `read` reads one.

    Raises:
        NotImplementedError: a kind of layer or variant that has no such formula.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    makers: dict[str, Callable[[], Change]] = {}
    replaced: dict[str, str] = {}
    used = {key for key in keys if key.startswith(("base_model.vera_A", "base_model.vera_B"))}
    for path, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        own = {key for key in keys if key.startswith(f"{path}.")}
        used |= {key for key in own if ".base_layer." not in key}
        if type(layer).__name__ == "LNTuningLayer":
            replaced |= {_unwrapped(key): key for key in own}
        else:
            makers |= _layer_changes(model, path.removeprefix(PREFIX), layer, read)
    for key in sorted(keys - used):
        if "trainable_tokens" in key:
            raise NotImplementedError(f"{key}: merge trainable tokens with PEFT's merge_and_unload")
        name = _unwrapped(key)
        if name not in makers:  # below an adapter, PEFT stores an embedding as it is in the base
            replaced[name] = key
    return Changes(makers | {n: _replacement(read, k) for n, k in replaced.items()}, replaced)


def _unwrapped(key: str) -> str:
    """The name in the base model of a tensor that an adapter's file holds as a whole."""
    name = key.removeprefix(PREFIX).replace(".ln_tuning_layers.", ".")
    return name.replace(".base_layer.", ".")


def _layer_changes(
    model: Any, name: str, layer: Any, read: Read
) -> dict[str, Callable[[], Change]]:
    from peft.tuners import adalora, ia3, lora, vera

    kinds: list[tuple[type, Any]] = [
        (adalora.SVDLinear, _adalora),
        (lora.Linear, _lora),
        (lora.Embedding, _lora_embedding),
        (vera.Linear, _vera),
        (ia3.Linear, _ia3),
    ]
    make = next((make for kind, make in kinds if type(layer) is kind), None)
    if make is None:
        raise NotImplementedError(
            f"{name}: {type(layer).__module__}.{type(layer).__name__} must be merged with PEFT's "
            "merge_and_unload, there is no low-rank formula for it"
        )
    if make is _vera:
        return _vera(model, name, layer, read)
    return make(model, name, layer, lambda key: read(f"{PREFIX}{name}.{key}"))


def _replacement(read: Read, key: str) -> Callable[[], Change]:
    return lambda: Change(value=read(key))


def _lora(model: Any, name: str, layer: Any, get: Read) -> dict[str, Callable[[], Change]]:
    variant = layer.lora_variant.get(NAME)
    dora = type(variant).__name__ == "DoraLinearVariant"
    if variant is not None and not dora:
        raise NotImplementedError(
            f"{name}: merge {type(variant).__name__} with PEFT's merge_and_unload"
        )
    scaling = float(layer.scaling[NAME])

    def weight() -> Change:
        term = LowRank(get("lora_A.weight"), get("lora_B.weight"), scaling)
        magnitude = get("lora_magnitude_vector") if dora else None
        return Change(term, magnitude, transposed=layer.fan_in_fan_out)

    found = {f"{name}.weight": weight}
    if layer.lora_bias[NAME]:
        found[f"{name}.bias"] = lambda: Change(shift=scaling * get("lora_B.bias").float())
    return found


def _lora_embedding(
    model: Any, name: str, layer: Any, get: Read
) -> dict[str, Callable[[], Change]]:
    if layer.lora_variant.get(NAME) is not None:
        raise NotImplementedError(f"{name}: merge DoRA of embeddings with PEFT's merge_and_unload")
    scaling = float(layer.scaling[NAME])

    def weight() -> Change:
        A, B = get("lora_embedding_A"), get("lora_embedding_B")
        return Change(LowRank(B.t().contiguous(), A.t().contiguous(), scaling))

    return {f"{name}.weight": weight}


def _adalora(model: Any, name: str, layer: Any, get: Read) -> dict[str, Callable[[], Change]]:
    # The number of ranks from before the allocator cut any, as PEFT keeps it.
    scaling = float(layer.scaling[NAME]) / (model.peft_config[NAME].init_r + 1e-5)

    def weight() -> Change:
        E = get("lora_E").flatten()
        term = LowRank(get("lora_A"), get("lora_B"), scaling, d=E) if E.numel() else None
        return Change(term, transposed=layer.fan_in_fan_out)

    return {f"{name}.weight": weight}


def _vera(model: Any, name: str, layer: Any, read: Read) -> dict[str, Callable[[], Change]]:
    config = model.peft_config[NAME]

    def weight() -> Change:
        if config.save_projection:
            A, B = read("base_model.vera_A"), read("base_model.vera_B")
        else:
            R, K = model.base_model.vera_A[NAME].shape
            N = model.base_model.vera_B[NAME].shape[0]
            A, B = _drawn(K, N, R, config.projection_prng_key)
        A, B = A[:, : layer.in_features].contiguous(), B[: layer.out_features].contiguous()
        b, d = (read(f"{PREFIX}{name}.vera_lambda_{letter}") for letter in "bd")
        return Change(LowRank(A, B, 1.0, b, d), transposed=layer.fan_in_fan_out)

    return {f"{name}.weight": weight}


@functools.lru_cache(maxsize=1)
def _drawn(K: int, N: int, R: int, key: int) -> tuple[Tensor, Tensor]:
    """The projections that a key stands for, where the file leaves them out."""
    drawn = VeRAProjections(K, N, R, projection_prng_key=key)
    return drawn.vera_A, drawn.vera_B


def _ia3(model: Any, name: str, layer: Any, get: Read) -> dict[str, Callable[[], Change]]:
    feedforward = bool(layer.is_feedforward)

    def gain() -> Change:
        g = get("ia3_l").flatten()
        return Change(g=g, columns=feedforward, transposed=layer.fan_in_fan_out)

    found = {f"{name}.weight": gain}
    if layer.base_layer.bias is not None and not feedforward:
        found[f"{name}.bias"] = gain
    return found
