"""Everything of PEFT's LoRA that can change a result, on every path: stock's numbers, and counted.

The product of two lists: what a config or a layer can hold, and the ways in which a layer is
called. A field of LoraConfig or an attribute of LoraLayer that stands in no list fails a test: a
term that nobody decided about would be left out in silence.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import pytest
import torch
from lora_models import HAS_MICA, MICA, float64_copy, lora_layers
from peft import LoraConfig, get_peft_model
from peft.tuners import adalora, ia3, vera
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import lora_fast
from bench.instruments.accuracy import assert_all_accurate

IN, OUT, SAMPLES, TOKENS = 24, 16, 3, 30
NAMES = ["default", "other", "__base__"]


class Block(nn.Module):
    """q, k and v read the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False)
        self.v_proj, self.o_proj = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return self.o_proj(torch.tanh(q) * torch.tanh(k) + v)


class Term(NamedTuple):
    """Something that can change the result: of the config (a dict, or one for each adapter), or of
    a layer that is made. `fused` are the paths that do not fall back for it."""

    config: Any = MappingProxyType({})
    change: Callable[[Any], None] | None = None
    fused: frozenset[str] = frozenset()


PATHS = ("alone", "grouped", "stacked", "mixed", "compiled", "checkpointed")
ALL = frozenset(PATHS)
ONE_ADAPTER = ALL - {"stacked", "mixed"}


def _scaling(value: Callable[[], Any], name: str = "default") -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        layer.scaling[name] = value()

    return change


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda layer: setattr(layer, name, value)


def _bias_of_lora_A(layer: Any) -> None:
    old = layer.lora_A["default"]
    layer.lora_A["default"] = nn.Linear(old.in_features, old.out_features)
    layer.lora_A["default"].weight = old.weight


def _train_other(layer: Any) -> None:
    layer.lora_A["other"].requires_grad_()
    layer.lora_B["other"].requires_grad_()


TERMS = {
    "plain": Term(fused=ALL),
    "ranks of their own": Term(({}, {"r": 3}), fused=ALL),
    "rank_pattern": Term({"rank_pattern": {"q_proj": 2, "v_proj": 7}}, fused=ALL),
    "alpha_pattern": Term({"alpha_pattern": {"k_proj": 3, "v_proj": 11}}, fused=ALL),
    "lora_alpha": Term(({"lora_alpha": 3}, {"lora_alpha": 40}), fused=ALL),
    "use_rslora": Term(({"use_rslora": True}, {}), fused=ALL),
    "bias of all layers": Term(({"bias": "all"}, {}), fused=ALL),
    "bias of adapted layers": Term(({"bias": "lora_only"}, {}), fused=ALL),
    "lora_bias": Term({"lora_bias": True}, fused=ALL - {"mixed"}),
    "lora_bias of one": Term(({}, {"lora_bias": True}), fused=ALL - {"mixed"}),
    "lora_dropout of 1": Term({"lora_dropout": 1.0}, fused=ALL - {"stacked"}),
    "lora_dropout of one of two": Term(({}, {"lora_dropout": 1.0}), fused=ALL - {"stacked"}),
    "fan_in_fan_out": Term({"fan_in_fan_out": True}, fused=ALL),
    "fan_in_fan_out set on the layer": Term(change=_set("fan_in_fan_out", True), fused=ALL),
    "use_dora": Term({"use_dora": True}, fused=ONE_ADAPTER),
    "use_dora of the other": Term(({}, {"use_dora": True}), fused=ONE_ADAPTER),
    "use_dora, fan_in_fan_out on the layer": Term(
        {"use_dora": True}, change=_set("fan_in_fan_out", True)
    ),
    "use_bdlora": Term(
        {"r": 4, "use_bdlora": {"target_modules_bd_a": ["q_proj"], "match_strict": False}}
    ),
    "alora_invocation_tokens": Term({"alora_invocation_tokens": [1]}, fused=ALL),
    "aLoRA beside LoRA": Term(({"alora_invocation_tokens": [1]}, {"r": 3}), fused=ALL),
    "velora_config": Term({"velora_config": {"num_groups": 4}}),
    "mica": Term({**MICA, "r": 4}, fused=ALL),
    "kasa_config": Term({"kasa_config": "KasaConfig"}, fused=ALL),
    "scaling as a tensor": Term(change=_scaling(lambda: torch.tensor(0.7)), fused=ALL),
    "scaling of another as a tensor": Term(
        change=_scaling(lambda: torch.tensor([1.3]), "other"), fused=ALL
    ),
    "scaling that trains": Term(change=_scaling(lambda: nn.Parameter(torch.tensor(0.7)))),
    "scaling of 0": Term(change=_scaling(lambda: 0.0), fused=ALL),
    "scaling below 0": Term(change=_scaling(lambda: -1.5), fused=ALL),
    "set_scale": Term(change=lambda layer: layer.set_scale("default", 3.0), fused=ALL),
    "scale_layer": Term(change=lambda layer: layer.scale_layer(0.25), fused=ALL),
    "bias of lora_A": Term(change=_bias_of_lora_A),
    "input not cast": Term(change=_set("cast_input_dtype_enabled", False), fused=ALL),
    "an adapter in half of the layers": Term(
        ({}, {"target_modules": ["q_proj", "o_proj"]}), fused=ALL
    ),
    "both adapters train": Term(change=_train_other, fused=ALL),
}  # fmt: skip
# What stock PEFT refuses, too.
DORA = ("use_dora", "use_dora of the other", "use_dora, fan_in_fan_out on the layer")
REFUSED = {(name, "mixed") for name in DORA}


