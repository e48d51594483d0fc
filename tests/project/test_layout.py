"""The rooms of the house: imports point one way, few rooms may know Triton, nothing is left over.

Read as text, so that an import within a function or for a type checker counts like any other.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "lora_fast", "bench")
# A folder is a room, and so is a file that lies flat beside the folders.
PUBLIC = "lora_fast"  # gives its names on first use, and so imports from everywhere


def modules(*folders: str) -> dict[str, Path]:
    """Files by their dotted names."""
    found = {}
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules(*FOLDERS)


def imported(name: str, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of `known` that one of them imports, itself left out."""
    path = known[name]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                home = ".".join([*package, *filter(None, [home])])
            targets = [(home, alias.name) for alias in node.names]
        else:
            continue
        for home, leaf in targets:
            home = home.replace("lora_fast.kernels", "kernels")
            target = f"{home}.{leaf}" if f"{home}.{leaf}" in known else home
            if target in known and target != name:
                yield target


IMPORTS = {name: set(imported(name, MODULES)) for name in MODULES}


def room(name: str) -> str:
    top, *rest = name.split(".")
    return top if top == "kernels" or not rest else f"{top}.{rest[0]}"


def rooms() -> dict[str, set[str]]:
    """The rooms that each imports from."""
    found: dict[str, set[str]] = {}
    for name, targets in IMPORTS.items():
        if name != PUBLIC:
            found.setdefault(room(name), set()).update(
                room(t) for t in targets if t != PUBLIC and room(t) != room(name)
            )
    return found


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Names that lead from one to the next and back to the first; none without a circle."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            found = walk(target, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next(filter(None, (walk(name, []) for name in sorted(arrows))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_two_files_import_each_other() -> None:
    without = {name: targets - {PUBLIC} for name, targets in IMPORTS.items() if name != PUBLIC}
    assert circle(without) == []


def test_no_import_runs_back_up() -> None:
    """Rooms can be put on floors, each above all that it imports from."""
    assert circle(rooms()) == []


def importers(of: str) -> set[str]:
    return {
        room(name)
        for name, targets in IMPORTS.items()
        if room(name) != of and any(room(target) == of for target in targets)
    }


def test_who_may_know_triton() -> None:
    library = {name for name in importers("kernels") if name.startswith("lora_fast")}
    assert library == {"lora_fast.backends", "lora_fast.tuning"}
    named = {
        room(name)
        for name, path in MODULES.items()
        if name.startswith("lora_fast") and _imports_package(path, "triton")
    }
    assert named <= {"lora_fast.backends", "lora_fast.tuning", "lora_fast.doctor"}


def test_the_reference_stands_alone() -> None:
    assert IMPORTS["lora_fast.reference"] == set()


def test_tuning_knows_neither_training_nor_peft() -> None:
    below = rooms()["lora_fast.tuning"]
    assert below <= {"kernels", "lora_fast.factors", "lora_fast.nf4", "lora_fast.version"}


def test_the_library_does_not_know_the_command_line() -> None:
    assert importers("lora_fast.training") == {"lora_fast.cli"}
    assert importers("lora_fast.cli") <= {"bench.gpu_day"}


def test_neither_kernels_nor_library_know_bench_or_tests() -> None:
    assert not any(importers(name) & {"kernels"} for name in rooms())
    assert all(name.startswith("bench") for name in importers("bench.instruments"))
    for path in MODULES.values():
        assert not _imports_package(path, "tests"), path


def private(path: Path) -> Iterator[tuple[str, int]]:
    """Private functions and classes of a file, and how often the rest of the file names them."""
    text = path.read_text()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.decorator_list:
            continue
        if re.match("_[a-zA-Z]", node.name):
            named = re.compile(rf"\b{node.name}\b")
            own = ast.get_source_segment(text, node) or ""
            yield node.name, len(named.findall(text)) - len(named.findall(own))


def test_no_private_function_is_left_that_nobody_calls(tmp_path: Path) -> None:
    """One that has lost its only call may be a branch that got lost."""
    lost = tmp_path / "lost.py"
    lost.write_text("def _used(): ...\ndef _lost(n): return _lost(n - 1)\nx = _used()\n")
    assert list(private(lost)) == [("_used", 1), ("_lost", 0)]
    for path in MODULES.values():
        assert [name for name, uses in private(path) if uses == 0] == [], path


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda p: p.stem)
def test_no_test_imports_another(path: Path) -> None:
    known = modules("tests")
    (name,) = (name for name, file in known.items() if file == path)
    assert not [t for t in imported(name, known) if t.rpartition(".")[2].startswith("test_")]


def _imports_package(path: Path, package: str) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if any(name.partition(".")[0] == package for name in names):
            return True
    return False
