"""Files that merging refuses, and what an interrupted merge leaves behind."""

from __future__ import annotations

import json
import random
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from killing import kill, moments
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_runs import run_cli, save_llama
from transformers import AutoModelForCausalLM

from lora_fast.export import merge_checkpoint

WEIGHTS = "adapter_model.safetensors"
A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base in many shards and an adapter for it."""
    folder = tmp_path_factory.mktemp("made")
    model = AutoModelForCausalLM.from_pretrained(save_llama(folder / "base"))
    shutil.copytree(folder / "base", folder / "sharded")
    (folder / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(folder / "sharded", max_shard_size="30KB")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "adapter", tmp_path / "adapter"))


def edit_tensors(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    edit(tensors)
    save_file(tensors, adapter / WEIGHTS)


def edit_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_key(key: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


def cut_off(adapter: Path) -> None:
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-64])


def pickled(adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


BAD_ADAPTERS: list[tuple[str, Callable[[Path], None], str]] = [
    ("unknown-key", lambda a: edit_tensors(a, set_key("base_model.model.nonesuch.weight", 2)),
     "tensors of this model, got base_model.model.nonesuch.weight"),
    ("missing-key", lambda a: edit_tensors(a, lambda t: t.pop(A_KEY)), f"misses {A_KEY}"),
    ("wrong-shape", lambda a: edit_tensors(a, set_key(A_KEY, 2, 63)),
     rf"{A_KEY} must have shape \(2, 64\), got \(2, 63\)"),
    ("other-rank", lambda a: edit_config(a, r=3), r"must have shape \(3, "),
    ("cut-off", cut_off, "must be a whole safetensors file"),
    ("pickle", pickled, "only safetensors are read"),
    ("no-json", lambda a: (a / "adapter_config.json").write_text("{"), "must hold JSON"),
    ("list", lambda a: (a / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
    ("unknown-type", lambda a: edit_config(a, peft_type="os.system"), "must name a peft_type"),
    ("pissa", lambda a: edit_config(a, init_lora_weights="pissa"), "to the unchanged base"),
    ("no-regex", lambda a: edit_config(a, target_modules="((("), "must fit the base model"),
    ("wrong-kind", lambda a: edit_config(a, target_modules=5), "must fit the base model"),
    ("bool-rank", lambda a: edit_config(a, r="four"), "must fit the base model"),
    ("list-rank", lambda a: edit_config(a, lora_alpha=[1]), "must fit the base model"),
    ("float8", lambda a: edit_tensors(a, lambda t: t.update(
        {A_KEY: t[A_KEY].to(torch.float8_e4m3fn)})), f"{A_KEY} must be floating point of 16 bits"),
    ("integers", lambda a: edit_tensors(a, lambda t: t.update({A_KEY: t[A_KEY].long()})),
     f"{A_KEY} must be floating point of 16 bits or more, got int64"),
    ("other-model", lambda a: edit_config(a, target_modules=["nonesuch"]), "must fit the base"),
    ("nan", lambda a: edit_tensors(a, lambda t: t[A_KEY].fill_(float("nan"))), "must be finite"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "message"), [c[1:] for c in BAD_ADAPTERS], ids=[c[0] for c in BAD_ADAPTERS]
)
def test_adapters_that_do_not_fit_are_refused(
    spoil: Callable[[Path], None], message: str, made: Path, adapter: Path, tmp_path: Path
) -> None:
    spoil(adapter)
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(str(made / "base"), adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_no_config_string_reaches_an_import(
    made: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    edit_config(adapter, megatron_core="planted_module", megatron_config={"a": 1})
    with pytest.raises(ValueError, match="megatron_config"):
        merge_checkpoint(str(made / "base"), adapter, tmp_path / "out")
    edit_config(adapter, megatron_config=None, auto_mapping={
        "base_model_class": "Evil", "parent_library": "planted_module"})  # fmt: skip
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "planted_module.Evil"}
    (base / "config.json").write_text(json.dumps(config))
    shutil.copy(tmp_path / "planted_module.py", base)
    merge_checkpoint(str(base), adapter, tmp_path / "out")
    config["architectures"] = ["planted_module.Evil"]
    (base / "config.json").write_text(json.dumps(config))
    merge_checkpoint(str(base), adapter, tmp_path / "out2")


@pytest.mark.parametrize("replication", [[[0, 9]], [[0, 2], [0, 2]]])
def test_a_deeper_model_is_refused(
    replication: list[list[int]], made: Path, adapter: Path, tmp_path: Path
) -> None:
    edit_config(adapter, layer_replication=replication)
    with pytest.raises(NotImplementedError, match="layer_replication, which makes a deeper model"):
        merge_checkpoint(str(made / "base"), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


DTYPES = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.int8, torch.bool, torch.complex64]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_are_no_numbers_are_refused_and_what_is_no_weight_is_left_out(
    dtype: torch.dtype, made: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "extra": torch.zeros(2).to(dtype)}, base / "model.safetensors")
    notes: list[str] = []
    out = merge_checkpoint(str(base), made / "adapter", tmp_path / "out", note=notes.append)
    assert "are not those that the adapter was trained on" in notes[0]
    assert notes[1:] == ["left out, since the model has no such tensors: extra"]
    assert "extra" not in load_file(out / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    save_file({**weights, name: weights[name].to(dtype)}, base / "model.safetensors")
    with pytest.raises(ValueError, match=rf"or 4-bit, got {name} in {str(dtype)[6:]}: merge into"):
        merge_checkpoint(str(base), made / "adapter", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_a_type_that_torch_does_not_have_is_named(made: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    header = {"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        merge_checkpoint(str(base), made / "adapter", tmp_path / "out")


def index_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/passwd", "absent.safetensors"])
def test_indices_that_lead_elsewhere_are_refused(name: str, made: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(made / "sharded", tmp_path / "sharded"))
    shutil.copytree(made / "base", tmp_path / "base")
    index = index_of(base)
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must lie inside|must hold absent"):
        merge_checkpoint(str(base), made / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes-8bit"])
def test_bases_that_cannot_be_decoded_are_refused(method: str, made: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    options = {"quant_method": "gptq", "bits": 4}
    if method != "gptq":
        options = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = {**json.loads((base / "config.json").read_text()), "quantization_config": options}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="merge into the 16-bit model"):
        merge_checkpoint(str(base), made / "adapter", tmp_path / "out")


def test_one_shard_is_in_memory_at_a_time(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merge_checkpoint(str(made / "base"), made / "adapter", tmp_path / "whole")
    limit, earlier = 40_000, []
    write = safetensors.torch.save_file

    def watched(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        assert not any(reference() is not None for reference in earlier), "an earlier shard lives"
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        earlier.extend(weakref.ref(tensor.untyped_storage()) for tensor in tensors.values())
        write(tensors, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", watched)
    told = []
    out = merge_checkpoint(
        str(made / "sharded"), made / "adapter", tmp_path / "out", max_shard_size=limit,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    index = index_of(out)
    files = set(index["weight_map"].values())
    assert len(files) > 5 and files <= {path.name for path in out.iterdir()}
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    assert index["metadata"]["total_size"] == told[-1][1]
    expected = load_file(whole / "model.safetensors")
    found = {k: v for name in files for k, v in load_file(out / name).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    AutoModelForCausalLM.from_pretrained(out)


KILLS, SEED = 3, 20


def merge_in_shards(made: Path, out: Path, tick: Callable[[], None] = lambda: None) -> None:
    merge_checkpoint(
        str(made / "sharded"), made / "adapter", out, max_shard_size=20_000, overwrite=True,
        progress=lambda done, total: tick(),
    )  # fmt: skip


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("before", ["nothing", "a model"])
def test_a_merge_killed_at_random_points_leaves_no_half_model(
    before: str, made: Path, tmp_path: Path
) -> None:
    """As many moments while tensors are written as while the result is published."""

    def begin(name: str) -> Path:
        out = tmp_path / name / "out"
        if before == "a model":
            shutil.copytree(made / "base", out)
        return out

    rehearsal = begin("rehearsal")
    passed = moments(lambda tick: merge_in_shards(made, rehearsal, tick), tmp_path)
    expected = listing(rehearsal)
    old = listing(made / "base") if before == "a model" else None
    written = len(passed) - passed[::-1].index("tick")
    draw = random.Random(SEED)
    points = draw.sample(range(written), KILLS) + draw.sample(range(written, len(passed)), KILLS)
    for point in points:
        drawn = f"killed at moment {point} of {len(passed)}, drawn with seed {SEED}"
        out = begin(str(point))
        kill(lambda tick, out=out: merge_in_shards(made, out, tick), tmp_path, point)
        left = listing(out) if out.exists() else None
        assert left in (old, expected), drawn
        assert point >= written or left == old, drawn
        merge_in_shards(made, out)
        assert listing(out) == expected, drawn
        assert [path.name for path in out.parent.iterdir()] == ["out"], drawn


def test_what_is_there_is_replaced_only_when_asked_and_only_a_model(
    made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="out must be"):
        merge_checkpoint(str(made / "base"), made / "adapter", out)
    with pytest.raises(ValueError, match=r"nothing but a model, got .*out with mine\.txt"):
        merge_checkpoint(str(made / "base"), made / "adapter", out, overwrite=True)
    assert listing(out) == {"mine.txt": b"keep"}
    model = Path(shutil.copytree(made / "sharded", tmp_path / "model"))
    merge_checkpoint(str(made / "base"), made / "adapter", model, overwrite=True)
    assert (model / "model.safetensors").exists()
    assert not (model / "model.safetensors.index.json").exists()


def tree(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_merge_never_touches_what_it_reads(
    overwrite: bool, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "base", tmp_path / "proj" / "base")
    shutil.copytree(made / "adapter", tmp_path / "proj" / "ad")
    (tmp_path / "link").symlink_to(tmp_path / "proj" / "base")
    before = tree(tmp_path)
    base, adapter = tmp_path / "proj" / "base", tmp_path / "proj" / "ad"
    for out, how in {
        "proj": "base, got .*, which contains",
        "proj/base": "base, got .*, which is",
        "proj/base/": "base, got .*, which is",
        "proj/ad": "adapter, got .*, which is",
        "link": "base, got .*, which is",
        "proj/base/merged": "base, got .*, which lies in",
        "proj/ad/a/b": "adapter, got .*, which lies in",
        "link/merged": "base, got .*, which lies in",
        "proj/ad/../base": "base, got .*, which is",
        ".": "base, got .*, which contains",
    }.items():
        with pytest.raises(ValueError, match=f"out must be apart from {how} .*: choose another"):
            merge_checkpoint(str(base), adapter, tmp_path / out, overwrite=overwrite)
        assert tree(tmp_path) == before, out
    with pytest.raises(ValueError, match="out must be apart from base"):
        merge_checkpoint(str(tmp_path / "link"), adapter, base, overwrite=overwrite)
    arguments = ["merge", base, adapter, tmp_path / "proj", *["--overwrite"][:overwrite]]
    assert run_cli(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out must be apart from base") and error.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("size", ["big", "0", "-5GB", "5XB", "", "0.0000000001GB", 0, -1])
def test_sizes_of_shards_are_sizes(size: str | int, made: Path, tmp_path: Path) -> None:
    message = f"max_shard_size must be a size such as 5GB, got {re.escape(repr(size))}$"
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(str(made / "base"), "absent", tmp_path / "out", max_shard_size=size)


def test_shards_may_be_given_in_any_unit(made: Path, tmp_path: Path) -> None:
    for size in ("30KB", "30kib", 30_000):
        out = tmp_path / str(size)
        merge_checkpoint(str(made / "base"), made / "adapter", out, max_shard_size=size)
        sizes = [len(file) for name, file in listing(out).items() if name.startswith("model-")]
        assert len(sizes) > 5


def test_the_command_merges_and_says_what_is_wrong_in_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("merge", made / "base", made / "adapter", tmp_path / "out", "--dtype", "bfloat16")
    assert run_cli(*arguments) == 0
    size = round((tmp_path / "out" / "model.safetensors").stat().st_size / 1e3)
    said = capsys.readouterr().out
    assert re.fullmatch(rf"✓ {tmp_path}/out {size} kB in 1 shard, .+ s\n", said), said
    assert run_cli(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out must be") and "--overwrite" in error
    assert error.count("\n") == 1
    assert run_cli("merge", made / "adapter", made / "adapter", tmp_path / "o") == 2
    assert capsys.readouterr().err.count("\n") == 1
    small = ("merge", made / "base", made / "adapter", tmp_path / "small", "--max-shard-size")
    assert run_cli(*small, "5GiBs") == 2
    assert capsys.readouterr().err == (
        "error: max_shard_size must be a size such as 5GB, got '5GiBs'\n"
    )
    assert run_cli(*small, "100KB") == 0
    shards = len(list((tmp_path / "small").glob("model-*.safetensors")))
    assert shards > 1 and f" in {shards} shards, " in capsys.readouterr().out
