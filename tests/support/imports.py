"""The packages that test files need: their imports, read without running them.

A row of the matrix of versions installs the library without the command line. The test files that
it leaves out are those that import what it lacks, themselves or through other files of tests/ and
bench/. That is the whole rule: of what remains everything must pass.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def needs(path: Path, names: Iterable[str]) -> bool:
    """Whether the file imports one of the modules `names` or of their submodules."""
    lacking = tuple(names)
    return any(f"{module}.".startswith(f"{name}.") for module in _closure(path) for name in lacking)


@functools.cache
def _closure(path: Path) -> frozenset[str]:
    """Dotted names of everything that the file and the files it imports import."""
    found: set[str] = set()
    files, waiting = set(), [path.resolve()]
    while waiting:
        file = waiting.pop()
        if file not in files:
            files.add(file)
            modules = set(_imports(file))
            found |= modules
            waiting += (f for f in map(_own_files().get, modules) if f is not None)
    return frozenset(found)


@functools.cache
def _imports(path: Path) -> tuple[str, ...]:
    return tuple(_imported(ast.parse(path.read_text()), path))


def _imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Modules, and what is taken from them: that may be a module, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                home = ".".join([*package, *filter(None, [home])])
            yield home
            yield from (f"{home}.{alias.name}" for alias in node.names)


@functools.cache
def _own_files() -> dict[str, Path]:
    """Files of tests/ and bench/ by the names that they are imported by."""
    found = {}
    for folder in ("tests", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = file
            if folder == "tests":
                # pytest has tests/support on sys.path.
                found.setdefault(parts[-1], file)
    return found
