"""How the report spells its values: one spelling for the page, its charts and the terminal."""

from __future__ import annotations

import math

NOT_MEASURED = "\N{EN DASH}"


def visible(text: str) -> str:
    """Return ``text`` with every character that a reader could not see spelled as a Python escape.

    Names of files and modules can hold control characters, terminal escapes, reversed writing and half
    surrogates (which no UTF-8 file can hold): a reader shall see them, a terminal shall not obey them. Line
    breaks stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def number(value: float) -> str:
    """Return three significant digits, whole numbers with thousands separated; NaN and infinities by name."""
    return f"{value:,.0f}" if 100 <= abs(value) < 1e9 else f"{value:.3g}"


def significant(value: float) -> str:
    """Return four significant digits; NaN and infinities by name."""
    return f"{value:.4g}"


def share(value: float | None) -> str:
    """Return a share in [0, 1] as a percentage; any other number, NaN included, as it is."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.2%}" if 0 <= value <= 1 else f"{value:g}"


def tick_share(value: float) -> str:
    """Return a share as a percentage without trailing zeros, as an axis shows it."""
    return f"{100 * value:.4g}%"


def points(difference: float) -> str:
    """Return the difference of two shares in signed percentage points."""
    return f"{100 * difference:+.2f} percentage points" if math.isfinite(difference) else f"{difference:g}"


def error(value: float) -> str:
    """Return an error with two significant digits; NaN and infinities by name."""
    return f"{value:.2g}"


def size(count: int) -> str:
    """Return a number of bytes in the largest decimal unit that keeps it at one or above."""
    for exponent, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if abs(count) >= 10**exponent:
            return f"{number(count / 10**exponent)} {unit}"
    return counted(count, "byte", "bytes")


def milliseconds(value: float) -> str:
    """Return a duration given in milliseconds."""
    return f"{number(value)} ms"


def counted(count: int, one: str, many: str) -> str:
    """Return a number with the noun in the form that it asks for."""
    return f"{count:,} {one if count == 1 else many}"
