"""``--help`` that shows every option in full at any width of the terminal."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

NARROWEST, WIDEST = 40, 100
OPTIONS = "Options"
INDENT, GAP = 2, 2


class WholeWidth:
    """Help as wide as the terminal, within limits."""

    def get_help(self, ctx: Any) -> str:
        """The help page."""
        columns = shutil.get_terminal_size().columns
        ctx.terminal_width = min(max(columns - 1, NARROWEST - 1), WIDEST)
        text: str = super().get_help(ctx)  # type: ignore[misc]
        return text


class Commands(WholeWidth, TyperGroup):
    """The list of commands."""


class Command(WholeWidth, TyperCommand):
    """A command whose help lists its options panel by panel; a long one gets its own line."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then every panel with its options."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = OPTIONS if parameter.param_type_name == "option" else "Arguments"
                panel = getattr(parameter, "rich_help_panel", None) or kind
                panels.setdefault(panel, []).append(record)
        # Options without a panel, --help and --json, come last.
        for name in sorted(panels, key=lambda name: name == OPTIONS):
            formatter.write(f"\n{name}:\n{definitions(panels[name], formatter.width)}")


def definitions(rows: list[tuple[str, str]], width: int) -> str:
    """Terms with their meanings beside them, or below long ones; no word is broken."""
    left = min(max(len(term) for term, _ in rows), width * 2 // 5) + INDENT
    wrapper = textwrap.TextWrapper(
        width=width,
        initial_indent=" " * (left + GAP),
        subsequent_indent=" " * (left + GAP),
        break_on_hyphens=False,
        break_long_words=False,
    )
    lines = []
    for term, meaning in rows:
        head = f"{' ' * INDENT}{term}"
        body = wrapper.wrap(meaning)
        if body and len(head) <= left:
            body[0] = head.ljust(left + GAP) + body[0].lstrip()
        else:
            body = [head, *body]
        lines += body
    return "\n".join(lines) + "\n"
