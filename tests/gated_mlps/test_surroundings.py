"""Gated MLPs in what others do around them: threads, checkpoints, compilers, device maps, FSDP2."""

from __future__ import annotations

import copy
import threading
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from gated_models import (
    NAMES,
    GatedMLP,
    H,
    agree,
    counts,
    layer_of,
    liger_forward,
    mlp_of,
    reported,
    stock_model,
)
from lora_models import (
    accelerated_copy,
    counted,
    run,
)
from peft.tuners.lora import variants
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import lora_fast
from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree, assert_same_bits


def test_two_threads() -> None:
    fused = lora_fast.accelerate(stock_model())
    xs = [torch.randn(4, H, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with torch.no_grad():
        expected = [fused(x) for x in xs]
    failures = []

    def work(i: int) -> None:
        for _ in range(50):
            with torch.no_grad():
                if not torch.equal(fused(xs[i]), expected[i]):
                    failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert counts(fused)[1] == {}


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, kind: str) -> None:
    fused = lora_fast.accelerate(stock_model(kind, lora_dropout=0.3)).train()
    x = torch.randn(4, H)
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        fused.zero_grad()
        leaf = x.clone().requires_grad_()
        y = checkpoint(fused, leaf, use_reentrant=reentrant) if recompute else fused(leaf)
        y.sum().backward()
        gradients = {n: p.grad.clone() for n, p in fused.named_parameters() if p.requires_grad}
        found.append({"y": y.detach(), "x": leaf.grad, **gradients})
    for name, tensor in found[0].items():
        assert_same_bits(found[1][name], tensor, name=name)
    # Without reentrance the recomputation ends when everything is saved, before it is counted.
    assert counts(fused) == (3 if reentrant else 2, {})


def test_an_exception_leaves_nothing_behind() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    with pytest.raises(RuntimeError):
        fused(torch.ones(2, H + 1))
    layer_of(fused, "down_proj").register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fused(torch.ones(2, H))
    layer_of(fused, "down_proj")._forward_pre_hooks.clear()
    agree(fused, stock)


def test_a_changed_input_raises_as_with_stock() -> None:
    for model in (stock_model(), lora_fast.accelerate(stock_model())):
        x = torch.ones(2, H)
        y = model(x)
        x.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_compiled_models_run_the_layers() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, H)
    assert_agree(compiled(x), stock(x), within=ORDER_DIFFERENCE)
    assert counts(fused) == (0, {"torch.compile: layers are operators": 1})
    assert all(layer.compiled for layer in lora_fast.report(fused).layers)


def test_export() -> None:
    fused = lora_fast.accelerate(stock_model())
    x = torch.randn(4, H)
    with torch.no_grad():
        program = torch.export.export(fused, (x,))
        assert_agree(program.module()(x), fused(x), within=ORDER_DIFFERENCE)


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_a_device_map(before: bool) -> None:
    stock = stock_model()
    fused = copy.deepcopy(stock)

    def add() -> None:
        for module in (mlp_of(fused), layer_of(fused, "gate_proj").base_layer):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))

    if before:
        add()
    lora_fast.accelerate(fused)
    if not before:
        add()
    agree(fused, stock)
    assert counts(fused) == (1, {})
    if before:
        lora_fast.decelerate(fused)
        assert mlp_of(fused)._old_forward.__func__ is GatedMLP.forward
    remove_hook_from_module(mlp_of(fused))
    agree(fused, stock)


@pytest.mark.parametrize("on_instance", [True, False])
def test_a_model_that_liger_has_patched(on_instance: bool) -> None:
    class Patched(GatedMLP):
        pass

    stock = stock_model(mlp=Patched())
    fused = copy.deepcopy(stock)
    forward = liger_forward()
    if on_instance:
        mlp_of(fused).forward = MethodType(forward, mlp_of(fused))
    else:
        Patched.forward = forward  # type: ignore[method-assign]
    lora_fast.accelerate(fused)
    agree(fused, stock)
    assert counts(fused) == (1, {})
    layer_of(fused, "up_proj").register_forward_hook(lambda *_: None)
    agree(fused, stock)
    assert counts(fused) == (1, {"up_proj: hooks": 1})
    lora_fast.decelerate(fused)
    assert type(mlp_of(fused)) is Patched
    assert ("forward" in mlp_of(fused).__dict__) == on_instance
    assert mlp_of(fused).forward.__func__ is forward


