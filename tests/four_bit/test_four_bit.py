"""bitsandbytes' layers are recognised among loaded modules, whenever they were loaded."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
from absent_packages import run_without
from torch import nn

from lora_fast import four_bit
from lora_fast.four_bit import is_four_bit


class _Derived(bnb.nn.Linear4bit):
    pass


@pytest.mark.parametrize("kind", [bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4, _Derived])
def test_four_bit_layers(kind: type) -> None:
    layer = kind(64, 4)
    assert is_four_bit(layer)
    assert type(layer.weight) is four_bit.weight_class


def test_the_classes_whose_forward_is_known() -> None:
    assert four_bit.find() == four_bit.classes == (bnb.nn.Linear4bit, bnb.nn.LinearNF4)


@pytest.mark.parametrize(
    "layer", [nn.Linear(2, 2), nn.Conv1d(2, 2, 1), bnb.nn.Linear8bitLt(2, 2), None]
)
def test_other_layers(layer: nn.Module | None) -> None:
    assert not is_four_bit(layer)


def test_bitsandbytes_may_be_imported_after_the_first_layer_was_asked_about(tmp_path: Path) -> None:
    code = """
        import sys, torch
        from torch import nn
        from lora_fast.four_bit import is_four_bit

        class Other(nn.Linear):
            pass

        @torch.compile(backend="eager", fullgraph=True)
        def asked(x, layer):
            return x + is_four_bit(layer)

        zero = torch.zeros(())
        assert not is_four_bit(Other(2, 2))
        assert asked(zero, Other(2, 2)) == 0
        sys.modules["bitsandbytes"] = None  # as programs rule a package out
        assert not is_four_bit(Other(2, 2))
        del sys.modules["bitsandbytes"]
        assert "bitsandbytes.nn" not in sys.modules
        import bitsandbytes
        assert asked(zero, bitsandbytes.nn.Linear4bit(2, 2)) == 1
        assert is_four_bit(bitsandbytes.nn.Linear4bit(2, 2)) and not is_four_bit(Other(2, 2))
    """
    run_without(code=code, cwd=tmp_path)
