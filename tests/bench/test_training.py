import dataclasses

import pytest
import torch
from torch import nn

from leannorm.bench import training
from leannorm.bench.conditions import conditions
from leannorm.bench.gate import RedGate
from leannorm.bench.plan import TrainingPlan, quickly

PLAN = quickly(TrainingPlan(models=("resnet18",), statistics=("full", "grid:1/8")))
SIDES = ["full", "full + fuse", "grid:1/8", "grid:1/8 + fuse", "grid:1/8 + fuse convolution"]
TUNED = "grid:1/8 + tune"


def test_run_checks_and_times_every_side():
    checked, benchmark = training.run(PLAN, conditions(PLAN))
    (case,) = benchmark.cases
    assert checked.cases == (dataclasses.replace(case, saved=(), timings=()),)
    assert case.model == "resnet18"
    assert [timing.side for timing in case.timings] == ["torch", *SIDES, TUNED, "ceiling"]
    assert {(check.side, check.tensor) for check in case.checks} == {
        (side, tensor) for side in SIDES for tensor in ("logits", "gradients")
    }
    assert [kept.side for kept in case.saved] == ["torch", *SIDES, TUNED]


def test_sides_that_fold_convolutions_are_left_out_where_they_are_not_asked_for():
    plan = dataclasses.replace(PLAN, folded=False, repeats=1)
    *_, benchmark = training.run(plan, conditions(plan))
    (case,) = benchmark.cases
    assert [timing.side for timing in case.timings] == ["torch", *SIDES[:-1], "ceiling"]
    assert {check.side for check in case.checks} == set(SIDES[:-1])


def test_sides_in_processes_of_their_own(monkeypatch):
    plan = dataclasses.replace(PLAN, statistics=("full",), repeats=1, apart=True, starts=2)
    monkeypatch.setattr(training, "side", lambda *_: pytest.fail("made in this process"))
    kept, timings = training.measure("resnet18", plan)
    assert [timing.side for timing in timings] == ["torch", "full", "full + fuse", "ceiling"]
    assert {len(timing.seconds) for timing in timings} == {2}
    assert [saved.side for saved in kept] == ["torch", "full", "full + fuse"]


def test_a_result_says_how_its_processes_were_begun(monkeypatch):
    plan = dataclasses.replace(PLAN, apart=True, starts=3)
    monkeypatch.setattr(training, "isolated", lambda *_: ())
    monkeypatch.setattr(training, "measure", lambda *_: ((), ()))
    *_, benchmark = training.run(plan, conditions(plan))
    assert (benchmark.apart, benchmark.starts, benchmark.settle) == (True, 3, plan.settle)


def test_processes_are_for_the_cpu():
    with pytest.raises(ValueError, match="leave apart out"):
        TrainingPlan(device="cuda", apart=True)
    with pytest.raises(ValueError, match="starts must be at least 1, and 1 unless apart, got 2"):
        TrainingPlan(apart=False, starts=2)


def test_a_wrong_side_stops_everything(monkeypatch):
    right = training.fuse

    def fuse(model, **options):
        model, report = right(model, **options)
        model.bn1.eps = 1e-3
        return model, report

    monkeypatch.setattr(training, "fuse", fuse)
    monkeypatch.setattr(training, "measure", lambda *_: pytest.fail("timed behind a red gate"))
    with pytest.raises(RedGate, match=r"resnet18: full \+ fuse: ") as red:
        list(training.run(PLAN, conditions(PLAN)))
    assert "resnet18: full:" not in str(red.value)


def test_a_misspelt_model_is_told_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(training, "check", lambda *_: pytest.fail("checked"))
    plan = quickly(TrainingPlan(models=("resnet18", "resnet51")))
    with pytest.raises(ValueError, match=r"unknown model 'torchvision:resnet51' \(did you mean"):
        list(training.run(plan, conditions(plan)))


def test_the_ceiling_has_additions_and_nothing_to_normalize_or_activate():
    model, images, labels = training._setting("resnet18", PLAN)
    bare = training.ceiling(model, images)
    left = [m for m in bare.modules() if isinstance(m, nn.BatchNorm2d | nn.ReLU)]
    assert left == []
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = torch.randn(2, 64, 8, 8)
    block = bare.layer1[0]
    torch.testing.assert_close(block(x), block.conv2(block.conv1(x)) + x)
    nn.functional.cross_entropy(bare(images), labels).backward()
    gradients = torch.cat([p.grad.flatten() for p in bare.parameters()])
    assert gradients.isfinite().all()
    assert not ((gradients != 0) & (gradients.abs() < torch.finfo(torch.float32).tiny)).any()


def test_saved_bytes_by_hand():
    x = torch.randn(4, 8, 6, 6)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 1))
    # the sigmoid saves its output, which the second convolution saves too: one storage; the images do not count
    assert training.saved_bytes(model, x) == x.nbytes


def test_folding_saves_the_convolutions_output_and_the_sample_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x = torch.randn(4, 3, 16, 16)
    plain = training.saved_bytes(training.fuse(training._converted(model, "grid:1/8"))[0], x)
    folded = training.saved_bytes(training.fuse(training._converted(model, "grid:1/8"), convolution=True)[0], x)
    sample = 4 * 8 * 6 * 5 * 4
    assert plain - folded == pytest.approx(4 * 8 * 16 * 16 * 4 - sample, abs=400)


def test_fusing_saves_the_maps_between_batch_norm_and_silu():
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
    x = torch.randn(4, 3, 16, 16)
    plain = training.saved_bytes(model, x)
    fused = training.saved_bytes(training.fuse(training._converted(model, "full"))[0], x)
    assert plain - fused == pytest.approx(4 * 8 * 16 * 16 * 4, abs=200)
