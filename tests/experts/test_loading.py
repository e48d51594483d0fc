"""Experts quantised while a model is loaded, and a quantised model that is loaded again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from expert_models import expert_base
from model_families import EXPERTS_ARE_PARAMETERS, inputs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_fast
from bench.instruments.accuracy import assert_same_bits
from lora_fast.experts.loading import JoinedByExpert
from lora_fast.experts.quantisation import expert_modules, expert_parameters

pytestmark = pytest.mark.skipif(not EXPERTS_ARE_PARAMETERS, reason="experts are modules")
LAYERS = 6


def _loaded(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large experts in small layers."""
    base = expert_base("qwen3_moe", num_hidden_layers=LAYERS, moe_intermediate_size=128)
    made = tmp_path_factory.mktemp("models") / "mixture"
    base.to(torch.bfloat16).save_pretrained(made)
    return made


class LiveBytes(TorchDispatchMode):
    """The most bytes of all storages that operations have read or written so far and that live."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._live = 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                storage = leaf.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._live.values()))
        return result


def _layer_bytes(model: nn.Module) -> int:
    """The experts of a layer in 16 bits, whatever they are in."""
    _, module = next(expert_modules(model))
    weights: list[Any] = [module.gate_up_proj, module.down_proj]
    return sum(2 * weight.numel() for weight in weights)


@pytest.mark.parametrize("linears", [False, True])
def test_is_the_model_that_is_quantised_after_loading(folder: Path, linears: bool) -> None:
    options: dict[str, Any] = {}
    if linears:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        )
    with lora_fast.quantize_experts_on_load():
        model = _loaded(folder, **options)
    after = lora_fast.quantize_experts(_loaded(folder, **options))
    expected, found = after.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(found[key], value, name=key)
    if not linears:  # bitsandbytes' own layers take no matrices as small as these on every CPU
        with torch.no_grad():
            assert_same_bits(model(**inputs()).logits, after(**inputs()).logits, name="logits")
    assert not any(map(expert_parameters, (m for _, m in expert_modules(model))))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_peak_memory_above_the_quantised_model(family: str, folder: Path, tmp_path: Path) -> None:
    """A layer's experts, where the checkpoint holds each expert apart, too; that transformers
    stacks them and then joins gate and up made it half as much again."""
    if family == "gpt_oss":
        folder = tmp_path
        kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
        sizes = {"num_hidden_layers": LAYERS, "intermediate_size": 128}
        base = expert_base(family, **sizes, layer_types=kinds)
        base.to(torch.bfloat16).save_pretrained(folder)
    peaks = {}
    for name, context in {"while": lora_fast.quantize_experts_on_load, "after": _nothing}.items():
        with LiveBytes() as live:
            with context():
                model = _loaded(folder)
            layer = _layer_bytes(model)
            lora_fast.quantize_experts(model)
        peaks[name] = live.most
        final = sum(t.nbytes for t in model.state_dict().values())
        del model
    assert peaks["while"] <= final + layer
    assert peaks["after"] > final + 2 * layer


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# Two parts of an expert by other names, one part alone, and what is stored as a parameter.
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "nemotron_h", "granitemoe"])
def test_experts_of_other_checkpoints_are_loaded_alike(family: str, tmp_path: Path) -> None:
    expert_base(family).to(torch.bfloat16).save_pretrained(tmp_path)
    with lora_fast.quantize_experts_on_load():
        model = _loaded(tmp_path)
    found = model.state_dict()
    expected = lora_fast.quantize_experts(_loaded(tmp_path)).state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_same_bits(found[key], value, name=key)


@pytest.mark.parametrize(
    ("sources", "shape"),
    [(["gate", "up"], (3, 4)), (["down"], (3, 4)), (["bias"], (3,)), (["scale"], ())],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_experts_are_joined_as_transformers_joins_them(
    sources: list[str], shape: tuple[int, ...]
) -> None:
    from transformers.core_model_loading import Concatenate, MergeModulelist

    tensors = {name: [torch.randn(shape) for _ in range(5)] for name in sources}
    expected: Any = dict(tensors)
    for operation in [MergeModulelist(dim=0), Concatenate(dim=1)][: len(sources)]:
        expected = operation.convert(expected, sources, ["experts"])
    reads = {name: [lambda t=t: t for t in each] for name, each in tensors.items()}
    found = JoinedByExpert().convert(reads, sources, ["experts"])
    assert found.keys() == expected.keys() and not reads
    assert_same_bits(found["experts"], expected["experts"], name="experts")


@pytest.mark.parametrize("odd", [(2, 4), (4, 4), (3, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("sources", [["gate", "up"], ["down"]], ids=len)
def test_experts_of_several_shapes_are_refused(sources: list[str], odd: tuple[int, int]) -> None:
    """None may be broadcast, or end where another begins."""
    reads = {name: [lambda: torch.zeros(3, 4) for _ in range(5)] for name in sources}
    reads[sources[0]][2] = lambda: torch.zeros(odd)
    with pytest.raises(ValueError, match=r"experts must have parts of one shape, got .* expert 2"):
        JoinedByExpert().convert(reads, sources, ["experts"])


def test_nothing_of_transformers_stays_changed(folder: Path) -> None:
    from transformers.core_model_loading import WeightConverter

    before = WeightConverter.materialize_tensors
    with lora_fast.quantize_experts_on_load():
        assert WeightConverter.materialize_tensors is not before
        saved = _loaded(folder)
    assert WeightConverter.materialize_tensors is before
    # Its converters still split experts when a model is saved.
    operations = [type(op).__name__ for c in saved._weight_conversions for op in c.operations]
    assert "MergeModulelist" in operations


def test_transformers_does_not_read_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads would read tensors into memory faster than they are quantised."""

    class NoThreads:
        def __init__(self, **_: Any) -> None:
            raise AssertionError("transformers loads in threads")

    monkeypatch.setattr("transformers.core_model_loading.ThreadPoolExecutor", NoThreads)
    with pytest.raises(AssertionError, match="loads in threads"):
        _loaded(folder)
    with lora_fast.quantize_experts_on_load():
        _loaded(folder)


def test_a_saved_model_is_loaded_without_its_dense_weights(folder: Path, tmp_path: Path) -> None:
    with lora_fast.quantize_experts_on_load():
        saved = _loaded(folder)
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(saved.config, dtype=torch.bfloat16)
    lora_fast.quantize_experts(model)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert not any(p.is_meta for p in model.parameters())
    with torch.no_grad():
        logits = model.eval()(**inputs()).logits
        assert_same_bits(logits, saved(**inputs()).logits, name="logits")


def test_what_is_refused(folder: Path) -> None:
    with (
        pytest.raises(ValueError, match="must load a model whose experts"),
        lora_fast.quantize_experts_on_load(),
    ):
        nn.Linear(2, 2)
    with (
        pytest.raises(ValueError, match="blocksize must be one of"),
        lora_fast.quantize_experts_on_load(blocksize=48),
    ):
        pass
    with pytest.raises(ValueError, match=r"MoeExperts\.\w+ must have a multiple of blocksize"):
        expert_base("qwen3_moe").save_pretrained(folder.parent / "small")
        with lora_fast.quantize_experts_on_load(blocksize=4096):
            _loaded(folder.parent / "small")
    # Nothing of it is left behind.
    made = expert_base("qwen3_moe")
    assert any(map(expert_parameters, (m for _, m in expert_modules(made))))
