from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import re
import sys

import matplotlib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leannorm.records import Deployment, LayerPoint, LayerTrace, SmoothnessPoint, TrainingTrace, TransformReport
from leannorm.report.html import page

EVIL = "<script>alert(1)</script>\"&' $x_1$ _{{ 7*7 }} \x1b[31m\x00\ud800\u202e]]> \u4e2d"
SEEN = "<script>alert(1)</script>\"&' $x_1$ _{{ 7*7 }} \\x1b[31m\\x00\\ud800\\u202e]]> \u4e2d"


def replaced(record, kind, new):
    """Return a record with every value of one type replaced by ``new(value)``."""
    if type(record) is kind:
        return new(record)
    if dataclasses.is_dataclass(record):
        fields = {f.name: replaced(getattr(record, f.name), kind, new) for f in dataclasses.fields(record)}
        return dataclasses.replace(record, **fields)
    if isinstance(record, tuple):
        return tuple(replaced(item, kind, new) for item in record)
    return record


def named(deployment, statistics):
    training = dataclasses.replace(deployment.training, statistics=statistics)
    return dataclasses.replace(deployment, training=training)


def test_the_page_is_balanced_and_needs_nothing_from_outside(deployment, parse):
    html = page([deployment, named(deployment, "grid:1/8")])
    parsed = parse(html)
    assert html.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in parsed.structure}
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    identities = parsed.values("id")
    assert len(set(identities)) == len(identities)
    assert not parsed.values("src")
    assert {value[1:] for value in parsed.values("href")} <= set(identities)
    assert {value[0] for value in parsed.values("href")} == {"#"}
    referred = [*parsed.values("aria-labelledby"), *parsed.values("aria-describedby")]
    assert {name for value in referred for name in value.split()} <= set(identities)
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(identities)
    assert "http" not in html.replace("http-equiv", "")
    assert "@import" not in html


def trace(statistics):
    points = (LayerPoint(0, 0.25, 1.5, None, 3.5), LayerPoint(20, 0.125, 1.25, 0.375, math.nan))
    smoothness = (SmoothnessPoint(0, 2.3, 2.25, 2.4, 0.5), SmoothnessPoint(20, 1.3, 1.25, 1.4, 0.75))
    return TrainingTrace(statistics, tuple(LayerTrace(f"bn{i}", points) for i in range(3)), smoothness)


def test_recorded_layers_are_drawn_for_those_that_have_them(deployment, parse):
    others = [deployment, named(deployment, "grid:1/8"), named(deployment, "none")]
    parsed = parse(page(others, traces=[trace("full"), None, trace("none")]))
    identities = parsed.values("id")
    assert len(set(identities)) == len(identities)
    assert sum(name.startswith("layers-") for name in identities if name.endswith("-title")) == 15
    assert "Layers while training" in parsed.text
    assert "full, bn1: 0.375 at step 20" in parsed.text
    assert "1 value is not drawn" in parsed.text or "2 values are not drawn" in parsed.text
    assert "grid:1/8, bn" not in parsed.text
    assert "Layers while training" not in parse(page(others)).text


def test_a_reader_that_does_not_see_can_follow(deployment, parse):
    parsed = parse(page([deployment]))
    tags = [tag for tag, _ in parsed.structure]
    assert tags.count("h1") == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert tags.count("svg") == 4
    assert tags.count("desc") == 4
    assert parsed.values("role").count("img") == 4
    captions = tags.count("caption") + sum(head == ("th", ("scope",)) for head in parsed.structure)
    assert captions > tags.count("table")
    assert ("html", "lang", "en") in parsed.attributes


def test_every_figure_and_name_of_the_record_is_shown(deployment, parse):
    text = parse(page([deployment])).text
    for expected in (
        *(
            "resnet8",
            "digits",
            "full",
            "seed 7",
            "batches of 48",
            "0.125",
            "3 \N{MULTIPLICATION SIGN} 33 \N{MULTIPLICATION SIGN} 35",
            "zero, one",
        ),
        *("Linux machine", "2 cores", "Python 3.11.7", "torch 2.13.0", "abc1234", "runs/full/best.ckpt"),
        *("2.345", "1.876", "43.21%", "0.0625", "3.21", "0.567", "0.789", "97.53%", "3.33"),
        *("recalibrated", "97.81%", "17 training batches", "+0.28 percentage points"),
        *("layer1.bn1", "folded into layer1.conv1", "layer2.bn1", "its input has two users"),
        *(
            "1 change",
            "1 refusal",
            "4.56 ms",
            "model.fp32.onnx",
            "fp32",
            "312,431 bytes",
            "312 kB",
            "1.23 ms",
        ),
        *("3.1e-07", "1.4e-05", "100.00%", "97.82%", "0.001", "model.int8.onnx", "int8", "88,214 bytes"),
        *("0.789 ms", "BatchNormalization_3", "0.043", "0.22", "99.17%", "96.99%", "0.02", "360"),
        "1 of 1 deployment failed",
        "full: model.int8.onnx: its relative error is 0.043, 0.02 is allowed",
        "Normalization is left in 1 of the 2 shipped files.",
        "The largest relative error is 0.043.",
        "Shipping changed the accuracy by -0.82 percentage points at worst.",
        "full: 43.21% at epoch 1, 97.53% at epoch 2",
        "int8, full: 0.789 ms",
    ):
        assert expected in text, expected


