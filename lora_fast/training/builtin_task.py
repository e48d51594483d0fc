"""The built-in task: does this docstring describe this function?

Pairs come from the running Python's own standard library, read with ``ast`` and never imported, so
the task needs no download. It is of the kind of MRPC (Dolan and Brockett, 2005): two short texts
and a label. For each function there is one positive pair (its signature as words, the first
paragraph of its docstring with its name masked) and one negative pair (the same signature, the
docstring of another function of the same file). Classes are therefore balanced within every file,
and since the split is by file, no file contributes to both sides.
"""

from __future__ import annotations

import ast
import os
import random
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MASK = "…"
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
FUNCTIONS = 5_000
HELD_OUT = 0.15
MIN_WORDS = 3

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


@dataclass(frozen=True)
class Described:
    """A documented function: its signature as words and the first paragraph of its docstring."""

    signature: str
    description: str


@dataclass(frozen=True)
class Pair:
    """One example. ``label`` is 1 when ``description`` belongs to the function, else 0."""

    file: str
    signature: str
    description: str
    label: int


def build_pairs(
    seed: int,
    *,
    stdlib: Path | None = None,
    functions: int = FUNCTIONS,
    held_out: float = HELD_OUT,
) -> tuple[list[Pair], list[Pair]]:
    """``(train, held_out)``, a pure function of the arguments and the standard library.

    Two pairs per function: about ``2 · functions`` in all, fewer if the library documents fewer.

    Raises FileNotFoundError: the standard library's sources are not installed.
    """
    root = stdlib or Path(sysconfig.get_paths()["stdlib"])
    by_file = read_functions(root)
    total = min(functions, sum(map(len, by_file.values())))
    if total == 0:
        raise FileNotFoundError(f"no documented Python functions found under {root}")
    rng = random.Random(seed)
    files = sorted(by_file)
    rng.shuffle(files)

    train: list[Pair] = []
    test: list[Pair] = []
    bounds = [round(total * held_out), total]
    taken = 0
    for file in files:
        side, bound = (test, bounds[0]) if taken < bounds[0] else (train, bounds[1])
        members = by_file[file]
        chosen = rng.sample(members, min(len(members), bound - taken))
        for function in chosen:
            side.extend(_both_labels(rng, file, function, members))
        taken += len(chosen)
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def read_functions(root: Path) -> dict[str, list[Described]]:
    """The usable functions of every file under ``root`` by their path relative to it.

    Left out: tests, installed packages, files that do not parse, functions whose first paragraph
    has fewer than three words once the name is masked, repeats of a (signature, description) met
    before in any file, and functions without a negative in their file.
    """
    found: dict[str, list[Described]] = {}
    seen: set[Described] = set()
    for path in _source_files(root):
        members = []
        for function in _functions_of(path):
            if function not in seen:
                seen.add(function)
                members.append(function)
        members = [m for m in members if negatives(m, members)]
        if members:
            found[path.relative_to(root).as_posix()] = members
    return found


def negatives(function: Described, members: list[Described]) -> list[str]:
    """The descriptions in ``members`` that cannot be the one of ``function``.

    A function with the same signature as words may well deserve the same description, so it gives
    no negative.
    """
    own = {m.description for m in members if m.signature == function.signature}
    return [m.description for m in members if m.description not in own]


def describe(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Described | None:
    """The function as the task shows it, or None if its docstring says too little."""
    docstring = ast.get_docstring(node)
    if not docstring:
        return None
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    masked = re.sub(rf"(?<!\w){re.escape(node.name)}(?!\w)", MASK, paragraph, flags=re.IGNORECASE)
    if len(re.findall(r"[A-Za-z]{2,}", masked)) < MIN_WORDS:
        return None
    return Described(signature_words(node), masked)


def signature_words(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """``def readInto(self, buf_size)`` as ``read into: buf size``."""
    args = node.args
    names = [a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs]]
    names += [a.arg for a in (args.vararg, args.kwarg) if a is not None]
    parameters = [_words(name) for name in names if name not in ("self", "cls")]
    return f"{_words(node.name)}: {', '.join(filter(None, parameters))}".rstrip(": ")


def _words(identifier: str) -> str:
    return " ".join(word.lower() for word in _WORD.findall(identifier))


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _functions_of(path: Path) -> list[Described]:
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    return [found for found in map(describe, _function_nodes(tree)) if found is not None]


def _function_nodes(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    # Only statements hold functions; ast.walk would spend most of its time inside expressions.
    for block in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child
            yield from _function_nodes(child)


def _both_labels(
    rng: random.Random, file: str, function: Described, members: list[Described]
) -> tuple[Pair, Pair]:
    return (
        Pair(file, function.signature, function.description, 1),
        Pair(file, function.signature, rng.choice(negatives(function, members)), 0),
    )
