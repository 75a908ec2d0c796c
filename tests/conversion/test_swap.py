"""convert and revert: in place, nothing lost, everything reported."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import leannorm
from leannorm import parse_statistics
from leannorm.records import Change, Refusal


def small_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8, eps=1e-3, momentum=None, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5, track_running_stats=False),
    )


def test_convert_keeps_everything_but_the_class():
    model = small_model()
    before = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    converted, report = leannorm.convert(model, parse_statistics("grid:1/8"))
    assert converted is model
    assert all(module is before[name] for name, module in model.named_modules())
    assert all(t is tensors[n] for n, t in [*model.named_parameters(), *model.named_buffers()])
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(model[1], leannorm.BatchNorm2d)
    assert [change.module for change in report.changes] == ["1", "4", "8"]
    assert report.refusals == ()
    model(torch.randn(40, 3, 12, 12)).sum().backward()
    assert calls
    assert (model[4].eps, model[4].momentum, model[4].weight) == (1e-3, None, None)


def test_converting_again_changes_the_source_and_reports_both():
    model, _ = leannorm.convert(small_model(), leannorm.GridSampling(1 / 8))
    _, report = leannorm.convert(model, leannorm.BatchSampling(1 / 4), guard_nonfinite=True)
    assert report.changes[0] == Change("1", "statistics grid:1/8 -> bs:1/4")
    assert all(model[i].guard_nonfinite for i in (1, 4, 8))


def test_places_depend_on_the_name_and_survive_conversion_and_copies():
    model, _ = leannorm.convert(small_model(), leannorm.GridSampling(1 / 8))
    places = [model[i].place for i in (1, 4, 8)]
    assert len(set(places)) == 3
    again, _ = leannorm.convert(leannorm.convert(small_model(), leannorm.FullBatch())[0], leannorm.GridSampling(1 / 8))
    assert [again[i].place for i in (1, 4, 8)] == places
    assert [copy.deepcopy(model)[i].place for i in (1, 4, 8)] == places


@pytest.mark.parametrize("spelling", ["full", "grid:1/8@step", "fs:1/8+vdn:2"])
def test_copies_and_pickles_train(spelling):
    model, _ = leannorm.convert(small_model()[:6], parse_statistics(spelling))
    x = torch.randn(8, 3, 12, 12)
    results = []
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        torch.manual_seed(0)
        results.append(twin(x))
        assert results[-1].shape[0] == 8
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


def test_filter_leaves_layers_out_and_says_so():
    model, report = leannorm.convert(
        small_model(), leannorm.GridSampling(1 / 8), filter_fn=lambda module, name: module.num_features == 8
    )
    assert report.refusals == (Refusal("8", "filter_fn left it out"),)
    assert type(model[8]) is nn.BatchNorm1d


class Special(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).abs()


def parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", nn.Softplus())
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Special(3), "Special is a subclass whose forward may do more"),
        (nn.SyncBatchNorm(3), "SyncBatchNorm shares statistics"),
        (nn.LazyBatchNorm2d(), "lazy layer has no channels yet"),
        (parametrized(), "ParametrizedBatchNorm2d is a subclass"),
    ],
)
def test_layers_that_are_not_understood_are_refused(layer, reason):
    model = nn.Sequential(layer)
    _, report = leannorm.convert(model, leannorm.GridSampling(1 / 8))
    assert report.changes == ()
    assert report.refusals[0].module == "0"
    assert reason in report.refusals[0].reason
    assert model[0] is layer
    assert not isinstance(layer, leannorm.BatchNorm2d)


def test_statistics_must_be_a_source():
    with pytest.raises(TypeError, match="parse_statistics reads spellings"):
        leannorm.convert(small_model(), "grid:1/8")  # pyright: ignore[reportArgumentType]


def test_revert_restores_class_and_outputs():
    model = small_model()
    model(torch.randn(8, 3, 12, 12))
    model.eval()
    x = torch.randn(4, 3, 12, 12)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    leannorm.convert(model, parse_statistics("fs:1/8+vdn:2"))
    _, report = leannorm.revert(model)
    assert [change.module for change in report.changes] == ["1", "4", "8"]
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert not model._forward_hooks_always_called


def test_revert_refuses_to_drop_an_activation():
    model = nn.Sequential(leannorm.BatchNorm2d(3, activation="relu"))
    _, report = leannorm.revert(model)
    assert report.refusals[0].reason.startswith("it applies relu")
    assert isinstance(model[0], leannorm.BatchNorm2d)


def test_timms_layer_keeps_its_activation_and_comes_back():
    from leannorm.train.models import import_torchvision

    import_torchvision()
    norm_act = pytest.importorskip("timm.layers.norm_act")
    for act, converts in ((nn.ReLU, True), (nn.SiLU, True), (nn.Softplus, False)):
        layer = norm_act.BatchNormAct2d(3, act_layer=act, inplace=False)
        model = nn.Sequential(layer)
        x = torch.randn(4, 3, 6, 6)
        expected = copy.deepcopy(model)(x)
        keys = list(model.state_dict())
        _, report = leannorm.convert(model, leannorm.FullBatch())
        assert bool(report.changes) is converts
        torch.testing.assert_close(model(x), expected)
        assert list(model.state_dict()) == keys
        leannorm.revert(model)
        assert type(layer) is norm_act.BatchNormAct2d
    dropping = norm_act.BatchNormAct2d(3, drop_layer=nn.Dropout)
    _, report = leannorm.convert(nn.Sequential(dropping), leannorm.FullBatch())
    assert "Dropout between" in report.refusals[0].reason


@pytest.mark.parametrize(("first", "second"), [("grid:1/8", "vdn:2"), ("vdn:2", "grid:1/8")])
def test_no_layer_takes_virtual_samples_for_real_ones(first, second):
    model, _ = leannorm.convert(small_model(), parse_statistics(first))
    with pytest.raises(ValueError, match=r"would leave '1' .* them"):
        leannorm.convert(model, parse_statistics(second), filter_fn=lambda module, name: name != "1")
    assert all(str(model[i].statistics) == first for i in (1, 4, 8))


def test_virtual_samples_and_a_refused_layer_exclude_each_other():
    model = nn.Sequential(nn.BatchNorm2d(3), Special(3))
    with pytest.raises(ValueError, match=r"would leave '1' .Special. without"):
        leannorm.convert(model, leannorm.VirtualDataset(1))
    assert type(model[0]) is nn.BatchNorm2d


def test_reverting_around_a_refused_layer_leaves_no_virtual_samples():
    model = nn.Sequential(nn.BatchNorm2d(3), leannorm.BatchNorm2d(3, activation="relu"))
    leannorm.convert(model, leannorm.VirtualDataset(1))
    _, report = leannorm.revert(model)
    assert Change("1", "statistics vdn:1 -> full") in report.changes
    assert model(torch.randn(4, 3, 5, 5)).shape[0] == 4
