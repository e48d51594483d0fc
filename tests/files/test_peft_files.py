"""save_adapter and load_adapter: stock PEFT reads our files, and we read its files."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lora_models import K, Mlp, float64_copy, method_model, quantised
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_fast
from bench.instruments.accuracy import assert_accurate, assert_same_bits, orders
from lora_fast import DoRALinear, LoRALinear, VeRALinear, load_adapter, save_adapter
from lora_fast.four_bit.layout import forbid_packing

METHODS = ("lora", "dora", "vera")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 5, "lora_alpha": 8},
    "dora": {"r": 5, "lora_alpha": 8},
    "vera": {"r": 37},
}


class Blocks(nn.Module):
    """Names that end alike, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(K, K)
        self.block = nn.ModuleDict({"fc1": nn.Linear(K, K), "fc2": nn.Linear(K, K)})
        self.norm = nn.LayerNorm(K)
        self.head = nn.Linear(K, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.fc1, self.block.fc1, self.block.fc2):
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


def base(kind: type[nn.Module] = Mlp) -> Any:
    """The same weights every time."""
    torch.manual_seed(3)
    return kind()


def moved(model: Any) -> Any:
    """Every number that trains off its start."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def converted(method: str, **arguments: Any) -> Any:
    return lora_fast.convert(
        base(), "all-linear", method=method, **{**ARGUMENTS[method], **arguments}
    )


def assert_computes_as(model: Any, stock: Any) -> None:
    """The outputs of `model` obey the accuracy rule, `stock` being PEFT's."""
    x = torch.randn(9, K)
    forbid_packing(stock)
    wide = float64_copy(stock).eval()
    with torch.no_grad():
        eager = orders(lambda: stock.eval()(x))
        assert_accurate(model.eval()(x), wide(x.double()), eager, name="y")


@pytest.mark.usefixtures("cpu_kind")
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_what_we_save(method: str, kind: str, tmp_path: Path) -> None:
    model = moved(converted(method, quantize="nf4" if kind == "nf4" else None))
    assert save_adapter(model, tmp_path / "adapter") == tmp_path / "adapter"
    plain = quantised(base()) if kind == "nf4" else base()
    assert_computes_as(model, PeftModel.from_pretrained(plain, tmp_path / "adapter"))


@pytest.mark.parametrize("method", METHODS)
def test_we_load_what_peft_saves(method: str, tmp_path: Path) -> None:
    stock = method_model(method, model=base())
    stock.save_pretrained(tmp_path / "peft")
    # Another key draws other projections: those of the file must take their place.
    model = converted(method, **({"projection_prng_key": 7} if method == "vera" else {}))
    assert load_adapter(model, tmp_path / "peft") is model
    assert_computes_as(model, stock)
    save_adapter(model, tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {WEIGHTS, CONFIG}
    written, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "peft"))
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(written[key], value, name=key)


