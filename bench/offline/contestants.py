"""The steps that are compared, as lists of counted operations.

frozen        nn.Linear or bitsandbytes' Linear4bit, nothing to train: the floor
lora_fast     PEFT's layers after accelerate(): recorded launches and operations, bytes by
              instruments.traffic; on the routes that are taken until a device was measured
lora_fast fused   the same with every product in our kernels, set_backend("triton")
peft          stock PEFT with bfloat16 adapters; peft fp32: with its default, float32 ones
unsloth       a model of Unsloth's graph, operation for operation
lorafusion    a model of LoRAFusion's
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from lora_fast.kernels.launch_policy import GemmConfig

from bench.instruments import stub_driver, traffic
from bench.instruments.saved_tensors import SavedTensors

from . import issue, layers, lorafusion_graph, unsloth_graph
from .operations import Operation, OperationCounter, Step, dropout_as_on_cuda

STOCK = ("frozen", "peft", "peft fp32")


@dataclass(frozen=True)
class Case:
    """One cell of the tables; ``weight`` is dense or nf4, everything else bfloat16. ``activates``:
    the activation of the MLP is counted, too, as whoever it is computes it."""

    shape: layers.Shape
    M: int
    R: int
    weight: str
    dropout_p: float
    activates: bool = False

    def __str__(self) -> str:
        return f"{self.shape.name} M{self.M} r{self.R} {self.weight} p={self.dropout_p}"


@dataclass
class LoraFastStep(Step):
    """A step of ours: the recorded launches, each an operation.

    A launch of ticketed_gemm is one operation, not one per pass: its tickets alternate between
    tiles that make S and tiles that multiply, which run concurrently.
    """

    launches: int = 0
    forward_launches: int = 0
    repeated_bytes: int = 0
    issued_bytes: int = 0


def stock(case: Case, kind: str) -> Step:
    """The real operations of the frozen layer, or of PEFT, on meta tensors."""
    model = layers.Linears(case.shape, case.weight, "meta", activates=case.activates)
    if kind != "frozen":
        dtype = torch.float32 if kind == "peft fp32" else layers.DTYPE
        model = layers.with_lora(model, case.R, case.dropout_p, "meta", adapter_dtype=dtype)
    with dropout_as_on_cuda():
        return _counted(model, case, OperationCounter(), "meta")


def modelled(case: Case, graph: str) -> Step | None:
    """Unsloth's or LoRAFusion's step; None where they have no fused path."""
    count = {"unsloth": unsloth_graph.step, "lorafusion": lorafusion_graph.step}[graph]
    return count(case.shape, case.M, case.R, case.weight, case.dropout_p)


class LoraFast:
    """Our layers of one shape on one device, ready to be recorded with any number of rows."""

    def __init__(self, case: Case, *, adapter_dtype: torch.dtype = layers.DTYPE) -> None:
        import lora_fast

        base = layers.Linears(case.shape, case.weight, "cpu", activates=case.activates)
        model = layers.with_lora(base, case.R, case.dropout_p, "cpu", adapter_dtype=adapter_dtype)
        self.model = lora_fast.accelerate(model)

    def step(
        self, case: Case, arch: int, *, fused: bool = False
    ) -> tuple[LoraFastStep, stub_driver.Log]:
        """Record a step on ``arch``; RuntimeError if a layer does not run fused."""
        import lora_fast

        # The first step also allocates what all later ones share.
        for _ in range(2):
            counter = OperationCounter(compute=False)
            with on_routes(fused=fused), stub_driver.recording(arch) as log:
                torch_step = _counted(self.model, case, counter, "cpu", log)
        report = lora_fast.report(self.model)
        if not report.all_fused or report.fused_calls == 0:
            raise RuntimeError(f"{case}: not every adapted linear ran fused:\n{report}")
        return _ours(torch_step, log, arch), log


@contextlib.contextmanager
def on_routes(*, fused: bool) -> Iterator[None]:
    """The routes that `auto` takes on a GPU, with products in 16 bits, or fused alone; on a CPU."""
    import lora_fast
    from lora_fast.backends import selection, torch_products
    from lora_fast.backends.triton_ops import TritonBackend
    from lora_fast.tuning.plans import FUSED

    class Fused(TritonBackend):
        """With the tiles of launch_policy.py, whatever others the model prefers."""

        def _plan(self, *asked: Any) -> Any:
            return FUSED

    chooses = Fused(cublas=False) if fused else TritonBackend(cublas=True)
    with (
        lora_fast.set_backend("triton"),
        mock.patch.object(selection, "_triton", lambda name: chooses),
        mock.patch.object(torch_products, "native_dtypes", lambda: (torch.bfloat16, torch.float16)),
    ):
        yield


def _counted(
    model: Any,
    case: Case,
    counter: OperationCounter,
    device: str,
    log: stub_driver.Log | None = None,
) -> Step:
    x = torch.empty(1, case.M, case.shape.hidden, dtype=layers.DTYPE, device=device)
    x.requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    with counter:
        with SavedTensors(layers.constants(model)) as saved:
            y = model(x)
        forward = len(counter.operations)
        if log is not None:
            log.launches.append(_BACKWARD_STARTS)
        saved_bytes = saved.bytes
        torch.autograd.grad(y, [x, *trained], torch.empty_like(y))
    operations = counter.operations
    return Step(operations[:forward], operations[forward:], saved_bytes)


_BACKWARD_STARTS: Any = object()
"""Separates the launches of the two directions in a log."""


def _ours(torch_step: Step, log: stub_driver.Log, arch: int) -> LoraFastStep:
    start = log.launches.index(_BACKWARD_STARTS)
    del log.launches[start]
    step = LoraFastStep(saved_bytes=torch_step.saved_bytes)
    step.forward_launches = start + len(torch_step.forward)
    step.launches = len(log.launches) + len(torch_step.operations)
    for number, launch in enumerate(log.launches):
        passes = traffic.traffic(launch)
        part = step.forward if number < start else step.backward
        part.append(
            Operation(
                launch.name,
                sum(p.flops for p in passes),
                sum(p.read.total() for p in passes),
                sum(p.written.total() for p in passes),
                sum(issue.issue_seconds(launch, p.name, arch) for p in passes),
                _tile(launch),
            )
        )
        step.repeated_bytes += sum(p.bytes for p in passes) - traffic.compulsory_bytes(passes)
        step.issued_bytes += sum(p.loaded.total() + p.stored.total() for p in passes)
    step.forward += torch_step.forward
    step.backward += torch_step.backward
    step.issued_bytes += torch_step.bytes
    return step


def _tile(launch: stub_driver.Launch) -> GemmConfig | None:
    """The tile of a product with W."""
    c = launch.constexprs
    if launch.name != "ticketed_gemm" or launch.arguments.get("y_ptr") is None:
        return None
    sizes = (c[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_S", "GROUP_M"))
    return GemmConfig(*sizes, launch.kernel.num_warps, launch.kernel.num_stages)
