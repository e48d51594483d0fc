"""What Triton before 3.7 cannot compile, refused by the Triton that runs."""

from __future__ import annotations

import ast
from typing import Any

# Functions of kernels that no kernel calls before 3.7: gated_policy.py and gated_tiles.py ask.
ONLY_FROM_3_7 = frozenset(
    ("_scale_of_Q", "scales_of", "branch_in_eights", "down_in_eights", "expert_branch_in_eights")
)


def refuse_returned_nones() -> None:
    """Let no jitted function of a kernel return None, nor a tuple that holds it, but ONLY_FROM_3_7.

    A bare `return` is allowed. Kernels that are compiled already are not looked at.
    """
    from triton.compiler import code_generator
    from triton.language import constexpr
    from triton.language import tuple as tl_tuple

    generator: Any = code_generator.CodeGenerator
    upstream = generator.visit_Return

    def holds_none(value: Any) -> bool:
        if isinstance(value, tl_tuple):
            return any(map(holds_none, value.values))
        return (value.value if isinstance(value, constexpr) else value) is None

    def visit_Return(self: Any, node: ast.Return) -> Any:
        result = upstream(self, node)
        returned = getattr(self, "return_vals", None)  # from 3.7 on
        if returned and node.value is not None and holds_none(returned[-1]):
            name = self.function_name.partition("__")[0].rpartition(".")[2]
            if name not in ONLY_FROM_3_7:
                raise TypeError(f"{name} must not return None, for Triton before 3.7")
        return result

    generator.visit_Return = visit_Return
