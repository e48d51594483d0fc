"""What `help` shows of a public function: every argument by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import lora_fast
from lora_fast import functional, optim, reference, trainable


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in lora_fast.__all__:
        value = getattr(lora_fast, name)
        if inspect.isclass(value):
            yield name, value.__init__
            if hasattr(value, "from_linear"):
                yield f"{name}.from_linear", value.from_linear
        elif callable(value):
            yield name, value
    for module in (functional, optim, reference, trainable):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__.startswith("lora_fast"):
                yield f"{module.__name__}.{name}", value


@pytest.mark.parametrize(("name", "function"), [pytest.param(*p, id=p[0]) for p in public()])
def test_every_argument_has_a_name(name: str, function: Callable[..., Any]) -> None:
    kinds = {p.kind for p in inspect.signature(function).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, name


@pytest.mark.parametrize("kind", [lora_fast.LoRALinear, lora_fast.DoRALinear, lora_fast.VeRALinear])
def test_from_linear_takes_what_the_class_takes_and_tells_each(kind: Any) -> None:
    made = inspect.signature(kind).parameters
    adapted = inspect.signature(kind.from_linear).parameters
    assert [p.default for p in adapted.values()][1:] == [p.default for p in made.values()][1:]
    assert list(adapted)[1:] == list(made)[1:]
    for name in adapted:
        assert f"`{name}`" in inspect.getdoc(kind.from_linear), name
