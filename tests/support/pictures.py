"""Rules for every picture: nothing cut off, no overlapping labels, no wider than a page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

PAGE = 8.27  # inches: A4
SLACK = 2.0  # pixels


@contextmanager
def kept_figures() -> Iterator[list[Figure]]:
    """The figures that are drawn and closed inside the block."""
    kept: list[Figure] = []
    close = plt.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "close", kept.append)
        yield kept
    for figure in kept:
        close(figure)


def check_all(draw: Callable[[], Any], count: int = 1) -> list[list[str]]:
    """Check each of the `count` figures that `draw` makes; return what is written on each."""
    with kept_figures() as figures:
        draw()
        assert len(figures) == count
        return [check(figure) for figure in figures]


def check(figure: Figure) -> list[str]:
    """Check one figure; return what is written on it."""
    figure.canvas.draw()
    assert figure.get_figwidth() <= PAGE, "wider than a page"
    assert figure.get_suptitle(), "a picture says what it is of"
    for axes in figure.axes:
        _check_bars(axes)
        for axis in (axes.xaxis, axes.yaxis):
            # Of shared axes matplotlib hides the labels of all but one.
            ticks = [label for label in axis.get_ticklabels() if _is_seen(label)]
            low, high = sorted(axis.get_view_interval())
            at = dict(zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=False))
            shown = [label for label in ticks if low <= at.get(label, low) <= high]
            _check_apart(shown)
        _check_apart([text for text in axes.texts if _is_seen(text)])
        for legend in figure.legends:
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    written = [text for text in figure.findobj(Text) if _is_seen(text)]
    edges = figure.bbox
    for text in written:
        box = text.get_window_extent()
        if _is_hidden_tick(text, figure):
            continue
        inside = edges.x0 - SLACK <= box.x0 and box.x1 <= edges.x1 + SLACK
        inside = inside and edges.y0 - SLACK <= box.y0 and box.y1 <= edges.y1 + SLACK
        assert inside, f"cut off: {text.get_text()!r}"
    return [text.get_text() for text in written]


def _is_seen(text: Text) -> bool:
    return text.get_visible() and bool(text.get_text().strip())


def _is_hidden_tick(text: Text, figure: Figure) -> bool:
    """Whether it is the label of a tick outside of its axes, which is not drawn."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if text in (tick.label1, tick.label2):
                    return not low <= tick.get_loc() <= high
    return False


def _check_apart(texts: list[Text]) -> None:
    boxes = [(text, text.get_window_extent().padded(-SLACK / 2)) for text in texts]
    for (one, here), (other, there) in itertools.combinations(boxes, 2):
        assert not here.overlaps(there), f"{one.get_text()!r} over {other.get_text()!r}"


def _check_bars(axes: Any) -> None:
    """Bars begin at zero, and end inside of the axes."""
    bars = [
        p for p in axes.patches if isinstance(p, Rectangle) and p.get_width() and p.get_height()
    ]
    for bar in bars:
        (x0, y0), (x1, y1) = bar.get_bbox().min, bar.get_bbox().max
        (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
        assert left <= x0 and x1 <= right and bottom <= y0 and y1 <= top, "a bar is cut"
        assert 0.0 in (x0, y0), "a bar begins at zero"
