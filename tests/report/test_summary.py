from __future__ import annotations

import dataclasses
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from leannorm.records import Deployment
from leannorm.report.html import page
from leannorm.report.rows import COLUMNS, Row, names, rows
from leannorm.report.text import summary
from leannorm.report.wording import number, points, share, size, visible


def printed(deployments, width=80):
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False).print(summary(deployments))
    return stream.getvalue()


def test_the_terminal_shows_the_rows_in_80_columns(deployment):
    text = printed([deployment])
    for row in rows(deployment):
        for cell in dataclasses.astuple(row):
            assert cell in text
    assert "1 of 1 deployment failed." in text
    assert "BatchNormalization_3" in text
    assert max(map(len, text.splitlines())) <= 80


def test_page_and_terminal_show_the_same_cells(deployment, parse):
    parsed = parse(page([deployment]))
    in_page = parsed.text
    cells = [cell for row in rows(deployment) for cell in dataclasses.astuple(row)]
    position = in_page.index("Latency Check")
    for cell in cells:
        position = in_page.index(cell, position) + len(cell)
    table = summary([deployment])
    in_terminal = zip(*(list(column.cells) for column in table.columns[1:]), strict=True)
    assert [cell.plain for row in in_terminal for cell in row] == cells


def test_columns_name_every_field_of_a_row():
    assert tuple(COLUMNS) == tuple(field.name for field in dataclasses.fields(Row))


def test_markup_and_terminal_escapes_in_names_are_shown_not_obeyed(deployment):
    training = dataclasses.replace(deployment.training, statistics="[red]x[/red]")
    file = dataclasses.replace(deployment.files[1], precision="[/]\x1b[2J", file="[bold]f")
    text = printed([dataclasses.replace(deployment, training=training, files=(file,))])
    for expected in ("[red]x[/red]", "[/]\\x1b[2J", "[bold]f"):
        assert expected in text
    assert "\x1b" not in text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.from_type(Deployment), max_size=3), st.integers(20, 200))
def test_any_record_gives_a_table(deployments, width):
    assert f"{len(deployments)} deployment" in " ".join(printed(deployments, width).split())


def test_names_are_the_shortest_that_tell_deployments_apart(deployment):
    def run(**changes):
        return dataclasses.replace(deployment, training=dataclasses.replace(deployment.training, **changes))

    assert names([run(), run(statistics="fs:1/4")]) == ("full", "fs:1/4")
    assert names([run(), run(model="resnet20")]) == ("resnet8, full", "resnet20, full")
    assert names([run(), run(seed=8)]) == ("resnet8, full, seed 7", "resnet8, full, seed 8")
    assert names([run(), run()]) == ("1: runs/full/best.ckpt", "2: runs/full/best.ckpt")


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        (number(0.0004567), "0.000457"),
        (number(99.96), "100"),
        (number(1234.5), "1,234"),
        (number(float("inf")), "inf"),
        (share(None), "\N{EN DASH}"),
        (share(1.0), "100.00%"),
        (share(1.5), "1.5"),
        (share(float("nan")), "nan"),
        (points(-0.00284), "-0.28 percentage points"),
        (points(float("nan")), "nan"),
        (size(1), "1 byte"),
        (size(999), "999 bytes"),
        (size(1000), "1 kB"),
        (size(999_999), "1,000 kB"),
        (size(25_557_032), "25.6 MB"),
        (size(-3_000_000_000), "-3 GB"),
        (visible("a\tb\nc\u202e\U0001f600"), "a\\tb\nc\\u202e\U0001f600"),
    ],
)
def test_values_are_spelled(spelled, expected):
    assert spelled == expected
