"""The check of pictures notices what it is for."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib import pyplot as plt
from pictures import check


def picture(width: float = 6.0, title: str = "What it is of") -> Any:
    figure, axes = plt.subplots(figsize=(width, 3), layout="constrained")
    figure.suptitle(title)
    axes.barh([0, 1], [1.0, 2.0])
    return figure, axes


def test_a_good_one_passes() -> None:
    figure, axes = picture()
    axes.set(xlabel="seconds")
    assert {"What it is of", "seconds"} <= set(check(figure))
    plt.close(figure)


@pytest.mark.parametrize(
    ("width", "title", "spoil", "message"),
    [
        (9.0, "t", lambda axes: None, "wider than a page"),
        (6.0, "", lambda axes: None, "says what it is of"),
        (6.0, "t" * 200, lambda axes: None, "cut off"),
        (6.0, "t", lambda axes: axes.set_xlabel("long " * 60), "cut off"),
        (6.0, "t", lambda axes: axes.set_xlim(0, 1.5), "a bar is cut"),
        (6.0, "t", lambda axes: axes.set_xlim(0.8, 3), "a bar is cut"),
        (6.0, "t", lambda axes: axes.barh([2], [1.0], left=1.0), "begins at zero"),
        (6.0, "t", lambda axes: axes.set_yticks([0, 0.02], ["one", "other"]), "over"),
        (6.0, "t", lambda axes: [axes.text(1, 1, name) for name in "ab"], "over"),
    ],
)
def test_a_spoilt_one_does_not(width: float, title: str, spoil: Any, message: str) -> None:
    figure, axes = picture(width, title)
    spoil(axes)
    with pytest.raises(AssertionError, match=message):
        check(figure)
    plt.close(figure)
