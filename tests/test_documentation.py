"""The code of docs/ runs as printed, and what the pages refer to exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tests.test_readme import tiny_llama

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("bench", "examples", "tests")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]+))?\)")


@pytest.mark.parametrize("page", [name for name in NAMES if name.startswith("docs/")])
def test_code_runs_from_top_to_bottom(page: str) -> None:
    text = (ROOT / page).read_text()
    names: dict[str, Any] = {}
    for block in CODE.finditer(text):
        line = text[: block.start(1)].count("\n")
        names["base_model"] = tiny_llama()
        exec(compile("\n" * line + block[1], page, "exec"), names)


def test_documentation_has_code() -> None:
    assert sum(len(CODE.findall(page.read_text())) for page in PAGES) >= 10


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page: str) -> None:
    for target, anchor in LINK.findall((ROOT / page).read_text()):
        if "://" in target:
            continue
        found = (ROOT / page).parent / target if target else ROOT / page
        assert found.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def test_the_readme_leads_to_every_page_of_docs() -> None:
    linked = {target for target, _ in LINK.findall((ROOT / "README.md").read_text())}
    assert {name for name in NAMES if name.startswith("docs/")} <= linked


@pytest.mark.parametrize("page", NAMES)
def test_commands_exist(page: str) -> None:
    from lora_fast.cli.app import app

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"lora-fast ([a-z]+)\b", (ROOT / page).read_text()))
    assert named <= commands


def test_tests_of_the_checklist_exist() -> None:
    """`test_x.py` opens a file, and the `test_…` after it are its functions."""
    functions: set[str] = set()
    named = re.findall(r"`(test_\w+)(\.py)?`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) > 100
    for name, suffix in named:
        if suffix:
            tree = ast.parse((ROOT / "tests" / f"{name}.py").read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        else:
            assert name in functions, name
