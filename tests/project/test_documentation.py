"""The code of docs/ runs as printed, and what the pages refer to exists."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import run_cli, tiny_llama
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("bench", "examples", "tests")),
]
CHECKLIST = sorted((ROOT / "tests" / "checklist").glob("*.md"))
PAGES += CHECKLIST
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]+))?\)")


@pytest.mark.parametrize("page", [name for name in NAMES if name.startswith("docs/")])
def test_code_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
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


def test_the_page_of_benchmarks_has_every_command() -> None:
    page = (ROOT / "bench" / "README.md").read_text()
    files = [f for f in (ROOT / "bench").glob("*.py") if "__main__" in f.read_text()]
    assert len(files) >= 10
    assert [f.stem for f in files if f"python -m bench.{f.stem}" not in page] == []


@pytest.mark.parametrize("page", NAMES)
def test_commands_exist(page: str) -> None:
    from lora_fast.cli.app import app

    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"lora-fast ([a-z]+)\b", (ROOT / page).read_text()))
    assert named <= commands


def test_options_exist() -> None:
    """Every option of a documented command line is one of that command."""
    from lora_fast.cli.app import app

    commands: Any = get_command(app).commands  # type: ignore[attr-defined]
    seen = 0
    for page in PAGES:
        for name, rest in re.findall(r"lora-fast ([a-z]+)((?: [^`#\n]*)?)", page.read_text()):
            given = re.findall(r"(?<!\S)--[a-z-]+", rest)
            known = {option for param in commands[name].params for option in param.opts}
            assert set(given) <= known, f"{page}: lora-fast {name}{rest}"
            seen += len(given)
    assert seen >= 10


@pytest.mark.parametrize("command", ["plan", "doctor", "tune"])
def test_commands_of_the_guide_run(command: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)  # type: ignore[operator]
    guide = (ROOT / "docs" / "guide.md").read_text()
    (line,) = re.findall(rf"^    lora-fast {command}\b(.*)$", guide, re.MULTILINE)
    given = shlex.split(line, comments=True)
    cheaper = {"plan": [], "doctor": ["--no-kernels"], "tune": ["--dry-run"]}[command]
    assert run_cli(command, *[str(tmp_path) if a == "MODEL" else a for a in given], *cheaper) == 0


def test_every_reason_for_a_fallback_is_in_the_guide() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    table = guide[guide.index("## When a layer is not fused") :]
    reasons = fallback_reasons()
    assert len(reasons) > 35
    assert [reason for reason in reasons if reason not in table] == []


def fallback_reasons() -> set[str]:
    """The fixed parts of what functions return that say why a layer cannot be fused."""
    package = ROOT / "lora_fast"
    folders = ("peft_layers", "base_layer", "gated_mlps")
    sources = [source for folder in folders for source in (package / folder).glob("*.py")]
    functions = [
        node
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef) and node.returns is not None
    ]
    saying_why = [f for f in functions if re.search(r"str \| None|\| str", _returns(f))]
    return {text for function in saying_why for text in _texts(function)}


def _returns(function: ast.FunctionDef) -> str:
    return "" if function.returns is None else ast.unparse(function.returns)


def _texts(function: ast.FunctionDef) -> Iterator[str]:
    """String constants of its values; a call's arguments and what is compared are other things."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Return | ast.Assign) or node.value is None:
            continue
        parts = list(ast.walk(node.value))
        others = [part for part in parts if isinstance(part, ast.Call | ast.Compare)]
        inner = {part for other in others for part in ast.walk(other)}
        for part in parts:
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part not in inner:
                yield part.value.strip()


def test_every_row_of_the_checklist_has_tests_and_mutations() -> None:
    rows = [row for page in CHECKLIST for row in page.read_text().split("\n## ")[1:]]
    assert sorted(int(row.split()[0]) for row in rows) == [*range(1, len(rows) + 1)]
    for row in rows:
        shown, _, broken = row.partition("\nBroken on purpose\n")
        assert "\nShown by\n\n- " in shown and "`test_" in shown, row.split()[0]
        assert broken.startswith("\n- "), row.split()[0]


def test_tests_of_the_checklist_exist() -> None:
    """`test_x.py` opens a file, and the `test_…` after it are its functions."""
    functions: set[str] = set()
    text = "\n".join(page.read_text() for page in CHECKLIST)
    named = re.findall(r"`([\w/]*test_\w+)(\.py)?`", text)
    assert len(named) > 100
    for name, suffix in named:
        if suffix:
            tree = ast.parse((ROOT / "tests" / f"{name}.py").read_text())
            functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        else:
            assert name in functions, name


VARIABLE = re.compile(r"\bLORA_FAST_[A-Z_]+\b")


def test_the_page_of_variables_has_every_one_and_no_other() -> None:
    sources = [
        path
        for folder in ("kernels", "lora_fast", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    read = {name for path in sources for name in VARIABLE.findall(path.read_text())}
    page = (ROOT / "docs" / "variables.md").read_text()
    rows = re.findall(r"^\| `(LORA_FAST_\w+)`", page, re.MULTILINE)
    assert sorted(rows) == sorted(read)
    for other in PAGES:
        assert set(VARIABLE.findall(other.read_text())) <= read, other


def tree_of_contributing() -> dict[str, str]:
    """{path: description} of the tree in CONTRIBUTING.md; folders end with a slash."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## How the code is laid out") :].partition("\n## ")[0]
    found: dict[str, str] = {}
    parents: list[str] = []
    for indent, name, what in re.findall(r"^    ( *)(\w+(?:\.py|/)) +(.+)$", section, re.MULTILINE):
        parents[len(indent) // 2 :] = [name]
        path = "".join(parents)
        assert path not in found, f"{path} has two lines"
        found[path] = what
    return found


def test_the_tree_has_a_line_for_every_folder_and_file() -> None:
    """A package's folder stands for its __init__.py; the files of tests/ stand in their folders."""
    top = ("kernels", "lora_fast", "bench", "tests")
    files = [path for folder in top for path in (ROOT / folder).rglob("*.py")]
    here = [path.relative_to(ROOT) for path in files]
    folders = {f"{parent}/" for path in here for parent in path.parents if parent.name}
    wanted = {str(p) for p in here if p.parts[0] != "tests" and p.name != "__init__.py"}
    explained = {path for path in tree_of_contributing() if not path.endswith("__init__.py")}
    missing, unknown = (folders | wanted) - explained, explained - (folders | wanted)
    assert not missing, f"CONTRIBUTING.md's tree must have a line for {sorted(missing)}"
    assert not unknown, f"CONTRIBUTING.md's tree must not have {sorted(unknown)}"


@pytest.mark.parametrize("page", [name for name in NAMES if name != "CHANGELOG.md"])
def test_sources_that_a_page_names_exist(page: str) -> None:
    folders = ("kernels", "lora_fast", "bench", "tests", "docs", "examples")
    files = [f"/{path}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for name in re.findall(r"`([\w./]+\.py)`", (ROOT / page).read_text()):
        assert any(path.endswith(f"/{name}") for path in files), f"{page} names {name}"