def test_liger_patches_after_the_call() -> None:
    fused = lora_fast.accelerate(stock_model())
    mlp_of(fused).forward = MethodType(liger_forward(), mlp_of(fused))
    fused(torch.ones(2, H))
    assert counts(fused) == (0, {})
    assert reported(fused).obstacle == "forward of the module replaced"
    lora_fast.accelerate(fused)
    fused(torch.ones(2, H))
    assert counts(fused) == (1, {})


def test_a_class_that_cannot_be_derived_from_stays() -> None:
    class Final(GatedMLP):
        def __init_subclass__(cls) -> None:
            raise TypeError("final")

    fused = lora_fast.accelerate(stock_model(mlp=Final()))
    assert type(mlp_of(fused)) is Final
    assert reported(fused).obstacle == "not accelerated"
    fused(torch.ones(2, H))
    assert counted(fused) == (3, {})


def test_what_is_no_gated_mlp_is_reported_with_the_reason() -> None:
    class Scaled(GatedMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)

    fused = lora_fast.accelerate(stock_model(mlp=Scaled()))
    found = reported(fused)
    assert (found.activation, found.kind) == (None, "Scaled")
    assert found.obstacle == "multiplies by a value that is no output of a layer"
    assert found.obstacle in str(lora_fast.report(fused))
    assert type(mlp_of(fused)) is Scaled


ALORA = {"alora_invocation_tokens": [1]}
needs_alora = pytest.mark.skipif(
    not hasattr(variants, "ALoraLinearVariant"), reason="PEFT has no aLoRA"
)


@pytest.mark.parametrize("targets", [r".*_proj", ["up_proj"]], ids=str)
@needs_alora
def test_calls_of_alora_are_what_the_report_foretells(targets: Any) -> None:
    """PEFT passes offsets by hooks, which are gone afterwards: layers run by themselves anyway."""
    stock = stock_model(target_modules=targets, **ALORA)
    fused = accelerated_copy(stock)
    before = reported(fused)
    assert before.fused and set(before.alone.values()) == {"more than plain LoRA"}
    x, offsets = torch.randn(2, 5, H), [2, None]
    y = fused(x, alora_offsets=offsets)
    assert_agree(y, stock(x, alora_offsets=offsets), within=ORDER_DIFFERENCE)
    assert not torch.equal(y, fused(x, alora_offsets=[5, 5]))
    found = reported(fused)
    assert (found.alone, found.obstacle) == (before.alone, None)
    assert counts(fused) == (2, {}) and not mlp_of(fused).up_proj._forward_pre_hooks


@pytest.fixture
def mesh(tmp_path: Any) -> Any:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("around", ["mlp", "layers"])
def test_fsdp2(around: str, mesh: Any) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    x = torch.randn(3, H)
    expected = run(stock, x)
    sharded = [mlp_of(fused)] if around == "mlp" else [layer_of(fused, name) for name in NAMES]
    for module in sharded:
        fully_shard(module, mesh=mesh)
    fully_shard(fused, mesh=mesh)
    for name, found in run(fused, x).items():
        whole = found.full_tensor() if isinstance(found, DTensor) else found
        assert_agree(whole, expected[name], within=ORDER_DIFFERENCE, name=name)
    one, others = counts(fused)
    assert (one, list(others)) == ((1, []) if around == "mlp" else (0, ["gate_proj: hooks"]))
    assert counted(fused) == (3, {})
    lora_fast.decelerate(fused)
    run(fused, x)
    assert counts(fused) == (0, {})
