"""Folded trainings beside unfused ones: curves, resuming, the page; with the digits."""

import dataclasses
import itertools
import json
from pathlib import Path

import folded_training
import pytest
import torch
from folded_training import Curve, Following, Pair

from leannorm import records
from leannorm.nn.calls import recorded
from leannorm.records import TrainingRun
from leannorm.train.models import build

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for name, value in {
        "MODEL": "resnet8",
        "DATA": "digits",
        "SOURCES": ("grid:1/4",),
        "RATES": {0.01: "low"},
        "STEPS": 3,
        "EPOCHS": 1,
        "RUNS": tmp_path / "runs",
        "RESULT": tmp_path / "result.json",
    }.items():
        monkeypatch.setattr(folded_training, name, value)


def test_what_is_there_is_not_run_again_and_a_stopped_run_goes_on(small, monkeypatch):
    stopped = folded_training.follow(2)
    for _ in range(9):
        records.write(folded_training.RESULT, next(stopped))
    monkeypatch.setattr(folded_training, "beginning", lambda *key: pytest.fail("the curves are there"))
    (found,) = folded_training.follow(2)
    assert [each.seed for each in found.pairs] == [0, 1]
    assert found.pairs[0] == folded_training.kept().pairs[0]
    records.write(folded_training.RESULT, found)
    assert list(folded_training.follow(2)) == []
    largest = {
        (dtype, form): max(folded_training.differences(found, 0.01, dtype, form))
        for dtype in folded_training.DTYPES
        for form in folded_training.FORMS
    }
    assert largest["float64", "fused"] <= largest["float64", "folded"] < 1e-13
    assert largest["float32", "fused"] <= largest["float32", "folded"] < 1e-4
    assert 0 < largest["float64", "moved"] < 1e-13 < largest["float32", "moved"] < 1e-4
    assert found.pairs[0].folded.model == "experiments/variants.py:resnet8_folded"
    assert found.pairs[0].accuracies == pytest.approx(found.pairs[0].accuracies[::-1], abs=0.2)
    monkeypatch.setattr(folded_training, "STEPS", 4)
    with pytest.raises(ValueError, match="made with other settings"):
        next(folded_training.follow(2))


def test_the_folded_model_folds_every_convolution_once_it_is_converted(monkeypatch):
    monkeypatch.chdir(ROOT)
    model = build("experiments/variants.py:resnet8_folded", classes=10, channels=3)
    folded_training.leannorm.convert(model, folded_training.leannorm.parse_statistics("grid:1/8"))
    with recorded() as calls:
        model(torch.randn(8, 3, 32, 32))
    assert sum(call.folded is not None for call in calls) == sum(
        isinstance(module, torch.nn.Conv2d) for module in model.modules()
    )


def test_the_page_says_what_the_numbers_are():
    raw = json.loads((ROOT / "benchmarks/results/digits-minimum.json").read_text(encoding="utf-8"))[0]
    run = records.from_json(TrainingRun, json.dumps(raw))
    unfused, folded = (
        dataclasses.replace(run, history=(dataclasses.replace(run.history[0], validation_accuracy=accuracy),))
        for accuracy in (0.5, 0.52)
    )
    curves = tuple(
        Curve(0.1, spelling, "float32", form, losses, 1, run.environment)
        for spelling, form, losses in (
            ("grid:1/8", "unfused", (2.0, 1.0)),
            ("grid:1/8", "folded", (2.0, 1.5)),
            ("fs:1/32", "unfused", (2.0, 4.0)),
            ("fs:1/32", "folded", (1.0, 5.0)),
            ("fs:1/32", "moved", (2.0, 4.0)),
        )
    )
    found = Following("resnet8", "digits", 64, 2, 1, curves, (Pair(0, unfused, folded), Pair(1, unfused, unfused)))
    assert folded_training.differences(found, 0.1, "float32", "folded") == [0.5, 0.5]
    text = folded_training.page(found)
    assert "| step | moved, float32 | folded, float32 |" in text
    assert "| 2 | 0.0e+00 | 5.0e-01 |" in text
    assert "| 0 | 50.00% | 52.00% | +2.00 |" in text
    assert "| mean | 50.00% | 51.00% | +1.00 ± 12.71: not resolved |" in text


def test_the_committed_page_is_made_from_the_committed_record():
    found = records.read(Following, ROOT / folded_training.RESULT)
    assert folded_training.page(found) == (ROOT / folded_training.PAGE).read_text(encoding="utf-8")
    assert {len(curve.losses) for curve in found.curves} == {folded_training.STEPS}
    keys = itertools.product(
        folded_training.RATES, folded_training.SOURCES, folded_training.DTYPES, folded_training.FORMS
    )
    assert sorted((c.learning_rate, c.statistics, c.dtype, c.form) for c in found.curves) == sorted(keys)
