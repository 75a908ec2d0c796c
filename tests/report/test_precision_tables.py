"""What the page and the summary say of a precision plan."""

from __future__ import annotations

import dataclasses

import pytest

from leannorm.records import LayerPrecision, PrecisionCandidate, PrecisionPlan, PrecisionStep, RuntimeSupport
from leannorm.report.html import page
from leannorm.report.precision import formats, tables
from leannorm.report.rows import rows, verdict

FP32 = PrecisionCandidate("fp32", 0.0, 0.0, 0.0, 0.0, None)
LAYERS = (
    LayerPrecision(
        *("stem <b>", "node_1", "Conv", (-7.25, 6.5), (-3.125, 2.5), 0.0, 0.25, 0.0, 0.125, "fp16", "emulated"),
        "the smallest format allowed",
        (
            PrecisionCandidate("int8", 0.01, 0.02, 0.03, 0.04, "measured error"),
            PrecisionCandidate("fp16", 1e-4, 2e-4, 3e-4, 4e-4, None),
            FP32,
        ),
    ),
    LayerPrecision(
        *("head", "node_2", "Gemm", None, (0.0, 1e5), None, 0.0, 0.5, 0.0, "fp32", "native"),
        "every smaller format is rejected",
        (PrecisionCandidate("fp16", 1e-4, 2e-4, None, None, "overflow: its outputs reach 1e+05"), FP32),
    ),
)
PLAN = PrecisionPlan(
    runtime="onnxruntime 1.2",
    k=6.0,
    outside=1.97e-9,
    max_error=0.01,
    types=("int8", "fp16", "fp32"),
    support=(RuntimeSupport("Conv", "fp16", "emulated", "runs as Conv, Cast"),),
    layers=LAYERS,
    trail=(PrecisionStep("stem <b>", "int8", "fp16", 0.04, False, "the layers' errors add up to 0.04"),),
    relative_error=0.0012,
    rounded_error=0.0034,
    passed=True,
)


@pytest.fixture
def planned(deployment):
    files = (deployment.files[0], dataclasses.replace(deployment.files[0], precision="mixed", emulated=("fp16",)))
    return dataclasses.replace(deployment, precision=PLAN, files=files)


def test_a_sentence_counts_the_formats():
    assert formats(PLAN) == "fp16 in 1 (emulated), fp32 in 1 of 2 layers"


def test_layers_are_shown_with_both_ranges_and_their_reason():
    table = tables(PLAN)[0]
    assert table.columns[:4] == ("Layer", "Operator", "Predicted", "Measured")
    assert table.rows[0][:5] == ("stem <b>", "Conv", "-7.25 to 6.5", "-3.125 to 2.5", "0.00%")
    assert table.rows[0][5:9] == ("25.00%", "0.00%", "fp16", "emulated")
    assert table.rows[1][2] == table.rows[1][4] == "\N{EN DASH}"
    assert "6 |\N{GREEK SMALL LETTER GAMMA}|" in table.caption
    assert "2e-09" in table.caption


def test_what_was_rejected_is_shown_with_its_errors():
    table = tables(PLAN)[1]
    assert table.rows[0] == ("stem <b>", "int8", "0.01", "0.02", "0.03", "0.04", "measured error")
    assert table.rows[1][-1] == "chosen"
    raised = dataclasses.replace(LAYERS[0], type="fp32")
    considered = tables(dataclasses.replace(PLAN, layers=(raised,)))[1]
    assert considered.rows[1][-1] == "allowed alone, but not with the other layers"
    assert table.rows[2][-3:] == ("\N{EN DASH}", "\N{EN DASH}", "overflow: its outputs reach 1e+05")


def test_the_trail_is_shown_where_there_is_one():
    assert "the layers' errors add up to 0.04 (predicted)" in tables(PLAN)[2].rows[0]
    assert len(tables(dataclasses.replace(PLAN, trail=()))) == 3


def test_the_page_holds_it_escaped(planned, parse):
    text = parse(page([planned])).text
    assert "fp16 in 1 (emulated), fp32 in 1 of 2 layers. Runtime: onnxruntime 1.2." in text
    assert "relative error is 0.0012, 0.01 is allowed" in text
    assert "rounded as the formats say, the error is 0.0034" in text
    assert "stem <b>" in text  # as text, not as a tag
    assert "runs as Conv, Cast" in text


def test_an_emulated_latency_is_labelled_in_table_details_and_chart(planned, parse):
    assert [row.latency.endswith("emulated") for row in rows(planned)] == [False, False, True]
    text = parse(page([planned])).text
    assert "; fp16 is emulated, the time is not what fp16 takes where it is native" in text
    assert "mixed (emulated)" in text


def test_the_summary_counts_the_formats(planned, deployment):
    assert verdict([planned]).sentences[-1].endswith("fp16 in 1 (emulated), fp32 in 1 of 2 layers.")
    assert (
        verdict([deployment]).sentences
        == verdict([dataclasses.replace(planned, precision=None, files=deployment.files)]).sentences
    )


def test_without_a_plan_the_page_says_nothing_of_it(deployment, parse):
    assert "Number format" not in parse(page([deployment])).text
