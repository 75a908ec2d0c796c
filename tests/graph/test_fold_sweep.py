"""The sweep over whole architectures: a few, one of each family (slow), and the committed results of all."""

from __future__ import annotations

import sys
from pathlib import Path

import fold_sweep as experiment
import pytest

from leannorm import records
from leannorm.train.models import import_torchvision

ROOT = Path(__file__).parents[2]
FEW = ("torchvision:shufflenet_v2_x0_5", "torchvision:mnasnet0_5", "timm:repvgg_a0", "timm:levit_128s")


def require_exact(swept):
    assert swept.failure is None
    assert swept.calls > 0
    assert swept.folded + swept.tabled == swept.calls
    assert swept.refusals == ()
    assert swept.error32 < 1e-5
    assert swept.error64 < 1e-12
    assert swept.spread > 100 * swept.error32


@pytest.mark.filterwarnings("default")  # models warn of themselves
@pytest.mark.parametrize("name", FEW)
def test_a_few_architectures(name):
    pytest.importorskip(name.partition(":")[0])
    swept = experiment.sweep(name)
    require_exact(swept)
    assert ("repvgg" in name) == bool(swept.merged)


@pytest.mark.sweep
@pytest.mark.filterwarnings("default")
def test_one_architecture_of_each_timm_family():
    timm = pytest.importorskip("timm")
    known = {swept.model: swept for swept in records.read(experiment.Sweep, ROOT / experiment.RESULT).models}
    for family in timm.list_modules():
        names = [f"timm:{name}" for name in timm.list_models(module=family)]
        done = [known[name] for name in names if name in known and known[name].failure is None]
        for swept in sorted(done, key=lambda swept: swept.seconds)[:1]:
            again = experiment.sweep(swept.model)
            assert (again.folded, again.tabled, again.refusals) == (swept.folded, swept.tabled, swept.refusals)


def test_the_committed_sweep_is_what_is_claimed():
    swept = records.read(experiment.Sweep, ROOT / experiment.RESULT).models
    done = [model for model in swept if model.failure is None]
    torchvision = import_torchvision().models
    names = {model.model for model in done}
    assert {f"torchvision:{name}" for name in torchvision.list_models(module=torchvision)} <= names
    assert sum(name.startswith("timm:") for name in names) >= 150
    calls = sum(model.calls for model in done)
    assert sum(model.folded + model.tabled for model in done) >= 0.95 * calls
    for model in done:
        left = [refusal for refusal in model.refusals if refusal.module]
        assert model.folded + model.tabled + len(left) == model.calls
        assert all(refusal.reason for refusal in left)
        assert model.error32 < 1e-5
        assert model.spread > 100 * model.error32  # outputs depend on inputs far more than on rounding
        if model.calls:
            assert model.error64 < 1e-12


def test_a_model_that_fails_is_recorded_and_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "RESULT", tmp_path / "sweep.json")
    monkeypatch.setattr(experiment, "names", lambda known: iter(["torchvision:none", "torchvision:alexnet"]))
    monkeypatch.setattr(sys, "argv", ["fold_sweep.py"])
    experiment.main()
    failed, swept = records.read(experiment.Sweep, tmp_path / "sweep.json").models
    assert failed.failure.startswith("ValueError: unknown model 'torchvision:none'")
    assert (swept.failure, swept.calls) == (None, 0)
    monkeypatch.setattr(experiment, "sweep", lambda name: pytest.fail("a finished model was run again"))
    experiment.main()
