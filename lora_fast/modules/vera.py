"""VeRA as a plain ``nn.Module``, without PEFT."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..base_layer.linear import weight_shape
from ..base_layer.merging import LowRank
from ..operation.validation import check_probability
from .adapter_module import AdapterModule, check_adapter_dtype, check_base, check_rank


class VeRAProjections(nn.Module):
    """The frozen random A [R, K] and B [N, R] that all VeRA layers of a model share.

    K and N are the largest of these layers; smaller ones use the first columns of A and the first
    rows of B. Both are drawn from `projection_prng_key` with PEFT's generator and distribution:
    Kaiming uniform with gain √2. ``save_projection=False`` omits them from the state_dict; they are
    then drawn again from the key.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        projection_prng_key: int = 0,
        save_projection: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(projection_prng_key)
        for name, shape in (("vera_A", (r, in_features)), ("vera_B", (out_features, r))):
            bound = math.sqrt(2.0) * math.sqrt(3.0 / shape[1])
            values = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, values.to(device, dtype), persistent=save_projection)


class VeRALinear(AdapterModule):
    """y = x Wᵀ + b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ) + bias, with A and B frozen and shared by layers.

    ``vera_lambda_b`` b [N], which starts at 0, and ``vera_lambda_d`` d [R], which starts at
    `d_initial`, train; ``projections`` holds A and B. x [..., K] → y [..., N], in the dtype that
    ``base_layer`` alone gives. Source: VeRA (Kopiczko et al. 2023, eq. 2).
    """

    def __init__(
        self,
        base_layer: Any,
        *,
        r: int = 256,
        vera_dropout: float = 0.0,
        d_initial: float = 0.1,
        projections: VeRAProjections | None = None,
        projection_prng_key: int = 0,
        save_projection: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_rank(r)
        check_probability("vera_dropout", vera_dropout)
        check_adapter_dtype(dtype)
        check_base(base_layer)
        (N, K), device = weight_shape(base_layer), base_layer.weight.device
        if projections is None:
            projections = VeRAProjections(
                K, N, r, projection_prng_key=projection_prng_key, save_projection=save_projection,
                dtype=dtype, device=device,
            )  # fmt: skip
        _check_projections(projections, N, K, r)
        super().__init__(base_layer)
        self.r, self.vera_dropout, self.d_initial = r, vera_dropout, d_initial
        self.projections = projections
        self.vera_lambda_b = nn.Parameter(
            torch.empty(self.out_features, device=device, dtype=dtype)
        )
        self.vera_lambda_d = nn.Parameter(torch.empty(r, device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_linear(  # type: ignore[override]  # each by name
        cls,
        linear: nn.Module,
        *,
        r: int = 256,
        vera_dropout: float = 0.0,
        d_initial: float = 0.1,
        projections: VeRAProjections | None = None,
        projection_prng_key: int = 0,
        save_projection: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Adapt a linear layer, which becomes ``base_layer`` itself, not a copy, and is frozen.

        `linear`: an ``nn.Linear`` or a quantised ``bitsandbytes.nn.Linear4bit``.
        `r`: the rank R ≥ 1.
        `vera_dropout`: the probability in [0, 1] with which training drops an element of x.
        `d_initial`: what every element of d starts as.
        `projections`: A and B, shared with other layers; None draws new ones.
        `projection_prng_key`: the seed that new ones are drawn from.
        `save_projection`: whether new ones are part of the state_dict.
        `dtype`: that of b, d and new A and B.
        Raises TypeError or ValueError that names the argument.
        """
        layer = cls(
            linear, r=r, vera_dropout=vera_dropout, d_initial=d_initial, projections=projections,
            projection_prng_key=projection_prng_key, save_projection=save_projection, dtype=dtype,
        )  # fmt: skip
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """PEFT's initialisation: b zero, d constant."""
        nn.init.zeros_(self.vera_lambda_b)
        nn.init.constant_(self.vera_lambda_d, self.d_initial)

    def low_rank(self) -> LowRank:
        A = self.projections.vera_A[:, : self.in_features]
        B = self.projections.vera_B[: self.out_features]
        return LowRank(A, B, 1.0, self.vera_lambda_b, self.vera_lambda_d)

    def dropout_p(self) -> float:
        return self.vera_dropout

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"vera_dropout={self.vera_dropout}, merged={self.merged}"
        )


def _check_projections(projections: Any, N: int, K: int, r: int) -> None:
    if not isinstance(projections, VeRAProjections):
        raise TypeError(f"projections must be VeRAProjections, got {type(projections).__name__}")
    A, B = tuple(projections.vera_A.shape), tuple(projections.vera_B.shape)
    if A[0] != r or B[1] != r or A[1] < K or B[0] < N:
        raise ValueError(
            f"projections must have A [{r}, ≥ {K}] and B [≥ {N}, {r}], got {A} and {B}"
        )