def _config(options: dict[str, Any]) -> LoraConfig:
    options = dict(options)
    for name in ("kasa_config", "monteclora_config"):
        if isinstance(options.get(name), str):
            options[name] = getattr(peft.tuners.lora.config, options[name])()
    defaults = {"r": 5, "lora_alpha": 8, "init_lora_weights": False,
                "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}  # fmt: skip
    return LoraConfig(**{**defaults, **options})


def _stock(term: Term) -> Any:
    """A stock model with the adapters "default" and "other"; every number of them is random."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    first, second = term.config if isinstance(term.config, tuple) else (term.config, term.config)
    for name in first.keys() | second.keys():
        if name not in fields:
            pytest.skip(f"PEFT {peft.__version__} has no {name}")
    if first == {**first, **MICA} and not HAS_MICA:
        pytest.skip(f"PEFT {peft.__version__} has no MiCA")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Block(), _config(first))
        model.add_adapter("other", _config(second))
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.is_floating_point():
            parameter.data = torch.randn_like(parameter) * 0.3
    for layer in lora_layers(model):
        if term.change is not None:
            term.change(layer)
    return model


def _prepare(model: Any, path: str) -> Any:
    model.base_model.set_adapter(["default", "other"] if path == "stacked" else ["default"])
    return model.eval() if path == "mixed" else model.train()


def _run(model: Any, path: str, x: Tensor, **arguments: Any) -> dict[str, Tensor | None]:
    """y and the gradients of x and of everything that trains."""
    x = x.detach().clone().requires_grad_()
    call = model
    if path == "mixed":
        arguments["adapter_names"] = NAMES
    if path == "compiled":
        torch._dynamo.reset()
        call = torch.compile(model, backend="aot_eager")
    if path == "checkpointed":
        with set_checkpoint_early_stop(False):
            y = checkpoint(call, x, use_reentrant=False, **arguments)
    else:
        y = call(x, **arguments)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(direction.to(y.dtype))
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for layer in lora_layers(model):
        for name, scaling in layer.scaling.items():
            if isinstance(scaling, Tensor) and scaling.requires_grad:
                trained[f"scaling of {name}"] = None if scaling.grad is None else scaling.grad.to(x)
    return {"y": y.detach(), "x": x.grad, **trained}


# Compiling takes a second: of the terms that a graph holds in the same way, one each.
COMPILED = {"plain", "lora_bias", "use_dora", "scaling as a tensor", "scaling that trains",
            "alora_invocation_tokens", "ranks of their own", "bias of lora_A"}  # fmt: skip


def _cases() -> Iterator[Any]:
    for name, path in itertools.product(TERMS, PATHS):
        rest = path == "compiled" and name not in COMPILED
        yield pytest.param(name, path, marks=[pytest.mark.exhaustive] if rest else [])


@pytest.mark.parametrize(("name", "path"), list(_cases()))
def test_every_term_on_every_path(name: str, path: str) -> None:
    term = TERMS[name]
    stock = _prepare(_stock(term), path)
    x = torch.randn(SAMPLES, TOKENS, IN)
    arguments = {}
    if "alora" in name.lower():
        arguments["alora_offsets"] = [4, None, 2]
    fused = lora_fast.accelerate(copy.deepcopy(stock), group_shared_inputs=path != "alone")
    wide = float64_copy(stock)
    try:
        expected = _run(stock, path, x, **arguments)
    except Exception as error:
        assert (name, path) in REFUSED, error
        with pytest.raises(type(error)):
            _run(fused, path, x, **arguments)
        return
    assert (name, path) not in REFUSED
    actual = _run(fused, path, x, **arguments)
    assert actual.keys() == expected.keys()
    exact = _run(wide, path if path == "mixed" else "stacked", x.double(), **arguments)
    assert_all_accurate(actual, exact, expected, compute_dtype=torch.float32)
    _check_counts(fused, path, fused=path in term.fused)


def _check_counts(model: Any, path: str, *, fused: bool) -> None:
    report = lora_fast.report(model)
    calls = 0 if path == "compiled" else 8 if path == "checkpointed" else 4
    if fused:
        assert report.fallback_calls == {}
        assert report.fused_calls == calls
        assert all(layer.compiled for layer in report.layers) == (path == "compiled")
    else:
        # Of a layer that does not hold the term the call may run fused.
        assert report.fallback_calls
        if path != "compiled":
            assert report.fused_calls + sum(report.fallback_calls.values()) == calls


# Fields of LoraConfig that some term of TERMS sets, here or in the tests that are named.
TESTED = {
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "bias",
    "lora_bias", "fan_in_fan_out", "use_dora", "use_bdlora", "alora_invocation_tokens",
    "velora_config", "kasa_config", "init_lora_weights", "target_modules",
}  # fmt: skip
# Which layers get an adapter, and what it starts from; the forward of a layer does not know.
BEFORE_THE_FORWARD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "exclude_modules", "modules_to_save", "layers_to_transform",
    "layers_pattern", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "megatron_config", "megatron_core",
}  # fmt: skip
# Other modules than a linear layer with an adapter, which stay PEFT's own, or adapters that PEFT
# reaches by them: test_the_layers_of_a_config_that_names_other_modules.
OTHER_MODULES = {
    "trainable_token_indices", "ensure_weight_tying", "layer_replication", "target_parameters",
}  # fmt: skip
# Variants of LoRA that are not computed: their class is looked at, not their name.
VARIANTS = {"use_qalora", "qalora_group_size", "arrow_config", "monteclora_config"}


def test_every_field_of_loraconfig_is_decided_about() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields - TESTED - BEFORE_THE_FORWARD - OTHER_MODULES - VARIANTS == set()


@pytest.mark.parametrize(
    ("config", "read"),
    [
        (peft.VeraConfig, {"r", "vera_dropout", "d_initial", "projection_prng_key", "bias",
                           "save_projection", "fan_in_fan_out", "init_weights"}),
        (peft.IA3Config, {"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}),
        # Those of LoRA which its layers have; the others start, stop and feed its allocator.
        (peft.AdaLoraConfig, {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
                              "orth_reg_weight", "total_step", "rank_pattern"}),
    ],
)  # fmt: skip
def test_every_field_of_the_other_configs_is_decided_about(config: type, read: set[str]) -> None:
    fields = {field.name for field in dataclasses.fields(config)}
    if config is peft.AdaLoraConfig:
        fields -= {field.name for field in dataclasses.fields(LoraConfig)} - {"rank_pattern"}
    assert fields - read - BEFORE_THE_FORWARD - {"target_modules"} == set()


# What PEFT keeps on a LoRA layer. Read by the fused path: the first block.
READ = {
    "base_layer", "lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector", "scaling",
    "lora_variant", "merged_adapters", "_disable_adapters", "cast_input_dtype_enabled",
    "fan_in_fan_out", "_active_adapter",
}  # fmt: skip
NOT_IN_THE_FORWARD = {
    "r", "lora_alpha", "use_dora", "use_rslora", "lora_bias", "lora_embedding_A",
    "lora_embedding_B", "ephemeral_gpu_offload", "kwargs", "in_features", "out_features",
    "is_target_conv_1d_layer", "_caches",
}  # fmt: skip


def test_every_attribute_of_a_layer_is_decided_about() -> None:
    layer = lora_layers(_stock(TERMS["plain"]))[0]
    held = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    assert held - set(vars(nn.Module())) - READ - NOT_IN_THE_FORWARD == set()


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (LoraLayer, {"_check_forward_args", "_mixed_batch_forward", "_cast_input_dtype"}),
        (adalora.SVDLinear, {"_cast_input_dtype"}),
        (vera.Linear, {"_cast_input_dtype"}),
        (ia3.Linear, set()),
    ],
)  # fmt: skip
def test_no_forward_calls_a_method_that_nobody_knows(layer: type, known: set[str]) -> None:
    """A new step in PEFT's forward would be a new term."""
    owner = peft.tuners.lora.Linear if layer is LoraLayer else layer
    names = set(owner.forward.__code__.co_names)
    methods = {
        n for n in names if n.startswith("_") and inspect.isfunction(getattr(owner, n, None))
    }
    assert methods <= known, f"{owner.__name__}.forward calls {sorted(methods - known)}"
