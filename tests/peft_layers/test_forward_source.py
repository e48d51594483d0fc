"""Calls of children, read from the source of a forward."""

from __future__ import annotations

import functools
import linecache
from pathlib import Path
from types import MethodType
from typing import Any

import forwards
import forwards_with_branches
import pytest
import torch
from forwards import ALL, KV, QK, AnotherInput, Children, Plain
from torch import Tensor, nn

from lora_fast.peft_layers import forward_source
from lora_fast.peft_layers.call_reader import Unreadable
from lora_fast.peft_layers.forward_source import called_together, code_of_forward


def together(module: nn.Module) -> list[tuple[str, ...]]:
    """Which of q, k and v are called together."""
    found = called_together(code_of_forward(module), module)
    named = [tuple(name for name in bundle.children if name in "qkv") for bundle in found]
    return [names for names in named if len(names) > 1]


CASES = {
    name: case
    for module in (forwards, forwards_with_branches)
    for name, case in vars(module).items()
    if isinstance(case, type) and "expected" in vars(case)
}


@pytest.mark.parametrize("name", CASES)
def test_calls(name: str) -> None:
    assert together(CASES[name]()) == CASES[name].expected


class Generator(Children):
    def forward(self, x: Tensor) -> Any:
        yield self.q(x)
        yield self.k(x)


class Flagged(Children):
    """Conditions on the module's attributes alone, and mixed ones."""

    def forward(self, x: Tensor, past: Any = None) -> Tensor:
        q = self.q(x)
        if self.shares and past is not None:
            return q
        if not self.has_values or len(self.extra) > 1:
            return q + self.k(x)
        return q + self.k(x) + (self.v(x) if self.v is not None else 0)


def flagged(**attributes: Any) -> Flagged:
    return Flagged(**{"shares": False, "has_values": True, "extra": (), **attributes})


def test_attributes_decide() -> None:
    module = flagged()
    (found,) = called_together(code_of_forward(module), module)
    assert found.children == ("q", "k", "v")
    assert all(condition.is_met(module) for condition in found.conditions)
    for name, value in (("shares", True), ("has_values", False), ("extra", (1, 2)), ("v", None)):
        changed = flagged()
        setattr(changed, name, value)
        assert not all(condition.is_met(changed) for condition in found.conditions), name
    del changed.extra
    assert not all(condition.is_met(changed) for condition in found.conditions)


def test_what_they_are_decides_who_belongs_together() -> None:
    assert together(flagged(shares=True)) == KV, "q is called without the others"
    assert together(flagged(has_values=False)) == QK
    assert together(flagged(extra=(1, 2))) == QK


class TrainsOtherwise(Children):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if self.training:
            q = q * 2
        return q + self.k(x) + self.v(x)


def test_conditions_on_which_no_call_hangs_are_no_conditions() -> None:
    (found,) = called_together(code_of_forward(TrainsOtherwise()), TrainsOtherwise())
    assert found.children == ("q", "k", "v")
    assert found.conditions == ()


class SetsItsFlag(Children):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        self.flag = x.sum() > 0
        if self.flag:
            return q
        return q + self.k(x) + self.v(x)


def test_what_a_forward_sets_itself_decides_nothing() -> None:
    assert together(SetsItsFlag(flag=False)) == KV


def passes_on(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


class Decorated(Children):
    @passes_on
    @passes_on
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def test_decorators_are_looked_through() -> None:
    assert together(Decorated()) == ALL


def test_a_forward_of_the_module_alone_and_a_hook_around_it() -> None:
    module = Plain()
    module.forward = MethodType(AnotherInput.forward, module)
    assert together(module) == KV
    hooked = functools.partial(lambda module, x: module._old_forward(x), module)
    module.forward = functools.update_wrapper(hooked, Plain().forward)
    assert together(module) == ALL


def exec_class(text: str) -> type[nn.Module]:
    names: dict[str, Any] = {"Children": Children}
    exec(text, names)
    return names["Written"]


TEXT = """
class Written(Children):
    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)
"""


def reason(module: nn.Module) -> str:
    with pytest.raises(Unreadable) as caught:
        together(module)
    return str(caught.value)


def test_without_source() -> None:
    assert reason(exec_class(TEXT)()) == "no source of Written.forward"


def test_source_that_was_edited_after_the_import(tmp_path: Path) -> None:
    file = tmp_path / "written.py"
    file.write_text(TEXT)
    names: dict[str, Any] = {"Children": Children}
    exec(compile(TEXT, str(file), "exec"), names)
    module = names["Written"]()
    assert together(module) == ALL
    for old, new in (("self.k(x)", "self.k(y)"), ("self.v(x)", "self.v(x) + 1"), ("x", "z")):
        file.write_text(TEXT.replace(old, new))
        linecache.checkcache(str(file))
        forward_source._function_of.cache_clear()
        assert reason(module) == "source of Written.forward is not what runs"


def test_no_python_and_no_plain_function() -> None:
    module = Plain()
    module.forward = torch.relu
    assert reason(module) == "forward of Plain is no Python function"
    assert reason(Generator()) == "forward yields, or shares its names with other functions"


def test_classes_in_functions_and_with_super() -> None:
    factor = 2.0

    class Local(Plain):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            y = q * factor + self.__private() + self.k(x)
            return y + self.v(x) + super().forward(x)

        def __private(self) -> float:
            return 1.0

    assert together(Local()) == ALL
