"""Records to a table for the terminal."""

from __future__ import annotations

from dataclasses import astuple
from typing import TYPE_CHECKING

from leannorm.report.rows import COLUMNS, names, rows, verdict
from leannorm.report.wording import visible

try:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text
except ImportError as missing:
    raise ImportError(f"The summary needs rich: pip install 'leannorm[train]' (got: {missing})") from missing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leannorm.records import Deployment


def summary(deployments: Sequence[Deployment]) -> Table:
    """Return the figures of the page's summary as a table that rich prints, with the verdict below it.

    Args:
        deployments: the deployments to show, in this order.
    """
    judged = verdict(deployments)
    table = Table(
        caption=_text("\n".join((f"{judged.headline}. {' '.join(judged.sentences)}", *judged.failures))),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("Statistics", overflow="fold")
    for key, title in COLUMNS.items():
        if key == "form":
            table.add_column(title, overflow="fold")
        else:
            # Names may fold in a narrow terminal, figures may not; so it fits 80 columns.
            table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, deployment in zip(names(deployments), deployments, strict=True):
        for i, row in enumerate(lines := rows(deployment)):
            cells = (_text(cell) for cell in astuple(row))
            table.add_row(_text(name if i == 0 else ""), *cells, end_section=i == len(lines) - 1)
    return table


def _text(cell: str) -> Text:
    # A Text is shown as it is; in a plain string rich would obey "[red]".
    return Text(visible(cell))