def test_several_deployments_have_a_summary_and_a_section_each(deployment, parse):
    names = ["full", "grid:1/8", "fs:1/4"]
    parsed = parse(page([named(deployment, name) for name in names]))
    headings = "".join(text for tag, text in parsed.texts if tag == "h2").split()
    assert headings == names
    assert [v for v in parsed.values("id") if re.fullmatch(r"run-\d", v)] == ["run-1", "run-2", "run-3"]
    assert [text for tag, text in parsed.texts if tag == "a"] == names


def test_names_never_become_markup_or_vanish(deployment, parse):
    plain_names = (f"name{i}" for i in itertools.count())
    evil_names = (f"{EVIL}{i};" for i in itertools.count())
    plain = parse(page([replaced(deployment, str, lambda _: next(plain_names))], title="title"))
    html = page([replaced(deployment, str, lambda _: next(evil_names))], title=EVIL)
    html.encode("utf-8")
    parsed = parse(html)
    assert parsed.structure == plain.structure
    fields = int(next(plain_names).removeprefix("name"))
    assert fields > 20
    for i in range(fields):
        assert f"{SEEN}{i};" in parsed.text
    drawn = " ".join(text for tag, text in parsed.texts if tag == "text")
    assert drawn.count("<script>") == 4  # fp32 and int8, in the charts of latency and size
    described = [text for tag, text in parsed.texts if tag == "desc"]
    assert all(SEEN in text for text in described)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.from_type(Deployment), min_size=1, max_size=2))
def test_any_record_gives_a_page(parse, deployments):
    html = page(deployments)
    html.encode("utf-8")
    parsed = parse(html)
    assert [tag for tag, _ in parsed.structure].count("h2") == len(deployments)
    assert len(set(parsed.values("id"))) == len(parsed.values("id"))


@pytest.mark.parametrize(("value", "seen"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_numbers_that_are_not_finite_are_shown_as_such(deployment, parse, value, seen):
    parsed = parse(page([replaced(deployment, float, lambda _: value)]))
    assert f"{seen} ms" in parsed.text
    assert f"The largest relative error is {seen}." in parsed.text
    assert "changes the validation accuracy by nan, from" in parsed.text
    assert "2 values are not drawn: not finite, or beyond 1e+15." in parsed.text
    assert [tag for tag, _ in parsed.structure].count("svg") == 1  # the file sizes are whole numbers


def test_one_value_that_is_not_finite_leaves_a_gap_in_its_line(deployment, parse):
    first, second = deployment.training.history
    third = dataclasses.replace(second, epoch=3, training_loss=math.nan)
    training = dataclasses.replace(deployment.training, history=(first, second, third))
    parsed = parse(page([dataclasses.replace(deployment, training=training)]))
    assert "1 value is not drawn" in parsed.text
    assert [tag for tag, _ in parsed.structure].count("svg") == 4


def test_the_worst_error_is_found_among_several_with_nan(deployment, parse):
    checks = [dataclasses.replace(f.verification, relative_error=math.nan) for f in deployment.files[:1]]
    files = (dataclasses.replace(deployment.files[0], verification=checks[0]), deployment.files[1])
    parsed = parse(page([dataclasses.replace(deployment, files=files)]))
    assert "The largest relative error is nan." in parsed.text


def test_what_is_empty_is_said_to_be(deployment, parse):
    training = dataclasses.replace(deployment.training, history=(), classes=())
    empty = dataclasses.replace(
        deployment,
        training=training,
        files=(),
        fold=TransformReport(),
        passed=True,
        reference_latency_ms=math.nan,
    )
    parsed = parse(page([empty]))
    for expected in ("1 deployment passed", "No epoch was recorded.", "No file was shipped.", "0 refusals"):
        assert expected in parsed.text
    assert "svg" not in [tag for tag, _ in parsed.structure]
    assert parsed.text.count("No values were recorded.") == 3


def test_a_failure_without_a_reason_is_not_hidden(deployment, parse):
    text = parse(page([dataclasses.replace(deployment, files=deployment.files[:1])])).text
    assert "full: recorded as failed, though each file's check passed" in text


@pytest.mark.parametrize(("count", "is_open"), [(10, True), (11, False)])
def test_long_lists_of_refusals_are_folded_away(deployment, parse, count, is_open):
    fold = TransformReport((), deployment.fold.refusals * count)
    parsed = parse(page([dataclasses.replace(deployment, fold=fold)]))
    assert (("details", ("open",)) in parsed.structure) is is_open
    assert parsed.text.count("its input has two users") == count


def test_same_records_give_the_same_page_whatever_the_user_set_in_matplotlib(deployment):
    expected = page([deployment])
    with matplotlib.rc_context({"axes.grid": True, "xtick.labelsize": 30.0, "svg.fonttype": "path"}):
        assert page([deployment]) == expected


def test_no_deployment_is_an_error():
    with pytest.raises(ValueError, match="at least one deployment, got none"):
        page([])


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("html", "jinja2", "report"), ("charts", "matplotlib", "report"), ("text", "rich.table", "train")],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, module, package, extra):
    for loaded in [name for name in sys.modules if name.startswith("leannorm.report.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'leannorm\[{extra}\]'"):
        importlib.import_module(f"leannorm.report.{module}")
