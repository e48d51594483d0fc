"""The pytest plugin of an arm: accelerates every PEFT model, counts every call, keeps outcomes.

PEFT_SUITE_ARM says which arm this is; PEFT_SUITE_OUT is the JSON file that it leaves.

A tuner is made by ``get_peft_model``, ``PeftModel.from_pretrained``, ``inject_adapter_in_model``
and transformers alike; the accelerated arm passes each to ``lora_fast.accelerate`` when it has
wrapped its first layers. Layers of adapters that are added or loaded later are left to lora_fast.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

import lora_fast
from lora_fast.acceleration.report import adapted_layers
from lora_fast.peft_layers import FUSED_CLASSES, FusedForward

METHODS = (peft.LoraConfig, peft.VeraConfig, peft.AdaLoraConfig, peft.IA3Config)
# Their layers are convolutions, which no method of lora_fast covers.
OTHER_MODELS = ("Conv1d", "Conv2d", "Conv3d")
# It counts how often PEFT forms B A of a parameter, which the fused path of experts never does.
COUNTS_PROXIES = "test_target_parameter_result_caching_works"
LINEAR = (nn.Linear, bnb.nn.Linear4bit, bnb.nn.LinearNF4)


class Call(NamedTuple):
    """One kind of call: how it ran, and whether lora_fast claims to run such calls fused."""

    kind: str
    claimed: bool
    how: str
    reason: str


_calls: Counter[Call] = Counter()
_running: set[int] = set()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(), "peft-suite-outcomes")
    if os.environ["PEFT_SUITE_ARM"] == "accelerated":
        _accelerate_tuners()
        _count_calls()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of the tests for every method, those for the methods of lora_fast."""
    dropped = [item for item in items if not _concerns(item)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if _concerns(item)]


def _concerns(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    config, model = parameters.get("config_cls"), str(parameters.get("model_id"))
    ours = not isinstance(config, type) or issubclass(config, METHODS)
    counts = item.name == COUNTS_PROXIES
    return ours and not counts and not model.startswith(OTHER_MODELS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    try:
        yield
    finally:
        item.user_properties.append(("calls", [[*call, n] for call, n in _calls.items()]))
        _calls.clear()


class Outcomes:
    """Collects, in the process that has all reports, the outcome and the calls of every test."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "error": "", "calls": []})
        if report.when == "teardown":
            test["calls"] = dict(report.user_properties).get("calls", [])
        outcome = _outcome(report)
        if outcome != "passed" and test["outcome"] == "passed":
            test["outcome"], test["error"] = outcome, _error(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            Path(os.environ["PEFT_SUITE_OUT"]).write_text(json.dumps(self.tests))


def _outcome(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return "xfailed" if report.skipped else "xpassed"
    return report.outcome if report.when == "call" or report.outcome != "failed" else "error"


def _error(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", report.longrepr)).splitlines()[0] if crash else ""


def _accelerate_tuners() -> None:
    create = BaseTuner.__init__

    @functools.wraps(create)
    def created(self: Any, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        if next(adapted_layers(self), None) is not None:
            lora_fast.accelerate(self)

    BaseTuner.__init__ = created


def _count_calls() -> None:
    FusedForward.forward = _counted(FusedForward.forward)
    for cls in _subclasses(BaseTunerLayer):
        if issubclass(cls, nn.Module) and "forward" in vars(cls):
            cls.forward = _counted(cls.forward)
    for fused in _subclasses(FusedForward):
        # Counting changes nothing, so that a layer may take no notice of it.
        fused._lora_fast_stock_forward = getattr(fused._lora_fast_stock, "forward", None)


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def _counted(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, counted with what lora_fast's own counters say, once for each call of a layer."""

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self) in _running or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        kind, claimed = _kind(self), _claimed(self, kwargs)
        counters = getattr(self, "_lora_fast_calls", None)
        before = None if counters is None else (counters.fused, counters.fallbacks.copy())
        _running.add(id(self))
        raised = True
        try:
            result = forward(self, *args, **kwargs)
            raised = False
            return result
        finally:
            _running.discard(id(self))
            how, reason = _how(self, counters, before)
            _calls[Call(kind, claimed, "raised" if raised else how, reason)] += 1

    return counted


def _how(layer: Any, counters: Any, before: Any) -> tuple[str, str]:
    if counters is None:
        known = type(layer) in FUSED_CLASSES
        return "fallback", "not accelerated" if known else "has no fused path"
    fused, fallbacks = before
    (reason, *_) = [*(counters.fallbacks - fallbacks), ""]
    return ("fused", "") if counters.fused == fused + 1 else ("fallback", reason)


def _kind(layer: Any) -> str:
    homes = (cls.__module__ for cls in type(layer).__mro__)
    home = next((name for name in homes if name.startswith("peft.tuners.")), "peft.tuners.?")
    return f"{home.split('.')[2]}.{layer._get_name()}"


def _claimed(layer: Any, arguments: dict[str, Any]) -> bool:
    """Whether the README promises the fused path, found without asking lora_fast.

    A linear layer, dense or NF4, with an adapter of a method in its table, not merged, not
    disabled.
    """
    known = any(isinstance(layer, cls) for cls in FUSED_CLASSES)
    if not known or type(layer.base_layer) not in LINEAR:
        return False
    if layer.merged or layer.disable_adapters:
        return False
    names = {*(arguments.get("adapter_names") or layer.active_adapters)}
    variants = [v for n, v in getattr(layer, "lora_variant", {}).items() if n in names]
    if any(type(variant) is not DoraLinearVariant for variant in variants):
        return False
    return any(name in getattr(layer, layer.adapter_layer_names[0]) for name in names)