def test_the_projections_of_a_file_without_them_are_drawn(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not save vera_A"):
        config = VeraConfig(
            r=37, target_modules=["fc1", "fc2"], save_projection=False, projection_prng_key=5
        )
    stock = moved(get_peft_model(base(), config))
    stock.save_pretrained(tmp_path)
    assert not any(key.endswith("vera_A") for key in load_file(tmp_path / WEIGHTS))
    with pytest.warns(UserWarning, match="not save vera_A"):
        assert_computes_as(load_adapter(converted("vera"), tmp_path), stock)


def ranked(model: Any, *, use_rslora: bool = False) -> Any:
    """Ranks and alphas of their own for names that end alike."""
    for owner, name, r, lora_alpha in (
        (model, "fc1", 2, 6.5), (model.block, "fc1", 3, 6), (model.block, "fc2", 3, 5),
    ):  # fmt: skip
        layer = LoRALinear.from_linear(
            getattr(owner, name), r=r, lora_alpha=lora_alpha, use_rslora=use_rslora
        )
        setattr(owner, name, layer) if owner is model else owner.update({name: layer})
    for name in ("norm", "head"):
        getattr(model, name).requires_grad_(False)
    return model


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_alphas_of_each_layer(use_rslora: bool, tmp_path: Path) -> None:
    model = moved(ranked(base(Blocks), use_rslora=use_rslora))
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert (config["r"], config["rank_pattern"]) == (3, {"^fc1": 2})
    assert sorted(config["target_modules"]) == ["fc1", "fc2"]
    stock = PeftModel.from_pretrained(base(Blocks), tmp_path / "adapter")
    assert_computes_as(model, stock)
    again = load_adapter(ranked(base(Blocks), use_rslora=use_rslora), tmp_path / "adapter")
    assert_computes_as(again, stock)


def test_names_that_end_as_others_do(tmp_path: Path) -> None:
    model = moved(lora_fast.convert(base(Blocks), r"block\.fc1|block\.fc2", r=2))
    save_adapter(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(base(Blocks), tmp_path / "adapter")
    assert not hasattr(stock.base_model.model.fc1, "lora_A")
    assert_computes_as(model, stock)


def test_modules_that_train_as_a_whole_go_along(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"r": 2, "lora_alpha": 4, "modules_to_save": ["head", "norm"]}
    model = moved(lora_fast.convert(base(Blocks), ["fc1", "fc2"], **arguments))
    save_adapter(model, tmp_path / "ours")
    stock = PeftModel.from_pretrained(base(Blocks), tmp_path / "ours", is_trainable=True)
    assert_computes_as(model, stock)
    moved(stock).save_pretrained(tmp_path / "peft")
    fresh = lora_fast.convert(base(Blocks), ["fc1", "fc2"], **arguments)
    assert_computes_as(load_adapter(fresh, tmp_path / "peft"), stock)


def test_the_base_that_it_is_for_and_wrappers_around_the_model(tmp_path: Path) -> None:
    model = converted("lora")
    model.name_or_path = "a/model"
    save_adapter(torch.compile(model), tmp_path / "own", base_model_name_or_path=None)
    save_adapter(model, tmp_path / "given", base_model_name_or_path="another")
    found = [json.loads((tmp_path / n / CONFIG).read_text()) for n in ("own", "given")]
    assert [f["base_model_name_or_path"] for f in found] == ["a/model", "another"]
    assert all(f["inference_mode"] for f in found)
    load_adapter(torch.compile(moved(model)), tmp_path / "own")
    assert not model.fc1.lora_B.any()


def test_values_take_the_dtype_of_the_model(tmp_path: Path) -> None:
    model = moved(converted("dora", dtype=torch.bfloat16))
    save_adapter(model, tmp_path / "adapter")
    wide = load_adapter(converted("dora"), tmp_path / "adapter")
    assert wide.fc1.lora_B.dtype == torch.float32
    assert torch.equal(wide.fc1.lora_B, model.fc1.lora_B.float())


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one: parameters are sharded, each shard being whole."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_sharded_parameters_are_gathered(
    one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moved(converted("dora"))
    save_adapter(model, tmp_path / "dense")
    sharded = fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (1,)))
    sharded(torch.randn(2, K))
    assert type(sharded.fc1.lora_A) is nn.Parameter, "the outermost group stays whole"
    save_adapter(sharded, tmp_path / "gathered")
    written, expected = (load_file(tmp_path / n / WEIGHTS) for n in ("gathered", "dense"))
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(written[key], value, name=key)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    save_adapter(sharded, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    with pytest.raises(NotImplementedError, match=r"lora_A\.weight is DTensor"):
        load_adapter(sharded, tmp_path / "dense")


def test_a_model_under_ddp(one_process: None, tmp_path: Path) -> None:
    model = moved(converted("lora"))
    wrapped = nn.parallel.DistributedDataParallel(model)
    save_adapter(wrapped, tmp_path / "adapter")
    assert "base_model.model.fc1.lora_A.weight" in load_file(tmp_path / "adapter" / WEIGHTS)
    before = model.fc2.lora_B.detach().clone()
    nn.init.zeros_(model.fc2.lora_B)
    assert load_adapter(wrapped, tmp_path / "adapter") is wrapped
    assert torch.equal(model.fc2.lora_B, before)


def change(folder: Path, **options: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **options}))


def rewrite(folder: Path, key: str, value: Tensor | None) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(key, None)
    save_file(tensors if value is None else {**tensors, key: value}, folder / WEIGHTS)


