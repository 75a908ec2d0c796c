"""tune: the faster form of each layer, remembered; the times are given, so that no machine decides."""

import copy

import pytest
import torch
from test_fold_training import GRID, IMAGES, operators
from test_fusion import assert_same_training, residual_network
from torch import nn

import leannorm
from leannorm import parse_statistics, records
from leannorm.conversion import tuning
from leannorm.nn.calls import recorded
from leannorm.records import TunedCall, TuningPlan


@pytest.fixture
def times(monkeypatch):
    """Let folding be faster for convolutions of 8 channels alone, and collect what is measured."""
    measured = []

    def measure(call):
        measured.append(call)
        return 0.002, 0.001 if call.folded.module.out_channels == 8 else 0.003

    monkeypatch.setattr(tuning, "measure", measure)
    return measured


@pytest.fixture
def model():
    return leannorm.convert(residual_network(), GRID)[0]


def test_each_layer_takes_the_faster_form(times, model, tmp_path):
    reference, x = copy.deepcopy(model), IMAGES.float()
    state = copy.deepcopy(model.state_dict())
    tuned, report = leannorm.tune(model, x, plan=tmp_path / "plan.json")
    assert tuned is model
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    eights = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.num_features == 8]
    folded = [change.module for change in report.changes if change.action.startswith("convolution + ")]
    assert folded == eights
    assert report.changes[0].action == "convolution + batch norm + relu (1 ms folded, 2 ms apart)"
    assert report.changes[3].action == "batch norm + relu (3 ms folded, 2 ms apart)"
    assert operators(model, x) == (len(eights), 9 - len(eights))
    assert_same_training(model, reference, IMAGES)


def test_what_is_known_is_not_measured_again(times, model, tmp_path, monkeypatch):
    path = tmp_path / "folder" / "plan.json"
    _, first = leannorm.tune(copy.deepcopy(model), IMAGES.float(), plan=path)
    plan = records.read(TuningPlan, path)
    assert len(plan.calls) == len(times) == 9
    assert [call.call for call in plan.calls] == sorted(call.call for call in plan.calls)
    monkeypatch.setattr(tuning, "measure", lambda call: pytest.fail("measured again"))
    _, second = leannorm.tune(copy.deepcopy(model), IMAGES.float(), plan=path)
    assert second == first
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        leannorm.tune(model, IMAGES.float()[:2], plan=path)  # another shape


def test_calls_that_are_alike_are_measured_once(times, tmp_path):
    layers = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(4)]
    model, _ = leannorm.convert(nn.Sequential(*layers), GRID)
    leannorm.tune(model, IMAGES.float(), plan=tmp_path / "plan.json")
    assert len(times) == 2  # the first has no gradient of its input to compute


def test_a_given_plan_decides(model, tmp_path):
    path = tmp_path / "plan.json"
    leannorm.fuse(model, convolution=True)
    with recorded() as calls:
        model(IMAGES.float())
    spelled = list(dict.fromkeys(map(tuning._spell, calls)))
    assert spelled[0].endswith("without the input's gradient")
    assert not any("without" in text for text in spelled[1:])
    given = TuningPlan(tuple(TunedCall(text, 1.0, 0.5 if i == 0 else 2.0) for i, text in enumerate(spelled)))
    records.write(path, given)
    leannorm.tune(model, IMAGES.float(), plan=path)
    assert operators(model, IMAGES.float()) == (1, 8)
    assert records.read(TuningPlan, path) == given


