"""A matplotlib figure to an SVG element inside a page, with the page's fonts and colours."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from leannorm.report.wording import visible

try:
    import matplotlib
except ImportError as missing:
    raise ImportError(f"Charts need matplotlib: pip install 'leannorm[report]' (got: {missing})") from missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SERIES = 6
"""Number of series colours that the style sheet defines."""

# matplotlib knows no CSS variables: figures are drawn with stand-ins, which `inline` replaces.
INK, GRID = "#fe0000", "#fe0001"
_VARIABLES = {INK: "var(--ink-soft)", GRID: "var(--rule)"}
_VARIABLES |= {f"#ff{i:04x}": f"var(--series-{i})" for i in range(SERIES)}


def colour(place: int) -> str:
    """Return the stand-in for the colour of the run with this place."""
    return f"#ff{place % SERIES:04x}"


def inline(figure: Figure, identity: str, title: str, description: str) -> str:
    """Return a figure as an SVG element.

    Args:
        figure: drawn in stand-in colours, under ``svg.fonttype: none``.
        identity: the element's id and the prefix of all ids in it, unique in the page.
        title: what it shows, in a few words, for readers that do not see it.
        description: what can be seen in it.
    """
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # nothing that differs between two runs
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": identity}):
        # The browser chooses the font: that matplotlib's own lacks a letter changes nothing.
        warnings.filterwarnings("ignore", r"Glyph .* missing from|Matplotlib currently does not support")
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    for definitions in root.iter("{http://www.w3.org/2000/svg}defs"):
        for style in definitions.findall("{http://www.w3.org/2000/svg}style"):
            definitions.remove(style)  # it would hold for the whole page
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        element.attrib = {key: _own(key, value, identity) for key, value in attributes.items()}
    for fixed in ("width", "height", "version"):
        del root.attrib[fixed]
    named, described = f"{identity}-title", f"{identity}-description"
    root.attrib |= {"id": identity, "role": "img", "aria-labelledby": named, "aria-describedby": described}
    root.insert(0, _text("title", named, title))
    root.insert(1, _text("desc", described, description))
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _own(key: str, value: str, identity: str) -> str:
    match key:
        case "id":
            return f"{identity}-{value}"
        case "href" | "clip-path":
            return value.replace("#", f"#{identity}-", 1)
        case "style":
            for stand_in, variable in _VARIABLES.items():
                value = value.replace(stand_in, variable)
    return value


def _text(tag: str, identity: str, text: str) -> ElementTree.Element:
    element = ElementTree.Element(tag, {"id": identity})
    element.text = visible(text)
    return element
