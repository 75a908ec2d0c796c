"""Charts as inline SVG: matplotlib draws the marks, the page's style sheet gives colours and fonts."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from leannorm.report.format import counted, visible

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ImportError as missing:
    raise ImportError(f"Charts need matplotlib: pip install 'leannorm[report]' (got: {missing})") from missing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

SERIES = 6
"""Number of series colours that the style sheet defines."""
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
"""matplotlib's markers and the characters that stand for them in the page's legend."""
LARGEST = 1e15
"""Values beyond are not drawn, as NaN and infinities: axes that hold them cannot be divided into ticks."""

# matplotlib knows no CSS variables: it draws with stand-ins, which `_inline` replaces.
_INK, _GRID = "#fe0000", "#fe0001"
_COLOURS = {_INK: "var(--ink-soft)", _GRID: "var(--rule)"} | {
    f"#ff{i:04x}": f"var(--series-{i})" for i in range(SERIES)
}
_WIDTH = (
    5.0  # inches; 360 units of the view box, a phone's width, so that text is never shrunk below its size
)
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "text.parse_math": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Series:
    """One run's points ``(x, y)``, under the name and in the place (colour, marker) that it has in the legend."""

    name: str
    place: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Bar:
    """One bar in the colour of the run with this place and name."""

    category: str
    name: str
    place: int
    value: float


@dataclass(frozen=True)
class Chart:
    """A drawn chart; ``svg`` is None where there was nothing to draw, ``left_out`` counts values without a place."""

    title: str
    svg: str | None
    left_out: int


def lines(identity: str, title: str, series: Sequence[Series], spell: Callable[[float], str]) -> Chart:
    """Draw values over epochs, one line a run.

    Args:
        identity: prefix of the ids in the SVG, unique in the page.
        title: what the values are.
        series: the runs.
        spell: how a value is written on the axis and in the description.
    """
    drawn = {s: [p for p in s.points if all(map(_drawable, p))] for s in series}
    left_out = sum(len(s.points) - len(points) for s, points in drawn.items())
    if not any(drawn.values()):
        return Chart(title, None, left_out)
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _figure(height=2.9, box=(0.13, 0.16, 0.84, 0.79))
        for s, points in drawn.items():
            _line(axes, s, points)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spell(value)))
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        described = (
            f"{s.name}: {spell(points[0][1])} at epoch {points[0][0]}, {spell(points[-1][1])} at epoch {points[-1][0]}"
            for s, points in drawn.items()
            if points
        )
        return Chart(title, _inline(figure, identity, f"{title} over epochs", "; ".join(described)), left_out)


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
        return Chart(title, None, left_out)
    groups = {bar.category: [b for b in drawn if b.category == bar.category] for bar in drawn}
    rows = len(drawn) + 1.6 * len(groups)
    with matplotlib.style.context(_STYLE, after_reset=True):
        figure, axes = _figure(height=0.19 * rows + 0.1, box=(0.01, 0.0, 0.78, 1.0))
        y = 0.0
        for category, group in groups.items():
            axes.text(0, y + 0.75, _shortened(category), va="center")
            y += 1.6
            for bar in group:
                axes.barh(y, bar.value, height=0.72, color=_colour(bar.place))
                axes.annotate(
                    spell(bar.value), (max(bar.value, 0), y), (4, 0), textcoords="offset points", va="center"
                )
                y += 1
        axes.set_ylim(rows, -0.2)
        axes.set_axis_off()
        described = (f"{bar.category}, {bar.name}: {spell(bar.value)}" for bar in drawn)
        return Chart(title, _inline(figure, identity, title, "; ".join(described)), left_out)


def legend(place: int) -> tuple[str, str]:
    """Return the character and the CSS colour that mark the run with this place."""
    return list(MARKERS.values())[place % len(MARKERS)], f"var(--series-{place % SERIES})"


def note(chart: Chart) -> str:
    """Say what the chart does not show; empty if it shows everything."""
    if not chart.left_out:
        return "" if chart.svg else "No values were recorded."
    return f"{counted(chart.left_out, 'value that is', 'values that are')} not finite or beyond {LARGEST:g} not drawn."


def _drawable(value: float) -> bool:
    return abs(value) <= LARGEST  # false for NaN


def _shortened(text: str, length: int = 48) -> str:
    text = visible(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _colour(place: int) -> str:
    return f"#ff{place % SERIES:04x}"


def _figure(*, height: float, box: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes(box)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=6)
    return figure, axes


def _line(axes: Axes, series: Series, points: Sequence[tuple[float, float]]) -> None:
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=_colour(series.place),
        linewidth=1.6,
        marker=list(MARKERS)[series.place % len(MARKERS)],
        markersize=4,
        markevery=max(1, len(points) // 10),
    )


def _inline(figure: Figure, identity: str, title: str, description: str) -> str:
    """Return a figure as an SVG element for an HTML page: described, with ids of its own and the page's colours."""
    buffer = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": identity}):
        # The browser chooses the font; that matplotlib's own has no such letter changes nothing.
        warnings.filterwarnings("ignore", r"Glyph .* missing from|Matplotlib currently does not support")
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}style"):  # it would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {k.rpartition("}")[2]: _local(k, v, identity) for k, v in element.attrib.items()}
    for size in ("width", "height", "version"):
        del root.attrib[size]
    root.attrib |= {
        "id": identity,
        "role": "img",
        "aria-labelledby": f"{identity}-title {identity}-description",
    }
    for tag, text in (("desc", description), ("title", title)):
        child = ElementTree.Element(tag, {"id": f"{identity}-{'title' if tag == 'title' else 'description'}"})
        child.text = visible(text)
        root.insert(0, child)
    return ElementTree.tostring(root, encoding="unicode")


def _local(key: str, value: str, identity: str) -> str:
    match key.rpartition("}")[2]:
        case "id":
            return f"{identity}-{value}"
        case "href":
            return value.replace("#", f"#{identity}-", 1)
        case "clip-path":
            return value.replace("url(#", f"url(#{identity}-", 1)
        case "style":
            for stand_in, variable in _COLOURS.items():
                value = value.replace(stand_in, variable)
            return value
    return value
