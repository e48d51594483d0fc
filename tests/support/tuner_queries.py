"""Queries of the tuner that its tests start from."""

from __future__ import annotations

import torch

from lora_fast.factors import Needs
from lora_fast.tuning.plans import (
    BACKWARD,
    Query,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

TRAINED = Needs(x=True, A=True, B=True)

PLAIN = Query(
    BACKWARD, 2048, 4096, (4096,), (16,), BF16, FP32, (BF16,), (False,) * 6, (TRAINED,), True
)

NF4 = PLAIN._replace(weights=((64, True),))
