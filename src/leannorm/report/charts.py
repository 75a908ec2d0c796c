"""The charts of the page: what they show, drawn by matplotlib without a global state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leannorm.report import svg
from leannorm.report.wording import counted, visible

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as missing:
    raise ImportError(f"Charts need matplotlib: pip install 'leannorm[report]' (got: {missing})") from missing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

# matplotlib's markers, and the characters that stand for them in the page's legend.
_MARKERS = {
    "o": "\N{BLACK CIRCLE}",
    "s": "\N{BLACK SQUARE}",
    "^": "\N{BLACK UP-POINTING TRIANGLE}",
    "D": "\N{BLACK DIAMOND}",
    "v": "\N{BLACK DOWN-POINTING TRIANGLE}",
    "P": "\N{HEAVY GREEK CROSS}",
    "X": "\N{HEAVY MULTIPLICATION X}",
}
_LARGEST = 1e15  # axes that hold more, or infinities, cannot be divided into ticks
_WIDTH = 5.0  # inches: 360 units of the view box, a phone's width, so that text never shrinks
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "text.color": svg.INK,
    "text.parse_math": False,
    "axes.labelcolor": svg.INK,
    "xtick.color": svg.INK,
    "ytick.color": svg.INK,
}


@dataclass(frozen=True)
class Series:
    """One run's values by epoch or step; its place in the legend decides on colour and marker."""

    name: str
    place: int
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Bar:
    """One value of a run in a category; its place in the legend decides on the colour."""

    category: str
    name: str
    place: int
    value: float


@dataclass(frozen=True)
class Chart:
    """A chart as an SVG element, None where nothing could be drawn, and what it does not show."""

    title: str
    svg: str | None
    note: str


def lines(
    identity: str, title: str, series: Sequence[Series], spell: Callable[[float], str], *, over: str = "epoch"
) -> Chart:
    """Draw values over epochs or steps, one line a run, with gaps where a value cannot be drawn.

    Args:
        identity: prefix of the ids in the SVG, unique in the page.
        title: what the values are.
        series: the runs.
        spell: how a value is written on the axis and in the description.
        over: what is counted: "epoch" or "step".
    """
    drawn = [(run, [(x, y) for x, y in run.points if _drawable(x) and _drawable(y)]) for run in series]
    left_out = sum(len(run.points) - len(points) for run, points in drawn)
    described = "; ".join(f"{run.name}: {_ends(points, spell, over)}" for run, points in drawn if points)
    if not described:
        return _nothing(title, left_out)
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _figure(height=2.9, box=(0.14, 0.17, 0.84, 0.78))
        for run in series:
            _line(axes, run)
        axes.set_xlabel(over)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spell(value)))
        axes.grid(axis="y", color=svg.GRID, linewidth=0.8)
        return Chart(title, svg.inline(figure, identity, f"{title} over {over}s", described), _note(left_out))


def bars(identity: str, title: str, values: Sequence[Bar], spell: Callable[[float], str]) -> Chart:
    """Draw bars from zero, grouped by category, each with its value written at its end.

    Args:
        identity: prefix of the ids in the SVG, unique in the page.
        title: what the values are.
        values: the bars; categories stand in the order of their first appearance.
        spell: how a value is written.
    """
    drawn = [bar for bar in values if _drawable(bar.value)]
    left_out = len(values) - len(drawn)
    if not drawn:
        return _nothing(title, left_out)
    groups = {bar.category: [b for b in drawn if b.category == bar.category] for bar in drawn}
    heading = 1.6  # height of a category's name; a bar's is 1
    rows = len(drawn) + heading * len(groups)
    described = "; ".join(f"{bar.category}, {bar.name}: {spell(bar.value)}" for bar in drawn)
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _figure(height=0.2 * rows + 0.1, box=(0.0, 0.0, 0.8, 1.0))
        y = 0.0
        for category, group in groups.items():
            axes.text(0, y + heading / 2, _shortened(category), va="center")
            y += heading
            for bar in group:
                axes.barh(y, bar.value, height=0.72, color=svg.colour(bar.place))
                end = (max(bar.value, 0.0), y)
                axes.annotate(spell(bar.value), end, (4, 0), textcoords="offset points", va="center")
                y += 1
        axes.set_ylim(rows, -0.2)
        axes.set_axis_off()
        return Chart(title, svg.inline(figure, identity, title, described), _note(left_out))


def legend(place: int) -> tuple[str, str]:
    """Return the character and the CSS colour that mark the run with this place."""
    return list(_MARKERS.values())[place % len(_MARKERS)], f"var(--series-{place % svg.SERIES})"


def _drawable(value: float) -> bool:
    return abs(value) <= _LARGEST  # false for NaN


def _ends(points: Sequence[tuple[int, float]], spell: Callable[[float], str], over: str) -> str:
    (start, first), (end, last) = points[0], points[-1]
    return f"{spell(first)} at {over} {start}, {spell(last)} at {over} {end}"


def _nothing(title: str, left_out: int) -> Chart:
    return Chart(title, None, _note(left_out) or "No values were recorded.")


def _note(left_out: int) -> str:
    what = counted(left_out, "value is", "values are")
    return f"{what} not drawn: not finite, or beyond {_LARGEST:g}." if left_out else ""


def _shortened(text: str, length: int = 40) -> str:
    text = visible(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _figure(*, height: float, box: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes(box)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=6)
    return figure, axes


def _line(axes: Axes, run: Series) -> None:
    points = [(x, y if _drawable(y) else math.nan) for x, y in run.points if _drawable(x)]
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=svg.colour(run.place),
        linewidth=1.6,
        marker=list(_MARKERS)[run.place % len(_MARKERS)],
        markersize=4,
        markevery=max(1, len(points) // 10),
    )
