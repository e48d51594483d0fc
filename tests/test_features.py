"""A feature that needs more than the lower bounds is off below its version, and says so."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from lora_models import Mlp, lora_config, nf4_linear, quantised
from peft import get_peft_model
from torch import nn

import lora_fast
from lora_fast import features
from lora_fast.features import FEATURES, SHARDED_INTEGERS, installed, switched_off


def pretend(monkeypatch: pytest.MonkeyPatch, **found: tuple[int, ...] | None) -> None:
    """Let these be the versions of packages, None for one that is absent."""
    known = features.installed
    monkeypatch.setattr(features, "installed", lambda name: found.get(name, known(name)))


def test_versions_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    written = {"a": "2.13.0+cpu", "b": "0.48", "c": "5.0.0rc1", "d": "2.14.0.dev20260101+cu130"}
    monkeypatch.setattr("importlib.metadata.version", written.__getitem__)
    assert [installed(name) for name in written] == [
        (2, 13, 0),
        (0, 48),
        (5, 0, 0),
        (2, 14, 0),
    ]


def test_a_version_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading takes longer than the launches of a layer, and each call of experts asks."""
    asked: list[str] = []

    def read(name: str) -> str:
        asked.append(name)
        if len(asked) == 1:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr("importlib.metadata.version", read)
    # One that is absent may be installed while Python runs.
    assert [installed("read-once") for _ in range(4)] == [None, *[(1, 2, 3)] * 3]
    assert len(asked) == 2


def test_a_package_that_is_absent_has_no_version() -> None:
    assert installed("no-such-distribution") is None


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_a_feature_is_off_below_what_it_needs(
    feature: features.Feature, monkeypatch: pytest.MonkeyPatch
) -> None:
    below = (*feature.needs[:-1], feature.needs[-1] - 1, 9)
    for version, is_on in ((feature.needs, True), ((99,), True), (None, True), (below, False)):
        pretend(monkeypatch, **{feature.package: version})
        reason = feature.obstacle()
        assert feature.is_on() is (reason is None) is is_on
        assert (reason in switched_off()) is not is_on
    needed = ".".join(map(str, feature.needs))
    assert reason is not None
    assert reason.startswith(f"{feature.name}: needs {feature.package} {needed}, got ")
    assert reason.endswith(f": {feature.reason}")


def accelerated(model: nn.Module) -> nn.Module:
    return lora_fast.accelerate(get_peft_model(model, lora_config()))


def test_the_report_tells_what_concerns_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    integers = accelerated(quantised(Mlp()))
    floats = accelerated(quantised(Mlp(), quant_storage=torch.bfloat16))
    pretend(monkeypatch, torch=(2, 11, 0))
    report = lora_fast.report(integers)
    assert report.switched_off == (SHARDED_INTEGERS.obstacle(),)
    assert str(report).endswith(f"off: {SHARDED_INTEGERS.obstacle()}")
    assert report.all_fused, "off is what nobody has asked for yet"
    for model in (floats, accelerated(Mlp()), nf4_linear(nn.Linear(16, 16))):
        assert lora_fast.report(model).switched_off == ()
    pretend(monkeypatch, torch=(2, 12))
    assert lora_fast.report(integers).switched_off == ()
    assert "off:" not in str(lora_fast.report(integers))


def test_what_is_traced_by_torch_compile_is_not_exported() -> None:
    def exporting(x: torch.Tensor) -> torch.Tensor:
        return x + float(features.is_exporting())

    x = torch.zeros(1)
    torch._dynamo.reset()
    assert torch.compile(exporting, backend="eager", fullgraph=True)(x).item() == 0.0

    class Exported(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return exporting(x)

    for strict in (False, True):
        program = torch.export.export(Exported(), (x,), strict=strict)
        assert program.module()(x).item() == 1.0
    assert not features.is_exporting()
