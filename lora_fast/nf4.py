"""NF4 and FP4 weights in bitsandbytes' storage.

A weight [N, K] is flattened; ``blocksize`` consecutive elements share one absmax. Byte i holds
element 2i in its high nibble and 2i+1 in its low one. With double quantisation

    absmax[i] = code2[absmax_u8[i]] · absmax2[i // blocksize2] + offset

W = code[nibble] · absmax in float32, rounded once to the wanted dtype (QLoRA, Dettmers et al. 2023,
§3). NF4 and FP4 differ in the 16 values of `code` alone. bitsandbytes takes longer to import than
PyTorch, so it is loaded only to quantise or decode.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .features import EQUAL_ABSMAX
from .four_bit.decoded import Decoded
from .four_bit.decoding import CODES, absmax_of, decode
from .four_bit.layout import is_plain, plain_bytes, plain_state
from .optional_packages import needed

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# Absmax values that share one absmax2.
_SECOND_BLOCKSIZE = 256


@dataclass(eq=False)
class NF4Weight:
    """A frozen NF4 or FP4 weight [N, K]: a view of bitsandbytes' storage, without a copy.

    packed: the quantised bytes, contiguous uint8 of any shape. quant_state: bitsandbytes' own
    description of them. decoded: where a backend leaves W that it has decoded, and finds it, if
    anywhere.
    Build one with :meth:`from_params4bit` or :meth:`from_dense`.
    """

    packed: Tensor
    quant_state: Any
    decoded: Decoded | None = None

    @classmethod
    def from_params4bit(cls, weight: Any) -> NF4Weight:
        """Wrap the weight of a ``bitsandbytes.nn.Linear4bit`` (any ``quant_storage``), without a
        copy; one that bitsandbytes has packed for a CPU is unpacked into new memory.

        Raises TypeError if `weight` is not quantised, NotImplementedError for another table than
        those of nf4 and fp4, ValueError for a shape that is not [N, K].
        """
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise TypeError(
                "weight must be a quantised bitsandbytes Params4bit with a quant_state, got "
                f"{type(weight).__name__} without one; move the layer to its device to quantise it"
            )
        if state.quant_type not in CODES:
            raise NotImplementedError(
                f"weight must be quantised as {' or '.join(CODES)}, got {state.quant_type}"
            )
        if len(state.shape) != 2:
            raise ValueError(f"weight must have shape [N, K], got {tuple(state.shape)}")
        # A copy: bitsandbytes changes its state in place when it packs the weight.
        own = state if torch.compiler.is_compiling() else copy.copy(state)
        return cls.view(weight.data.view(-1), own)

    @classmethod
    def view(cls, data: Tensor, quant_state: Any) -> NF4Weight:
        """The weight of a layer's data and state, unchecked, for as long as neither is replaced."""
        if is_plain(quant_state):
            is_bytes = data.dtype is torch.uint8
            return cls(data if is_bytes else data.view(-1).view(torch.uint8), quant_state)
        return cls(plain_bytes(data, quant_state), plain_state(quant_state))

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        *,
        blocksize: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
    ) -> NF4Weight:
        """Quantise a dense [N, K] weight (bfloat16, float16 or float32) with bitsandbytes, as "nf4"
        or "fp4".

        Raises ValueError that names the argument, ImportError without bitsandbytes,
        NotImplementedError for `double_quant` if the installed version cannot do it.
        """
        if weight.dim() != 2:
            raise ValueError(f"weight must have shape [N, K], got {tuple(weight.shape)}")
        if blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
        if quant_type not in CODES:
            raise ValueError(f"quant_type must be one of {tuple(CODES)}, got {quant_type!r}")
        bnb = needed("bitsandbytes.functional", "an NF4 weight")
        if weight.is_meta:
            # bitsandbytes caches its table of 8-bit values on the device of first use, which must
            # not be meta.
            bnb.quantize_blockwise(torch.ones(1, device="cpu"))
        dense = weight.detach()
        if dense.numel() % 2:
            # bitsandbytes below 0.49 packs whole pairs only; an extra zero changes no block's
            # absmax.
            dense = torch.nn.functional.pad(dense.reshape(-1), (0, 1))
        if double_quant and not EQUAL_ABSMAX.is_on():
            _check_absmax(dense, blocksize)
        packed, state = bnb.quantize_4bit(
            dense, blocksize=blocksize, compress_statistics=double_quant, quant_type=quant_type
        )
        state.shape = weight.shape
        return cls(packed.view(-1), state)

    @property
    def quant_type(self) -> str:
        """Which table the nibbles index: "nf4" or "fp4"."""
        return str(self.quant_state.quant_type)

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.quant_state.shape)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight that was quantised."""
        return self.quant_state.dtype

    @property
    def nested(self) -> bool:
        """Whether the absmax values are themselves quantised (double quantisation)."""
        return bool(self.quant_state.nested)

    @property
    def blocksize(self) -> int:
        return int(self.quant_state.blocksize)

    def absmax(self) -> Tensor:
        """float32 absmax of every block, double quantisation undone."""
        return absmax_of(self.quant_state)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense [N, K] in `dtype` (default: the dtype before quantisation).

        float64 is the exact float64 image of the float32 product code · absmax.
        """
        state = self.quant_state
        absmax, blocksize = absmax_of(state), int(state.blocksize)
        wanted = dtype or state.dtype
        return decode(self.packed, absmax, blocksize, state.quant_type, wanted, state.shape)


def _check_absmax(dense: Tensor, blocksize: int) -> None:
    """Raise for what bitsandbytes divides by zero: absmax that are all equal to their mean."""
    if dense.device.type != "cpu":
        return
    absmax = torch.stack([block.abs().max() for block in dense.reshape(-1).split(blocksize)])
    from_mean = absmax.float() - absmax.float().mean()
    if any(not block.any() for block in from_mean.split(_SECOND_BLOCKSIZE)):
        raise NotImplementedError(
            f"double_quant must be False for this weight, got True: {EQUAL_ABSMAX.obstacle()}"
        )
