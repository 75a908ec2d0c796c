"""The recorder of layers: what it says, and that the training is what it would be without it."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leannorm import records
from leannorm.records import TrainingTrace
from leannorm.report.layers import QUANTITIES, layer_charts
from leannorm.train import checkpoint
from leannorm.train.layers import LENGTHS
from leannorm.train.run import train

ARGUMENTS = {"epochs": 2, "seed": 0, "batch_size": 512, "learning_rate": 0.05, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folders = {}
    for statistics in ("full", "grid:1/4@step", "none"):
        folders[statistics] = tmp_path_factory.mktemp("recorded")
        train("resnet8", "digits", statistics=statistics, out=folders[statistics], record_layers=3, **ARGUMENTS)
    return folders


def trace_of(folder):
    return records.read(TrainingTrace, folder / "layers.json")


@pytest.mark.parametrize("statistics", ["full", "grid:1/4@step"])
def test_the_training_is_what_it_would_be_unrecorded_and_unfused(recorded, statistics, tmp_path):
    train("resnet8", "digits", statistics=statistics, out=tmp_path, fuse=False, **ARGUMENTS)
    mine, theirs = (checkpoint.read(folder / "last.ckpt") for folder in (recorded[statistics], tmp_path))
    assert all(torch.equal(value, theirs["state_dict"][name]) for name, value in mine["state_dict"].items())
    assert mine["training_run"].partition('"history"')[0] == theirs["training_run"].partition('"history"')[0]


@pytest.mark.parametrize("statistics", ["full", "grid:1/4@step", "none"])
def test_every_layer_and_every_third_step_is_there(recorded, statistics):
    trace = trace_of(recorded[statistics])
    assert trace.statistics == statistics
    assert [layer.layer for layer in trace.layers][::8] == ["bn", "stages.2.shortcut.1"]
    assert len(trace.layers) == 9
    for layer in trace.layers:
        assert [point.step for point in layer.points] == [0, 3]  # two epochs of two batches
        assert [point.shift is None for point in layer.points] == [True, False]
    assert [point.step for point in trace.smoothness] == [0, 3]
    assert all(point.lowest <= point.highest for point in trace.smoothness)


def test_the_first_step_in_figures(recorded):
    trace = trace_of(recorded["full"])
    first = next(layer for layer in trace.layers if layer.layer == "bn").points[0]
    assert first.mean == pytest.approx(0, abs=1e-6)
    assert first.variance == pytest.approx(1, rel=1e-3)
    events = EventAccumulator(str(recorded["full"] / "tensorboard")).Reload().Scalars("training_loss_step")
    assert [point.loss for point in trace.smoothness] == pytest.approx([events[0].value, events[3].value], rel=1e-5)
    unnormalized = trace_of(recorded["none"])
    other = next(layer for layer in unnormalized.layers if layer.layer == "bn").points[0]
    assert other.variance != pytest.approx(1, rel=1e-2)


def test_the_loss_along_the_gradient_in_figures():
    from leannorm.train.layers import _smoothness

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    weights = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(x), labels).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    found = _smoothness(model, (x, labels), 7, 2.0)
    losses = []
    for a in LENGTHS:
        weight, bias = (w - 2 * a * g for w, g in zip(weights, gradients, strict=True))
        losses.append(F.cross_entropy(x @ weight.T + bias, labels).item())
    assert (found.step, found.lowest, found.highest) == (7, pytest.approx(min(losses)), pytest.approx(max(losses)))
    moved = [(w - 2 * g).requires_grad_() for w, g in zip(weights, gradients, strict=True)]
    there = torch.autograd.grad(F.cross_entropy(x @ moved[0].T + moved[1], labels), moved)
    difference = torch.cat([(a - b).flatten() for a, b in zip(there, gradients, strict=True)]).norm()
    assert found.gradient_change == pytest.approx(
        (difference / torch.cat([g.flatten() for g in gradients]).norm()).item()
    )


def test_plots_in_the_report(recorded):
    charts = layer_charts([trace_of(recorded["full"]), None, trace_of(recorded["none"])])
    assert len(charts) == 3 * len(QUANTITIES) + 3
    assert all(chart.svg for chart in charts)
    assert len({chart.title for chart in charts}) == len(charts)
    assert layer_charts([None]) == ()


def test_a_resumed_run_keeps_what_it_recorded(recorded, tmp_path):
    train("resnet8", "digits", statistics="full", out=tmp_path, record_layers=3, **ARGUMENTS)
    before = trace_of(tmp_path)
    train("resnet8", "digits", statistics="full", out=tmp_path, record_layers=3, resume=True, **ARGUMENTS)
    assert dataclasses.asdict(trace_of(tmp_path))["smoothness"] == dataclasses.asdict(before)["smoothness"]


def test_how_often_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="every 1 or more steps, got 0"):
        train("resnet8", "digits", statistics="full", out=tmp_path / "new", record_layers=0, **ARGUMENTS)
    assert not (tmp_path / "new").exists()
