"""deploy with a precision of its own: which files are there, what the record and the page say of the plan."""

from __future__ import annotations

import onnx
import pytest

from leannorm import records
from leannorm.deploy import deploy
from leannorm.deploy.precision import support
from leannorm.deploy.precision.layers import layers_of
from leannorm.deploy.precision.spelling import parse_precision
from leannorm.records import Deployment


@pytest.fixture(scope="module")
def planned(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("planned")
    (out / "model.int8.onnx").write_bytes(b"of an earlier deployment")
    return deploy(checkpoint, out=out, precision="plan", overwrite=True), out


def test_a_plan_ships_a_mixed_file_in_place_of_the_int8_one(planned):
    deployment, out = planned
    names = ["model.fp32.onnx", "model.mixed.onnx", "report.html", "report.json"]
    assert sorted(file.name for file in out.iterdir()) == names
    assert records.read(Deployment, out / "report.json") == deployment
    assert [file.precision for file in deployment.files] == ["fp32", "mixed"]
    assert deployment.passed


def test_the_mixed_file_is_the_plan(planned):
    deployment, out = planned
    plan, file = deployment.precision, deployment.files[1]
    assert [layer.layer for layer in plan.layers] == ["1", "4", "8", "10"]
    assert [layer.predicted is None for layer in plan.layers] == [False, False, False, True]
    model = onnx.load(out / "model.mixed.onnx")
    onnx.checker.check_model(model, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    written = [{1: "fp32", 3: "int8"}[kinds[layer.weight]] for layer in layers_of(model, any_type=True)]
    assert written == [layer.type for layer in plan.layers]
    assert plan.passed
    assert plan.relative_error == pytest.approx(file.verification.relative_error, rel=1e-6)
    assert file.verification.max_error == 0.01
    assert file.verification.passed
    assert file.emulated == ()
    assert {"native"} == {layer.computed for layer in plan.layers}


def test_the_page_says_why_each_layer_has_its_format(planned):
    deployment, out = planned
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Number format of each layer" in page
    for layer in deployment.precision.layers:
        assert layer.reason.partition("'")[0] in page


def test_formats_that_are_asked_for_are_labelled_where_they_are_emulated(checkpoint, tmp_path):
    deployment = deploy(checkpoint, out=tmp_path, precision="plan:fp16")
    plan, file = deployment.precision, deployment.files[1]
    assert {layer.type for layer in plan.layers} == {"fp16"}
    assert 1e-5 < plan.relative_error < 0.01
    native = support("Conv", "fp16").computed == support("Gemm", "fp16").computed == "native"
    assert file.emulated == (() if native else ("fp16",))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ("mixed (emulated)" in page) is not native
    assert ("fp16 is emulated, the time is not what fp16 takes where it is native" in page) is not native
    assert file.bytes < 0.7 * deployment.files[0].bytes


def test_fp32_alone(checkpoint, tmp_path):
    deployment = deploy(checkpoint, out=tmp_path, precision="fp32")
    assert [file.file for file in deployment.files] == ["model.fp32.onnx"]
    assert deployment.precision is None
    assert not (tmp_path / "model.int8.onnx").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp32", ("fp32", None)),
        ("int8", ("int8", None)),
        ("plan", ("plan", None)),
        ("plan:int8, bf16", ("plan", ("int8", "bf16"))),
    ],
)
def test_precision_is_spelled(text, expected):
    assert parse_precision(text) == expected


@pytest.mark.parametrize("text", ["", "fp16", "plan:", "plan:fp8", "int8:fp16", "Plan"])
def test_other_spellings_are_refused_before_anything_is_made(text, tmp_path):
    with pytest.raises(ValueError, match="precision must be fp32, int8, plan, or plan:"):
        deploy("missing.ckpt", out=tmp_path / "out", precision=text)
    assert not (tmp_path / "out").exists()