A1, B2 = (f"base_model.model.{name}.weight" for name in ("fc1.lora_A", "fc2.lora_B"))
BAD_FILES: list[tuple[Any, type[Exception], str]] = [
    (lambda f: rewrite(f, B2, None), ValueError, f"misses {B2}$"),
    (lambda f: rewrite(f, "base_model.model.fc3.lora_A.weight", torch.ones(2)), ValueError,
     r"alone, got base_model\.model\.fc3\.lora_A\.weight$"),
    (lambda f: rewrite(f, A1, torch.ones(4, K)), ValueError, r"lora_A.weight must have shape \(5,"),
    (lambda f: rewrite(f, A1, torch.ones(5, K).int()), ValueError, "must be torch.float32 or like"),
    (lambda f: change(f, lora_alpha=16), ValueError, "fc1 must have the model's .* 1.6, got 3"),
    (lambda f: change(f, alpha_pattern={"fc2": 4}), ValueError, "fc2 must .*1.6, got 0.8"),
    (lambda f: change(f, use_rslora=True), ValueError, "use_rslora True"),
    (lambda f: change(f, rank_pattern={"(": 4}), ValueError, "must have ranks and alphas of PEFT"),
    (lambda f: change(f, alora_invocation_tokens=[1]), NotImplementedError, "alora_invocation"),
    (lambda f: change(f, lora_bias=True), NotImplementedError, "lora_bias must be False"),
    (lambda f: change(f, init_lora_weights="pissa"), ValueError, "belong to the unchanged base"),
    (lambda f: (f / WEIGHTS).write_bytes(b"no tensors"), ValueError, "whole safetensors file"),
    (lambda f: (f / CONFIG).unlink(), ValueError, "must hold adapter_config.json"),
    (lambda f: (f / WEIGHTS).unlink(), ValueError, "must hold adapter_model.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "error", "message"), BAD_FILES)
def test_files_that_do_not_fit_change_nothing(
    damage: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    save_adapter(moved(converted("lora")), tmp_path / "adapter")
    damage(tmp_path / "adapter")
    model = converted("lora")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path / "adapter")
    for key, value in model.state_dict().items():
        assert_same_bits(value, before[key], name=key)


@pytest.mark.parametrize(
    ("saved", "method", "message"),
    [
        ("vera", "lora", "must hold a LORA adapter, got VERA"),
        ("lora", "dora", "misses .*fc1.lora_magnitude_vector, .*fc2.lora_magnitude_vector$"),
        ("dora", "lora", "alone, got .*fc1.lora_magnitude_vector"),
    ],
)
def test_another_method_is_refused(saved: str, method: str, message: str, tmp_path: Path) -> None:
    save_adapter(converted(saved), tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        load_adapter(converted(method), tmp_path / "adapter")


def test_a_merged_model_is_saved_and_not_loaded_into(tmp_path: Path) -> None:
    model = moved(converted("dora"))
    save_adapter(model, tmp_path / "before")
    model.fc2.merge()
    save_adapter(model, tmp_path / "after")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("before", "after"))
    for key, value in before.items():
        assert_same_bits(after[key], value, name=key)
    with pytest.raises(ValueError, match="must be unmerged, got a merged layer at 'fc2'"):
        load_adapter(model, tmp_path / "before")


def two_methods() -> Any:
    model = converted("lora")
    model.fc2 = DoRALinear.from_linear(model.fc2.base_layer, r=5, lora_alpha=8)
    return model


def two_projections() -> Any:
    model = base()
    model.fc1, model.fc2 = (VeRALinear.from_linear(x, r=4) for x in (model.fc1, model.fc2))
    return model


def changed(attribute: str, value: Any) -> Any:
    model = converted("lora")
    setattr(model.fc2, attribute, value)
    return model


def shared() -> Any:
    model = base(Blocks)
    model.block["fc2"] = model.fc1
    return lora_fast.convert(model, ["fc1", "fc2"])


def training(*names: str) -> Any:
    model = lora_fast.convert(base(Blocks), ["fc1"])
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return model


def tied() -> Any:
    model = base(Blocks)
    model.tied = nn.Linear(K, 3, bias=False)
    model.tied.weight = model.head.weight
    return lora_fast.convert(model, ["fc1"], modules_to_save=["tied"])


def ends_alike() -> Any:
    model = base(Blocks)
    model.ahead = nn.Linear(2, 2)
    return lora_fast.convert(model, ["fc1"], modules_to_save=["head"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_methods, "one method for all layers, got DoRALinear, LoRALinear"),
        (two_projections, "projections that all layers share, got 2"),
        (lambda: changed("lora_dropout", 0.5), r"one lora_dropout .* got \[0.0, 0.5\]"),
        (lambda: changed("scaling", 0.3), "scaling α/R, or α/√R, for all layers, got 0.3, 1.6"),
        (shared, "one name for an adapted layer, got 'fc1' and 'block.fc2'"),
        (lambda: training("head.bias"), "as a whole, got 'head' of which a part"),
        (lambda: training("fc1.base_layer.bias"), "below an adapter, got 'fc1.base_layer.bias'"),
        (tied, "one name for a trained weight, got 'head.weight' and 'tied.weight'"),
        (ends_alike, r"those of \['ahead'\], too"),
        (lambda: converted("lora").to("meta"), "fc1.lora_A.weight is on the meta device"),
    ],
)
def test_what_the_format_cannot_say_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=message):
        save_adapter(make(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_other_models_are_refused(tmp_path: Path) -> None:
    stock = get_peft_model(base(), LoraConfig(target_modules=["fc1"]))
    for model, error, message in (
        (stock, ValueError, "got none; a PEFT model has save_pretrained"),
        (LoRALinear.from_linear(base().fc1), ValueError, "got one layer"),
        ({}, TypeError, "must be a torch.nn.Module, got dict"),
    ):
        for call in (save_adapter, load_adapter):
            with pytest.raises(error, match=message):
                call(model, tmp_path / "adapter")  # type: ignore[arg-type]


def test_a_folder_is_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("lora")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="folder must be new or empty"):
        save_adapter(model, tmp_path / "used")
    assert [path.name for path in tmp_path.rglob("*.*")] == ["notes.txt"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_without_peft_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (save_adapter, load_adapter):
        with pytest.raises(ImportError, match=r"needs peft, .* pip install peft"):
            call(converted("lora"), tmp_path)
