"""PEFT's tuners, which wrap layers whenever an adapter is added or loaded: these run fused as well.

A new adapter may adapt layers that had none before. A tuner is a module of the model, so its class
can be switched like those of the layers, and PEFT itself is not patched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.adalora import AdaLoraModel
from peft.tuners.delora import DeloraModel
from peft.tuners.ia3 import IA3Model
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel
from peft.tuners.vera import VeraModel
from torch import nn

# Attribute of a tuner: a function to call with its model after an injection.
COVER = "_lora_fast_cover"


class CoversLaterLayers:
    """Mixin before a PEFT tuner: runs PEFT's injection, then switches the new layers."""

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)  # type: ignore[misc]
        cover: Callable[[nn.Module], object] = self.__dict__[COVER]
        cover(model)

    def __init_subclass__(cls) -> None:
        # PEFT reports the name of the class; unpickling uses __qualname__.
        cls.__name__ = cls.__bases__[-1].__name__


class CoveredLoraModel(CoversLaterLayers, LoraModel):
    """``peft.tuners.lora.LoraModel`` whose later layers run fused."""


class CoveredVeraModel(CoversLaterLayers, VeraModel):
    """``peft.tuners.vera.VeraModel`` whose later layers run fused."""


class CoveredAdaLoraModel(CoversLaterLayers, AdaLoraModel):
    """``peft.tuners.adalora.AdaLoraModel`` whose later layers run fused."""


class CoveredIA3Model(CoversLaterLayers, IA3Model):
    """``peft.tuners.ia3.IA3Model`` whose later layers run fused."""


class CoveredDeloraModel(CoversLaterLayers, DeloraModel):
    """``peft.tuners.delora.DeloraModel`` whose later layers run fused."""


class CoveredMixedModel(CoversLaterLayers, MixedModel):
    """``peft.tuners.mixed.MixedModel`` whose later layers run fused."""


TUNER_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    LoraModel: CoveredLoraModel,
    VeraModel: CoveredVeraModel,
    AdaLoraModel: CoveredAdaLoraModel,
    IA3Model: CoveredIA3Model,
    DeloraModel: CoveredDeloraModel,
    MixedModel: CoveredMixedModel,
}
