"""NF4 weights of experts in bitsandbytes' storage.

A parameter [E, P, Q] is flattened and quantised like a matrix (:mod:`lora_fast.nf4`); the elements
of an expert are a multiple of ``blocksize``, so each has its own blocks and is decoded by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..four_bit.decoded import Decoded
from ..four_bit.decoding import absmax_of, decode


@dataclass(frozen=True, eq=False)
class NF4Experts:
    """A frozen NF4 weight [E, N, K] of experts: a view of bitsandbytes' storage, without a copy.

    packed: the quantised bytes, flat uint8. quant_state: bitsandbytes' own description of them,
    whose shape is that of the parameter: [E, N, K], or [E, K, N] if it is ``transposed``. decoded:
    where a backend leaves the W [E, N, K] that it has decoded, if anywhere.
    """

    packed: Tensor
    quant_state: Any
    transposed: bool = False
    decoded: Decoded | None = None

    quant_type = "nf4"

    def __post_init__(self) -> None:
        state = self.quant_state
        if state.quant_type != "nf4":
            raise NotImplementedError(f"weight must be quantised as nf4, got {state.quant_type}")
        if len(state.shape) != 3:
            raise ValueError(f"weight must have three dimensions, got {tuple(state.shape)}")
        elements = state.shape[1] * state.shape[2]
        if elements % state.blocksize:
            raise ValueError(
                f"weight must have a multiple of blocksize = {state.blocksize} elements an expert, "
                f"got {state.shape[1]} × {state.shape[2]}"
            )

    @property
    def shape(self) -> torch.Size:
        E, P, Q = self.quant_state.shape
        return torch.Size((E, Q, P) if self.transposed else (E, P, Q))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight that was quantised."""
        return self.quant_state.dtype

    def by_expert(self, dtype: torch.dtype) -> DecodedByExpert:
        """W [N, K] of one expert after the other, decoded when it is asked for."""
        return DecodedByExpert(self, dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense [E, N, K] in `dtype` (default: the dtype before quantisation), of all experts."""
        state = self.quant_state
        absmax, wanted = absmax_of(state), dtype or self.dtype
        flat, blocksize = self.packed.view(-1), int(state.blocksize)
        dense = decode(flat, absmax, blocksize, "nf4", wanted, state.shape)
        return dense.transpose(1, 2) if self.transposed else dense


class DecodedByExpert:
    """Decodes one expert at a time, into its part of W [E, N, K] where that is remembered; the
    absmax values of all, 1 / blocksize of the elements, are decoded once."""

    def __init__(self, weight: NF4Experts, dtype: torch.dtype) -> None:
        state = weight.quant_state
        E = state.shape[0]
        self._bytes = weight.packed.view(-1).view(E, -1).unbind()
        self._absmax = absmax_of(state).view(E, -1).unbind()
        self._blocksize, self._dtype = int(state.blocksize), dtype
        self._shape, self._transposed = tuple(state.shape[1:]), weight.transposed
        self._remembered = _remembered(weight, dtype)

    def __getitem__(self, expert: int) -> Tensor:
        packed, absmax = self._bytes[expert], self._absmax[expert]
        dense = decode(packed, absmax, self._blocksize, "nf4", self._dtype, self._shape)
        dense = dense.T if self._transposed else dense
        return dense if self._remembered is None else self._remembered[expert].copy_(dense)


def _remembered(weight: NF4Experts, dtype: torch.dtype) -> Tensor | None:
    """Memory of W [E, N, K] as it is stored, of which experts without rows leave theirs unwritten;
    None if W is not to be remembered, or may not be."""
    if weight.decoded is None:
        return None
    weight.decoded.offer(weight.packed.new_empty(weight.quant_state.shape, dtype=dtype))
    W = weight.decoded.dense
    if W is not None and weight.transposed:
        W = weight.decoded.dense = W.transpose(1, 2)
    return W
