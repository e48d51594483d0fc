"""Gated MLPs are switched in place, undone exactly, and stay right whatever is done to them."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from functools import partial
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
    counts,
    layer_of,
    liger_forward,
    mlp_of,
    reported,
    stock_model,
)
from lora_models import (
    accelerated_copy,
    assert_equal_runs,
    compare,
    counted,
    lora_config,
    quietly,
    run,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import lora_fast
from bench.instruments.accuracy import ORDER_DIFFERENCE, assert_agree, assert_same_bits
from lora_fast.gated_mlps.fused_mlp import FusedMLP

F32 = torch.float32


def agree(fused: Any, stock: Any, x: Tensor | None = None) -> None:
    x = torch.randn(3, 5, H) if x is None else x
    compare(fused, stock, x, compute_dtype=F32, layers=3)


def test_the_class_keeps_its_name_and_is_given_back() -> None:
    stock = stock_model()
    fused = copy.deepcopy(stock)
    before = dict(mlp_of(fused).__dict__)
    lora_fast.accelerate(fused)
    mlp = mlp_of(fused)
    assert isinstance(mlp, FusedMLP) and isinstance(mlp, GatedMLP)
    for name in ("__name__", "__qualname__", "__module__"):
        assert getattr(type(mlp), name) == getattr(GatedMLP, name)
    assert repr(fused) == repr(stock)
    assert fused.state_dict().keys() == stock.state_dict().keys()
    lora_fast.decelerate(fused)
    assert type(mlp_of(fused)) is GatedMLP
    assert mlp_of(fused).__dict__ == before
    assert_equal_runs(run(fused, torch.ones(2, H)), run(stock, torch.ones(2, H)))


def test_idempotent_and_off() -> None:
    fused = lora_fast.accelerate(stock_model())
    fused(torch.ones(2, H))
    lora_fast.accelerate(fused)
    fused(torch.ones(2, H))
    assert counts(fused) == (2, {})
    lora_fast.accelerate(fused, fuse_mlp=False)
    assert type(mlp_of(fused)) is GatedMLP
    assert reported(fused).obstacle == "not accelerated"
    fused(torch.ones(2, H))
    assert counted(fused) == (9, {})
    with pytest.raises(TypeError, match="fuse_mlp must be a bool, got int"):
        lora_fast.accelerate(fused, fuse_mlp=1)


def test_an_adapter_that_is_added_later() -> None:
    stock = stock_model(target_modules=["q_proj"], mlp=Attention())
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        torch.manual_seed(5)
        model.add_adapter("later", lora_config(target_modules=list(NAMES)))
        model.set_adapter("later")
        model.eval()
    agree(fused, stock)
    assert counts(fused) == (1, {})


class Attention(GatedMLP):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(H, H)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replica(model: Any) -> Any:
    """As ``nn.DataParallel`` makes one of the MLP."""
    made = copy.deepcopy(model)
    old = mlp_of(made)
    new = old._replicate_for_data_parallel()
    new._modules = {name: copy.deepcopy(child) for name, child in old._modules.items()}
    with torch.no_grad():
        for parameter in old.parameters():
            parameter.fill_(torch.nan)  # the replica has its own
    parent = next(m for m in made.modules() if m._modules.get("mlp") is old)
    parent._modules["mlp"] = new
    return made


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved, replica])
def test_copies_run_fused(copied: Any) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    agree(fused, stock)
    other = copied(fused)
    agree(other, stock)
    assert counts(other) == (2, {})
    if copied not in (copy.copy, replica):
        assert counts(fused) == (1, {})
        with torch.no_grad():
            layer_of(other, "up_proj").lora_B["default"].weight.add_(1.0)
        agree(fused, stock)
        lora_fast.decelerate(other)
        assert type(mlp_of(other)) is GatedMLP


def test_a_merged_and_unloaded_model_needs_nothing_of_ours() -> None:
    fused = lora_fast.accelerate(stock_model())
    x = torch.randn(3, H)
    expected = fused(x)
    merged = quietly(fused.merge_and_unload)
    assert_agree(merged(x), expected, within=ORDER_DIFFERENCE)
    data = pickle.dumps(merged)
    assert b"lora_fast" not in data
    for copied in (pickle.loads(data), copy.deepcopy(merged)):
        assert type(mlp_of(copied)) is GatedMLP
        assert torch.equal(copied(x), merged(x))


def _in_child(data: bytes, results: Any) -> None:
    model = pickle.loads(data)
    y = model(torch.ones(2, H))
    results.put((y.detach().tolist(), counts(model)))


def test_a_spawned_copy_runs_fused() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    fused = lora_fast.accelerate(stock_model())
    process = context.Process(target=_in_child, args=(pickle.dumps(fused), results))
    process.start()
    y, found = results.get(timeout=120)
    process.join()
    assert found == (1, {})
    assert_same_bits(torch.tensor(y), fused(torch.ones(2, H)).detach(), name="y")


def hooked(name: str, register: str, hook: Any) -> Any:
    return lambda model: getattr(layer_of(model, name), register)(hook)


def set_hook_of_activation(model: Any) -> None:
    mlp_of(model).act_fn.register_forward_hook(lambda module, args, y: y * 2)


def replace_layer_forward(model: Any) -> None:
    layer = layer_of(model, "gate_proj")
    forward = type(layer).forward
    layer.forward = lambda x: forward(layer, x) * 2


def compile_layer(model: Any) -> None:
    layer_of(model, "up_proj")._compiled_call_impl = partial(
        type(layer_of(model, "up_proj")).forward, layer_of(model, "up_proj")
    )


def two_adapters(model: Any) -> None:
    torch.manual_seed(5)
    model.add_adapter("other", lora_config(target_modules=r".*_proj"))
    model.base_model.set_adapter(["default", "other"])
    model.eval()


def merge_one(model: Any) -> None:
    quietly(layer_of(model, "down_proj").merge)


def change_activation(model: Any) -> None:
    mlp_of(model).act_fn = nn.Tanh()


def replace_forward_of_activation(model: Any) -> None:
    mlp_of(model).act_fn.forward = lambda x: x * 3


def tensor_scaling(model: Any) -> None:
    layer = layer_of(model, "up_proj")
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])


def nothing(model: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked("gate_proj", "register_forward_hook", lambda m, a, y: y * 2), "gate_proj: hooks"),
        (
            hooked("up_proj", "register_forward_pre_hook", lambda m, a: (a[0] * 2,)),
            "up_proj: hooks",
        ),
        (hooked("down_proj", "register_forward_hook", lambda m, a, y: y * 2), "down_proj: hooks"),
        (
            hooked("down_proj", "register_full_backward_hook", lambda m, i, o: (i[0] * 2,)),
            "down_proj: hooks",
        ),
        (set_hook_of_activation, "hooks on SiLU"),
        (replace_layer_forward, "gate_proj: forward replaced"),
        (compile_layer, "up_proj: compiled by itself"),
        (merge_one, "down_proj: merged"),
        (change_activation, "calls tanh"),
        (replace_forward_of_activation, "multiplies by a value"),
        (lambda model: model.base_model.disable_adapter_layers(), "gate_proj: adapters disabled"),
        (lambda model: quietly(model.merge_adapter), "gate_proj: merged"),
        (two_adapters, None),
        (tensor_scaling, None),
        (nothing, None),
    ],
)
def test_what_is_done_later(change: Any, reason: str | None) -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    fused(torch.ones(2, H))
    for model in (fused, stock):
        change(model)
    ours, theirs = (run(model, torch.linspace(-1, 1, 3 * H).view(3, H)) for model in (fused, stock))
    for name, expected in theirs.items():
        if expected is None:  # merged
            assert ours[name] is None
            continue
        assert_agree(ours[name], expected, within=ORDER_DIFFERENCE, name=name)
    called, others = counts(fused)
    if reason is None:
        assert (called, others) == (2, {})
        assert reported(fused).fused
    else:
        ((found, number),) = others.items()
        assert reason in found
        assert (called, number) == (1, 1)
        assert reason in str(reported(fused).obstacle)


def test_a_forward_that_is_replaced_is_theirs() -> None:
    fused = lora_fast.accelerate(stock_model())
    mlp = mlp_of(fused)
    mlp.forward = MethodType(lambda self, x: x * 7, mlp)
    assert torch.equal(fused(torch.ones(2, H)), torch.full((2, H), 7.0))
    assert reported(fused).obstacle == "forward of the module replaced"
    theirs = mlp.forward
    lora_fast.decelerate(fused)
    assert mlp.forward is theirs


def test_a_forward_of_the_class_that_is_replaced_is_theirs() -> None:
    class Own(GatedMLP):
        pass

    fused = lora_fast.accelerate(stock_model(mlp=Own()))
    Own.forward = lambda self, x: x * 7  # type: ignore[method-assign]
    assert torch.equal(fused(torch.ones(2, H)), torch.full((2, H), 7.0))
    assert counts(fused)[0] == 0


def test_hooks_of_the_mlp_run() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        mlp_of(model).register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        mlp_of(model).register_forward_hook(lambda module, args, y: y * 3)
        mlp_of(model).register_full_backward_hook(lambda module, dx, dy: (dx[0] * 5,))
    agree(fused, stock)
    assert counts(fused) == (1, {})


def test_another_number_of_arguments_is_for_its_own_forward() -> None:
    fused = lora_fast.accelerate(stock_model())
    y = mlp_of(fused)(x=torch.ones(2, H))
    assert counts(fused) == (0, {"extra arguments": 1})
    assert_agree(mlp_of(fused)(torch.ones(2, H)), y, within=ORDER_DIFFERENCE)
    with pytest.raises(TypeError):
        mlp_of(fused)()


def test_a_mixed_batch() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        torch.manual_seed(5)
        model.add_adapter("other", lora_config(target_modules=r".*_proj"))
        model.eval()
    x = torch.randn(2, 3, H)
    names = ["default", "other"]
    assert_agree(
        fused(x, adapter_names=names), stock(x, adapter_names=names), within=ORDER_DIFFERENCE
    )
    assert counts(fused) == (0, {"gate_proj: hooks": 1})
    assert counted(fused) == (3, {})


def test_an_adapter_is_switched_and_reinitialised() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    for model in (stock, fused):
        torch.manual_seed(5)
        model.add_adapter("other", lora_config(r=3, target_modules=list(NAMES[:2])))
        model.set_adapter("other")
        model.eval()
    agree(fused, stock)
    for model in (stock, fused):
        model.set_adapter("default")
        model.delete_adapter("other")
    agree(fused, stock)
    for model in (stock, fused):
        mlp_of(model)._modules["up_proj"].lora_A["default"] = nn.Linear(H, 5, bias=False)
        torch.manual_seed(9)
        nn.init.normal_(layer_of(model, "up_proj").lora_A["default"].weight)
    agree(fused, stock)
    assert counts(fused) == (3, {})


def test_gate_and_up_are_one_layer_twice() -> None:
    stock = stock_model()
    mlp_of(stock).up_proj = mlp_of(stock).gate_proj
    fused = accelerated_copy(stock)
    assert layer_of(fused, "up_proj") is layer_of(fused, "gate_proj")
    agree(fused, stock)
    assert counts(fused) == (1, {})


def test_a_parameter_is_written_through_data() -> None:
    stock = stock_model()
    fused = accelerated_copy(stock)
    agree(fused, stock)
    for model in (stock, fused):
        layer = layer_of(model, "up_proj")
        layer.base_layer.weight.data.mul_(2.0)
        layer.lora_B["default"].weight.data = torch.ones_like(layer.lora_B["default"].weight)
    agree(fused, stock)
    assert counts(fused) == (2, {})


def test_the_model_is_cast() -> None:
    stock = stock_model().bfloat16()
    fused = accelerated_copy(stock)
    fused(torch.ones(2, H, dtype=torch.bfloat16))
    agree(fused.float(), stock.float())
    assert counts(fused) == (2, {})
    fused.double()(torch.ones(2, H, dtype=torch.float64))
    assert counts(fused)[0] == 2


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