def test_by_default_a_file_for_each_machine_is_kept(times, model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    leannorm.tune(model, (IMAGES.float(),))
    (path,) = (tmp_path / "leannorm").iterdir()
    assert path.name.startswith("tune-cpu-")
    assert f"{torch.get_num_threads()}-threads-torch-{torch.__version__[0]}" in path.name


def test_memory_folds_everything_and_measures_nothing(monkeypatch, model):
    monkeypatch.setattr(tuning, "measure", lambda call: pytest.fail("measured"))
    _, report = leannorm.tune(model, IMAGES.float(), prefer="memory")
    assert all(change.action.startswith("convolution + ") for change in report.changes)
    assert operators(model, IMAGES.float()) == (9, 0)


def test_exact_statistics_leave_nothing_to_choose(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "measure", lambda call: pytest.fail("measured"))
    path = tmp_path / "plan.json"
    _, report = leannorm.tune(residual_network(), IMAGES.float(), plan=path)
    assert len(report.refusals) == 9
    assert not path.exists()


def test_measuring_leaves_the_layers_alone(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "SHORTEST_SAMPLE", 0.0)
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    leannorm.convert(model, parse_statistics("fs:1/4@minimum=4+vdn:1"))
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    leannorm.tune(model, IMAGES.float(), plan=tmp_path / "plan.json")
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    plan = records.read(TuningPlan, tmp_path / "plan.json")
    assert all(call.apart_seconds > 0 and call.folded_seconds > 0 for call in plan.calls)


@pytest.fixture
def compiled_times(monkeypatch):
    """Let decomposing be faster for 8 channels alone, and collect what is measured."""
    measured = []

    def measure(call):
        measured.append(call)
        return 0.002, 0.001 if call.input.shape[1] == 8 else 0.003

    monkeypatch.setattr(tuning, "measure_compiled", measure)
    return measured


def test_compiled_layers_take_the_faster_form(times, compiled_times, model, tmp_path):
    path, x = tmp_path / "plan.json", IMAGES.float()
    _, report = leannorm.tune(model, x, compiled=True, plan=path)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    apart = {name: layer for name, layer in layers.items() if not layer.folds_convolution}
    assert apart
    assert not any(layer.decomposes for layer in layers.values())  # those of 8 channels are folded
    assert {call.layer for call in compiled_times} <= set(apart.values())
    assert {call.folded for call in compiled_times} == {None}
    assert (
        report.changes[3].action
        == "batch norm + relu (3 ms folded, 2 ms apart; compiled 2 ms as one operator, 3 ms decomposed)"
    )
    plan = records.read(TuningPlan, path)
    assert len(plan.calls) == 9
    assert len(plan.compiled) == len(compiled_times)


def test_exact_layers_have_that_choice_too(compiled_times, tmp_path, monkeypatch):
    path, network = tmp_path / "plan.json", residual_network()
    leannorm.tune(network, IMAGES.float(), compiled=True, plan=path)
    layers = [m for m in network.modules() if isinstance(m, leannorm.BatchNorm2d)]
    assert {layer.num_features for layer in layers if layer.decomposes} == {8}
    assert {layer.num_features for layer in layers if not layer.decomposes}
    monkeypatch.setattr(tuning, "measure_compiled", lambda call: pytest.fail("measured again"))
    leannorm.tune(network, IMAGES.float(), compiled=True, plan=path)
    explained = leannorm.explain(network, IMAGES.float()).layers
    assert [any("torch.compile" in r for r in line.reasons) for line in explained] == [
        layer.decomposes for layer in layers
    ]


def test_methods_have_no_form_to_choose(compiled_times, tmp_path):
    network, _ = leannorm.convert(residual_network(), leannorm.GhostBatch(2))
    leannorm.tune(network, IMAGES.float(), compiled=True, plan=tmp_path / "plan.json")
    assert not compiled_times


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["full", "grid:1/4@step"])
def test_measuring_compiled_layers_leaves_them_alone(tmp_path, monkeypatch, spelling):
    monkeypatch.setattr(tuning, "SHORTEST_SAMPLE", 0.0)
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    network, _ = leannorm.convert(network, parse_statistics(spelling))
    state, x = copy.deepcopy(network.state_dict()), torch.randn(4, 3, 12, 12)
    leannorm.tune(network, x, compiled=True, plan=tmp_path / "plan.json")
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in network.parameters())
    (call,) = records.read(TuningPlan, tmp_path / "plan.json").compiled
    assert call.call.startswith("batch norm, of 4x4x10x10 in order 0123, torch.float32 on cpu, statistics ")
    assert min(call.operator_seconds, call.decomposed_seconds) > 0


def test_refusals(model, tmp_path):
    with pytest.raises(ValueError, match="tune prefers 'speed' or 'memory', got 'size'"):
        leannorm.tune(model, IMAGES.float(), prefer="size")
    path = tmp_path / "plan.json"
    path.write_text('{"calls": [{"call": "x"}]}')
    with pytest.raises(ValueError, match=r"TuningPlan.calls\[0\]: expected the fields"):
        leannorm.tune(model, IMAGES.float(), plan=path)
