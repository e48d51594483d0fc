"""The built-in task: its pairs, and that nothing leaks between the two sides."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from lora_fast.training import builtin_task
from lora_fast.training.builtin_task import MASK, Pair, build_pairs, describe, read_functions

SHAPES = '''
class Shape:
    def areaOfShape(self, unit_name, *rest, scale=1, **more):
        """Return what areaofshape measures,
        the surface.

        Not shown.
        """

    def move(self, dx, dy):
        """Shift the shape by a vector."""

    def tiny(self):
        """Tiny move."""
'''
WORDS = '''
async def fetch(urls):
    """Download every address at once."""

def fetch(urls):
    """A second function like the first."""

def count(text):
    """Count the words of a text."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "pack" / "tests").mkdir(parents=True)
    (tmp_path / "shapes.py").write_text(SHAPES)
    (tmp_path / "pack" / "words.py").write_text(WORDS)
    (tmp_path / "pack" / "copy.py").write_text(WORDS)
    (tmp_path / "pack" / "tests" / "shapes.py").write_text(SHAPES.replace("vector", "test"))
    (tmp_path / "alone.py").write_text('def alone():\n    """Has no other one beside it."""\n')
    (tmp_path / "broken.py").write_text("def broken(:\n")
    return tmp_path


@pytest.fixture(scope="module")
def real() -> tuple[list[Pair], list[Pair]]:
    return build_pairs(0)


def function(source: str) -> ast.FunctionDef:
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def test_signature_is_words_and_description_is_the_masked_first_paragraph(library: Path) -> None:
    shape, move = read_functions(library)["shapes.py"]
    assert shape.signature == "area of shape: unit name, scale, rest, more"
    assert shape.description == f"Return what {MASK} measures, the surface."
    assert move.signature == "move: dx, dy"


@pytest.mark.parametrize(
    ("name", "docstring", "expected"),
    [
        ("read", "Read until read() fails, never reading.", "… until …() fails, never reading."),
        ("get", "Like obj.get or target_get or widget.", "Like obj.… or target_get or widget."),
        ("__init__", "Same as __init__ of the base.", "Same as … of the base."),
    ],
)
def test_the_name_is_masked_as_a_whole_word(name: str, docstring: str, expected: str) -> None:
    found = describe(function(f'def {name}(self):\n    """{docstring}"""'))
    assert found is not None
    assert found.description == expected


def test_docstrings_that_say_nothing_are_left_out() -> None:
    assert describe(function("def f(): pass")) is None
    assert describe(function('def close():\n    """Close close close it."""')) is None


def test_files_that_cannot_give_pairs_are_left_out(library: Path) -> None:
    found = read_functions(library)
    # words.py repeats copy.py word for word; tests, one-function and broken files do not count.
    assert set(found) == {"shapes.py", "pack/copy.py"}


def test_negatives_have_another_signature_and_another_description(library: Path) -> None:
    members = read_functions(library)["pack/copy.py"]
    fetch = next(m for m in members if m.description.startswith("Download"))
    assert builtin_task.negatives(fetch, members) == [f"{MASK} the words of a text."]


def test_pairs_are_about_ten_thousand_balanced_and_true(
    real: tuple[list[Pair], list[Pair]],
) -> None:
    train, held_out = real
    assert 7_000 <= len(train) + len(held_out) <= 10_000
    # What is left of the file that the last held-out pairs are of is on neither side, and how much
    # that is depends on the version of the standard library.
    assert 0.149 < len(held_out) / (len(train) + len(held_out)) < 0.16
    for side in real:
        per_file = Counter((pair.file, pair.label) for pair in side)
        assert all(per_file[file, 0] == per_file[file, 1] for file, _ in per_file)
        true, false = (
            {(p.file, p.signature, p.description) for p in side if p.label == label}
            for label in (1, 0)
        )
        assert not true & false
        assert len(true) == len(side) / 2


def test_no_file_and_no_positive_is_on_both_sides(real: tuple[list[Pair], list[Pair]]) -> None:
    train, held_out = real
    assert not {p.file for p in train} & {p.file for p in held_out}
    positives = [{(p.signature, p.description) for p in side if p.label} for side in real]
    assert not positives[0] & positives[1]


def test_pairs_depend_on_the_seed_alone(library: Path) -> None:
    assert build_pairs(0, stdlib=library) == build_pairs(0, stdlib=library)
    many = {repr(build_pairs(seed, stdlib=library)) for seed in range(8)}
    assert len(many) > 1


def test_fewer_functions_on_request(library: Path) -> None:
    train, held_out = build_pairs(0, stdlib=library, functions=3, held_out=0.34)
    assert (len(train), len(held_out)) == (4, 2)


def test_a_library_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no documented Python functions"):
        build_pairs(0, stdlib=tmp_path)


def test_pairs_cannot_be_changed(library: Path) -> None:
    pair = build_pairs(0, stdlib=library)[0][0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.label = 1  # type: ignore[misc]
