"""Three training steps on one process or several, and the resulting parameters."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from cpu_kinds import force_for_good
from lora_models import K, Mlp, N, lora_config, quantised
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lora_fast

with contextlib.suppress(ImportError):  # once, not in every process
    from transformers.models.qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

STEPS, MICRO_BATCHES, SAMPLES = 3, 2, 8


@dataclass
class Result:
    """Every parameter that trains, whole, and what the report counted."""

    parameters: dict[str, Tensor]
    fused_calls: int
    fallbacks: dict[str, int]


@dataclass
class Example:
    """How an example ended, and what it printed."""

    status: int
    printed: str


@dataclass(frozen=True)
class Scenario:
    """A model, what an engine makes of it, and whether processes share out a batch."""

    make: Callable[[], nn.Module]
    distribute: Callable[[nn.Module], nn.Module]
    checkpointed: bool = False
    reentrant: bool = False
    data_parallel: bool = True


class Checkpointed(nn.Module):
    """A model whose forward pass is computed again in the backward pass."""

    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        # The reentrant kind takes part in a backward pass if an input does.
        x = x.requires_grad_(self.reentrant)
        y: Tensor = checkpoint(self.model, x, use_reentrant=self.reentrant)
        return y


class Mixture(nn.Module):
    """A router and experts between two linear layers, as transformers has them."""

    E, k, H = 4, 2, 16

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3MoeConfig(hidden_size=self.H, moe_intermediate_size=8, num_experts=self.E)
        config._experts_implementation = "eager"
        self.enter, self.leave = nn.Linear(K, self.H), nn.Linear(self.H, N)
        self.router, self.experts = nn.Linear(self.H, self.E), Qwen3MoeExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        w, index = self.router(h).softmax(-1).topk(self.k)
        y: Tensor = self.leave(h + self.experts(h, index, w))
        return y


def accelerated(kind: str = "dense", storage: torch.dtype | None = None) -> nn.Module:
    """A PEFT model of two layers on the fused path, dense or NF4 with bytes kept as `storage`."""
    torch.manual_seed(0)
    base: nn.Module = Mlp()
    if kind == "nf4":
        base = quantised(base, quant_storage=storage or torch.uint8)
    model: nn.Module = lora_fast.accelerate(get_peft_model(base, lora_config()))
    return model


def with_experts(kind: str = "dense") -> nn.Module:
    """Adapters on experts, dense or NF4, and on the layer before them."""
    torch.manual_seed(0)
    base: nn.Module = Mixture()
    if kind == "nf4":
        lora_fast.quantize_experts(base)
    config = LoraConfig(
        r=3,
        target_modules=["enter"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    model: nn.Module = lora_fast.accelerate(get_peft_model(base, config))
    return model


def converted(storage: torch.dtype | None = None) -> nn.Module:
    """The same without PEFT, DoRA beside LoRA."""
    torch.manual_seed(0)
    model = Mlp() if storage is None else quantised(Mlp(), quant_storage=storage)
    model.fc1 = lora_fast.DoRALinear.from_linear(model.fc1, r=5)
    model.fc2 = lora_fast.LoRALinear.from_linear(model.fc2, r=5)
    for layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def with_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def with_fsdp2(model: nn.Module) -> nn.Module:
    """Each layer's weights and adapters in one group, as decoder layers are sharded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in adapted_layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_fsdp2_around_the_model(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def with_fsdp2_of_the_experts(model: nn.Module) -> nn.Module:
    """The experts and their adapters in one group, the rest of the model in another."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.get_submodule("base_model.model.experts"), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_fsdp2_of_children(model: nn.Module) -> nn.Module:
    """As PEFT's wrap policy does: lora_A and lora_B are groups of their own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in adapted_layers(model):
        fully_shard(layer.lora_A["default"], mesh=mesh)
        fully_shard(layer.lora_B["default"], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_accelerate(model: nn.Module) -> nn.Module:
    """Hugging Face's library, which joins the group of processes that is there."""
    prepared: nn.Module = Accelerator(cpu=True).prepare(model)
    assert isinstance(prepared, DistributedDataParallel)
    return prepared


def with_tensor_parallel(model: nn.Module) -> nn.Module:
    """The frozen weight of fc1 in parts of its rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"base_model.model.fc1.base_layer": ColwiseParallel(output_layouts=Replicate())}
    whole = parallelize_module(model, mesh, plan)
    # torch 2.10 makes parameters that train of those it distributes.
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return whole


def adapted_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


SCENARIOS = {
    "ddp": Scenario(accelerated, with_ddp),
    "ddp-nf4": Scenario(lambda: accelerated("nf4"), with_ddp, checkpointed=True),
    "fsdp2": Scenario(accelerated, with_fsdp2),
    "fsdp2-checkpoint": Scenario(accelerated, with_fsdp2_around_the_model, checkpointed=True),
    "fsdp2-own": Scenario(converted, with_fsdp2_around_the_model),
    "fsdp2-own-nf4": Scenario(lambda: converted(torch.uint8), with_fsdp2),
    "fsdp2-nf4-uint8": Scenario(lambda: accelerated("nf4"), with_fsdp2_around_the_model),
    "fsdp2-nf4-bf16": Scenario(lambda: accelerated("nf4", torch.bfloat16), with_fsdp2),
    "fsdp2-children": Scenario(accelerated, with_fsdp2_of_children),
    "fsdp2-children-nf4": Scenario(lambda: accelerated("nf4"), with_fsdp2_of_children),
    "accelerate": Scenario(accelerated, with_accelerate),
    "tensor-parallel": Scenario(accelerated, with_tensor_parallel, data_parallel=False),
}
# Of Mixture; they need what the fused path of experts needs.
SCENARIOS_OF_EXPERTS = {
    "experts-ddp": Scenario(with_experts, with_ddp),
    "experts-ddp-nf4": Scenario(lambda: with_experts("nf4"), with_ddp, checkpointed=True),
    "experts-ddp-nf4-reentrant": Scenario(
        lambda: with_experts("nf4"), with_ddp, checkpointed=True, reentrant=True
    ),
    "experts-fsdp2": Scenario(with_experts, with_fsdp2_around_the_model),
    "experts-fsdp2-checkpoint": Scenario(
        with_experts, with_fsdp2_of_the_experts, checkpointed=True
    ),
    "experts-fsdp2-nf4": Scenario(lambda: with_experts("nf4"), with_fsdp2_of_the_experts),
    "experts-fsdp2-nf4-reentrant": Scenario(
        lambda: with_experts("nf4"), with_fsdp2_of_the_experts, checkpointed=True, reentrant=True
    ),
}


def train(scenario: Scenario, rank: int = 0, world: int = 1) -> Result:
    """SGD on a share of every batch; `world` 1 trains without an engine."""
    share = slice(rank, None, world) if scenario.data_parallel else slice(None)
    model = scenario.make()
    called = scenario.distribute(model) if world > 1 else model
    forward = Checkpointed(called, scenario.reentrant) if scenario.checkpointed else called
    trained = [p for p in called.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for micro in range(MICRO_BATCHES):
            x = torch.randn(SAMPLES, K, generator=generator)[share]
            target = torch.randn(SAMPLES, N, generator=generator)[share]
            with accumulating(called, last=micro == MICRO_BATCHES - 1):
                loss = nn.functional.mse_loss(forward(x), target) / MICRO_BATCHES
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    report = lora_fast.report(model)
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = {names[id(p)]: whole(p) for p in trained}
    return Result(parameters, report.fused_calls, report.fallback_calls)


def whole(parameter: Any) -> Tensor:
    value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return value.detach().clone()


@contextlib.contextmanager
def accumulating(model: Any, *, last: bool) -> Any:
    """Exchange gradients after the last micro-batch alone."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    with contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
        yield


EXAMPLES = ("ddp.py", "fsdp2_qlora.py")


def run_example(name: str, port: int) -> Example:
    """One of the folder examples/ with --smoke, as torchrun starts it in each process."""
    path = Path(__file__).resolve().parents[2] / "examples" / name
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = [name, "--smoke"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = runpy.run_path(str(path))["main"]()
    return Example(status, printed.getvalue())


def work(rank: int, world: int, folder: str, ports: list[int]) -> None:
    """One process of `world`: every example and scenario, with the results in a file."""
    torch.set_num_threads(1)
    force_for_good()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", HF_HUB_OFFLINE="1")
    results: dict[str, Result | Example | str] = {}
    for name, port in zip(EXAMPLES, ports, strict=True):
        try:
            results[name] = run_example(name, port)
        except Exception:
            results[name] = traceback.format_exc()
    store = dist.FileStore(os.path.join(folder, "store"), world)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=60)
    )
    try:
        for name, scenario in {**SCENARIOS, **SCENARIOS_OF_EXPERTS}.items():
            try:
                results[name] = train(scenario, rank, world)
            except Exception:
                results[name] = traceback.format_exc()
    finally:
        dist.destroy_process_group()
    torch.save(results, os.path.join(folder, f"rank{rank}.pt"))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        found = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for listener in found:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in found]


def run_everything(world: int = 2) -> list[dict[str, Result | Example | str]]:
    """For each rank the results of every example and scenario, for a failure its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        # A process that has imported this file once starts the others, without the threads of ours.
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        torch.multiprocessing.start_processes(
            work,
            (world, folder, free_ports(len(EXAMPLES))),
            nprocs=world,
            start_method="forkserver",
        )
        files = [Path(folder, f"rank{rank}.pt") for rank in range(world)]
        return [torch.load(file, weights_only=False) for file in files]
