"""What an adapter changes in each tensor of its base, read from the adapter's file layer by layer.

    W' = round( g ⊙ (W + Σ s · (b ⊙ (B d)) A) )          bias' = g ⊙ bias + s · bias of B

(IA)³ of feed-forward layers multiplies the columns of W instead of its rows. The products and sums
are those of :mod:`lora_fast.base_layer.merging`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..base_layer.merging import LowRank, add_low_rank
from ..base_layer.row_norms import row_norms
from ..features import EXPERTS_OF_PEFT
from ..files.adapter_files import PREFIX
from ..modules.vera import VeRAProjections

Read = Callable[[str], Tensor]
NAME = "default"


@dataclass(frozen=True, eq=False)
class Change:
    """New values of one tensor: a weight gets ``term`` and gains, a bias ``shift`` and ``g``;
    ``value`` replaces the whole tensor, or the ``rows`` given. Of a weight of experts [E, N, K] the
    term's A [E, R, K] and B [E, N, R] are those of all.

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
    rows: Tensor | None = None

    def apply(self, old: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        """The new values in `dtype`, rounded once. ``old()`` is called where they depend on it."""
        if self.value is not None:
            new = self.value.to(dtype)
            return new if self.rows is None else old().to(dtype).index_copy(0, self.rows, new)
        before = old()
        if before.dim() == 1:
            wide = before.float() if self.g is None else before.float() * self.g.float()
            return (wide if self.shift is None else wide + self.shift.float()).to(dtype)
        if before.dim() == 3:
            return self._experts(before, dtype)
        weight = before.t().contiguous() if self.transposed else before
        merged = self._weight(weight, dtype)
        return merged.t().contiguous() if self.transposed else merged

    def of_expert(self, expert: int, piece: int = 0, pieces: int = 1) -> Change:
        """The change of one expert's weight [N, K], or of one of equal parts of its rows."""
        assert self.term is not None
        A, B, scaling = self.term.A[expert], self.term.B[expert], self.term.scaling
        B = B.chunk(pieces)[piece]
        term = LowRank(A.contiguous(), B.contiguous(), scaling)
        return Change(term, transposed=self.transposed)

    def _experts(self, before: Tensor, dtype: torch.dtype) -> Tensor:
        new = torch.empty(before.shape, dtype=dtype, device="cpu")
        for expert, weight in enumerate(before):
            new[expert] = self.of_expert(expert).apply(functools.partial(_itself, weight), dtype)
        return new

    def equals(self, other: Change) -> bool:
        """Whether both change a tensor in the same way."""
        return _equal(self, other)

    def _weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if self.columns:
            assert self.g is not None
            return (weight.float() * self.g.float()).to(dtype)
        gain, terms = self.g, [] if self.term is None else [self.term]
        if self.magnitude is not None and self.term is not None:
            norms = row_norms(weight, self.term.A, self.term.B, self.term.scaling)
            gain = self.magnitude.float() / norms
        out = torch.empty_like(weight, dtype=dtype)
        add_low_rank(weight, terms, gain, out=out)
        return out


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool((one == other).all())
    if isinstance(one, Change | LowRank) and type(one) is type(other):
        names = [field.name for field in fields(one)]
        return all(_equal(getattr(one, name), getattr(other, name)) for name in names)
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other


@dataclass(frozen=True)
class Changes:
    """By the name of the tensor in the base model: a function that makes its change on demand.

    A name stands for one place in the model, and a change for that place alone, also where the base
    has one tensor in several. ``replaced`` are the names whose whole value the adapter holds, with
    their keys in its file. ``stored`` are tensors of the base, wherever it has them, that PEFT put
    into the file beside the adapter, with their keys.
    """

    makers: dict[str, Callable[[], Change]]
    replaced: dict[str, str]
    stored: dict[str, str]


def changes_of(model: Any, keys: set[str], read: Read) -> Changes:
    """What an adapter changes. `model` is PEFT's, on the meta device; `keys` are those of the
    adapter's file, all of which belong to it; `read` reads one tensor.

    Raises NotImplementedError: a kind of layer or variant that has no such formula; ValueError:
    trainable tokens that the embedding does not have.
    """
    makers: dict[str, Callable[[], Change]] = {}
    replaced: dict[str, str] = {}
    used = {key for key in keys if key.startswith(("base_model.vera_A", "base_model.vera_B"))}
    paths: dict[int, str] = {}
    for name, layer in _adapted(model.get_base_model()):
        # A module in two places has its tensors in the file once, under the first of its names.
        path = f"{PREFIX}{paths.setdefault(id(layer), name)}"
        own = {key for key in keys if key.startswith(f"{path}.")}
        wrappers = _nested(layer)
        used |= {key for key in own if wrappers or ".base_layer." not in key}
        if type(layer).__name__ in ("LNTuningLayer", "ModulesToSaveWrapper"):
            replaced |= {_unwrapped(key.replace(path, f"{PREFIX}{name}", 1)): key for key in own}
        elif wrappers:
            for depth, wrapper in enumerate(wrappers):
                below = functools.partial(_read_below, read, path + depth * ".base_layer")
                makers |= _parameter(name, wrapper, below)
        else:
            tokens = _token_layer(layer)
            if tokens is None:
                get = functools.partial(_read_below, read, path)
                makers |= _layer_changes(model, name, layer, get, read)
            else:
                makers |= _token_rows(name, tokens, _token_key(model, tokens), read)
    stored = {_unwrapped(key): key for key in sorted(keys - used)}
    replacements = {name: _replacement(read, key) for name, key in replaced.items()}
    return Changes(makers | replacements, replaced, stored)


def _adapted(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every adapted layer, or one trained with the adapter, by its name in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield path, child
        else:
            yield from _adapted(child, f"{path}.")


def _read_below(read: Read, path: str, key: str) -> Tensor:
    return read(f"{path}.{key}")


def _unwrapped(key: str) -> str:
    """The name in the base model of a tensor that an adapter's file holds as a whole."""
    name = key.removeprefix(PREFIX).replace(".ln_tuning_layers.", ".")
    return name.replace(".base_layer.", ".")


def _layer_changes(
    model: Any, name: str, layer: Any, get: Read, read: Read
) -> dict[str, Callable[[], Change]]:
    from peft.tuners import adalora, ia3, lora, vera

    kinds: list[tuple[type, Any]] = [
        (adalora.SVDLinear, _adalora),
        (lora.Linear, _lora),
        (lora.Embedding, _lora_embedding),
        (vera.Linear, functools.partial(_vera, read)),
        (ia3.Linear, _ia3),
    ]
    make = next((make for kind, make in kinds if type(layer) is kind), None)
    if make is None:
        raise NotImplementedError(
            f"{name}: {type(layer).__module__}.{type(layer).__name__} must be merged with PEFT's "
            "merge_and_unload: there is no low-rank formula for it"
        )
    found: dict[str, Callable[[], Change]] = make(model, name, layer, get)
    return found


def _nested(layer: Any) -> list[Any]:
    """PEFT's wrappers around parameters of one module, the outermost first."""
    found = []
    while hasattr(layer, "parameter_name"):
        found.append(layer)
        layer = layer.base_layer
    return found


def _parameter(name: str, wrapper: Any, get: Read) -> dict[str, Callable[[], Change]]:
    """LoRA on a parameter: of experts [E, N, K] or [E, K, N], or a matrix."""
    if not EXPERTS_OF_PEFT.is_on():
        raise NotImplementedError(f"{name}.{wrapper.parameter_name}: {EXPERTS_OF_PEFT.obstacle()}")
    scaling, E = float(wrapper.scaling[NAME]), int(wrapper.num_experts)
    transposed = E > 1 and not wrapper._did_swap_in_out_features

    def weight() -> Change:
        A, B = get("lora_A.weight"), get("lora_B.weight")
        if E > 1:
            # The experts' index is the slowest of A's and the fastest of B's.
            A, B = A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E).permute(2, 0, 1)
        return Change(LowRank(A, B, scaling), transposed=transposed)

    return {f"{name}.{wrapper.parameter_name}": weight}


def _token_layer(layer: Any) -> Any:
    """PEFT's layer of trainable tokens, alone or wrapped; None for any other."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    inner = getattr(layer, "token_adapter", layer)
    return inner if isinstance(inner, TrainableTokensLayer) else None


def _token_key(model: Any, layer: Any) -> str:
    """The key of the rows in the adapter's file; layers that are tied have those of one."""
    source = layer.tied_adapter or layer
    path = next(name for name, module in model.named_modules() if module is source)
    return f"{path}.trainable_tokens_delta"


def _token_rows(name: str, layer: Any, key: str, read: Read) -> dict[str, Callable[[], Change]]:
    indices = list(layer.token_indices[NAME])
    tokens = layer.get_base_layer().weight.shape[0]
    wrong = [i for i in indices if type(i) is not int or not 0 <= i < tokens]
    if wrong or len(set(indices)) < len(indices):
        raise ValueError(
            f"{name}: the indices of trainable tokens must be different numbers below {tokens}, "
            f"got {wrong[0] if wrong else indices}"
        )
    rows = torch.tensor(indices)
    return {f"{name}.weight": lambda: Change(value=read(key), rows=rows)}


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
    # The rank before the allocator pruned any direction, as PEFT stores it.
    scaling = float(layer.scaling[NAME]) / (model.peft_config[NAME].init_r + 1e-5)

    def weight() -> Change:
        E = get("lora_E").flatten()
        term = LowRank(get("lora_A"), get("lora_B"), scaling, d=E) if E.numel() else None
        return Change(term, transposed=layer.fan_in_fan_out)

    return {f"{name}.weight": weight}


def _vera(
    read: Read, model: Any, name: str, layer: Any, get: Read
) -> dict[str, Callable[[], Change]]:
    config = model.peft_config[NAME]

    def weight() -> Change:
        if config.save_projection:
            A, B = read("base_model.vera_A"), read("base_model.vera_B")
        else:
            R, K = model.base_model.vera_A[NAME].shape
            N = model.base_model.vera_B[NAME].shape[0]
            A, B = _drawn(K, N, R, config.projection_prng_key)
        A, B = A[:, : layer.in_features].contiguous(), B[: layer.out_features].contiguous()
        b, d = (get(f"vera_lambda_{letter}") for letter in "bd")
        return Change(LowRank(A, B, 1.0, b, d), transposed=layer.fan_in_fan_out)

    return {f"{name}.weight": weight}


@functools.lru_cache(maxsize=1)
def _drawn(K: int, N: int, R: int, key: int) -> tuple[Tensor, Tensor]:
    """The projections that PEFT draws from a key, if the file leaves them out."""
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
