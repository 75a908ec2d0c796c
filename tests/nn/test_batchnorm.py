"""The layers against torch's: its own module and operator cases, buffers, modes, dtypes, errors."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import leannorm
from leannorm.functional import batch_norm, normalize

OURS = {
    nn.BatchNorm1d: leannorm.BatchNorm1d,
    nn.BatchNorm2d: leannorm.BatchNorm2d,
    nn.BatchNorm3d: leannorm.BatchNorm3d,
}
INFOS = [info for info in module_db if info.module_cls in OURS]


def module_inputs(info, dtype, training):
    with torch.random.fork_rng():  # the same numbers each time
        torch.manual_seed(0)
        inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    for i, given in enumerate(inputs):
        yield pytest.param(info.module_cls, given, dtype, training, id=f"{info.name}-{i}-{dtype}-{training}")


@pytest.mark.parametrize(
    ("cls", "given", "dtype", "training"),
    [
        case
        for info in INFOS
        for dtype in (torch.float32, torch.float64)
        for training in (True, False)
        for case in module_inputs(info, dtype, training)
    ],
)
def test_torchs_module_cases(cls, given, dtype, training):
    arguments, keywords = given.constructor_input.args, given.constructor_input.kwargs
    theirs = cls(*arguments, **keywords, dtype=dtype).train(training)
    ours = OURS[cls](*arguments, **keywords, dtype=dtype).train(training)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    results = []
    for layer in (theirs, ours):
        x = given.forward_input.args[0].detach().clone().requires_grad_()
        for _ in range(3):
            y = layer(x)
            (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
        gradients = [p.grad for p in layer.parameters()]
        results.append([y, x.grad, *gradients, *layer.buffers()])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_torchs_module_error_cases(info):
    for case in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        given = case.module_error_input
        layer = OURS[info.module_cls](*given.constructor_input.args, **given.constructor_input.kwargs)
        with pytest.raises(case.error_type, match=case.error_regex):
            layer(*given.forward_input.args)


def operator_cases():
    info = next(info for info in op_db if info.name == "nn.functional.batch_norm")
    yield from info.sample_inputs_func(info, "cpu", torch.float64, True)


@pytest.mark.parametrize("sample", [pytest.param(s, id=str(i)) for i, s in enumerate(operator_cases())])
def test_torchs_operator_cases(sample):
    x = sample.input
    mean, var, *rest = sample.args
    weight, bias = sample.kwargs.get("weight"), sample.kwargs.get("bias")
    if rest:
        weight, bias = (*rest, None)[:2]
    training, eps = sample.kwargs.get("training", False), sample.kwargs.get("eps", 1e-5)
    momentum = sample.kwargs.get("momentum", 0.1)
    expected_mean, expected_var = (None if t is None else t.clone() for t in (mean, var))
    expected = F.batch_norm(x, expected_mean, expected_var, weight, bias, training, momentum, eps)
    if training or mean is None:
        found, batch_mean, batch_var = batch_norm(x, weight, bias, eps=eps)
        if mean is not None and x.numel():
            count = x.numel() / x.shape[1]
            torch.testing.assert_close(mean.lerp(batch_mean, momentum), expected_mean)
            unbiased = batch_var * (count / (count - 1))
            torch.testing.assert_close(var.lerp(unbiased, momentum), expected_var)
    else:
        found = normalize(x, mean, var, weight, bias, eps=eps)
    torch.testing.assert_close(found, expected)
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    dy = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(found, inputs, dy), torch.autograd.grad(expected, inputs, dy))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16, torch.float16])
def test_half_inputs_with_any_parameters(dtype, parameters):
    x = torch.randn(4, 3, 6, 6, dtype=dtype)
    layer = leannorm.BatchNorm2d(3, dtype=parameters)
    exact = nn.BatchNorm2d(3, dtype=torch.float64)
    for training in (True, False):
        y = layer.train(training)(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact.train(training)(x.double()), rtol=2e-2, atol=3e-2)
    assert layer.running_mean.dtype == parameters


def test_autocast():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), leannorm.BatchNorm2d(4, activation="relu"))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert model[1].weight.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu", None])
def test_residual_and_activation(name, training):
    x, residual = torch.randn(2, 4, 3, 5, 5).unbind()
    fused = leannorm.BatchNorm2d(3, activation=name).train(training)
    plain = nn.BatchNorm2d(3).train(training)
    expected = plain(x) + residual
    if name is not None:
        expected = getattr(F, name)(expected)
    torch.testing.assert_close(fused(x, residual), expected)


def test_state_dict_loads_both_ways():
    ours, theirs = leannorm.BatchNorm2d(3), nn.BatchNorm2d(3)
    ours(torch.randn(4, 3, 2, 2))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs.state_dict(), ours.state_dict())
    theirs(torch.randn(4, 3, 2, 2))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(theirs.state_dict(), ours.state_dict())
    assert ours._version == 2


def test_between_steps_adds_the_variance_of_the_sampled_mean():
    plain, total = (
        leannorm.BatchNorm1d(1, statistics=leannorm.BatchSampling(1 / 2, minimum=2, between_steps=between))
        for between in (False, True)
    )
    torch.manual_seed(0)
    for step in range(600):
        x = torch.randn(8, 1) + 3 * torch.randn(())  # the variance of all is 1 + 9
        for layer in (plain, total):
            torch.manual_seed(step)
            layer(x)
        torch.manual_seed(1000 + step)
    assert 0.7 < plain.running_var.item() < 1.4
    assert 4 < total.running_var.item() < 16


def test_between_steps_formula():
    layer = leannorm.BatchNorm1d(
        1, momentum=0.25, statistics=leannorm.NaiveSampling(0.5, minimum=2, between_steps=True)
    )
    layer(torch.tensor([[1.0], [3.0], [99.0], [99.0]]))
    assert layer.running_mean.item() == pytest.approx(0.5)
    assert layer.running_var.item() == pytest.approx(0.75 * 1 + 0.25 * 2 + 0.25 * 0.75 * 2**2)


def test_guard_keeps_nonfinite_values_out_of_the_running_statistics():
    x = torch.randn(4, 3, 2, 2)
    x[0, 1, 0, 0] = float("nan")
    x[0, 2, 0, 0] = float("inf")
    guarded, open_ = leannorm.BatchNorm2d(3, guard_nonfinite=True), leannorm.BatchNorm2d(3)
    assert guarded(x)[:, 1].isnan().all(), "what is computed shows the NaN"
    open_(x)
    assert torch.equal(guarded.running_mean[1:], torch.zeros(2))
    assert torch.equal(guarded.running_var[1:], torch.ones(2))
    assert guarded.running_mean[0] == open_.running_mean[0] != 0
    assert open_.running_mean[1].isnan(), "off by default, like torch"


def test_two_forwards_before_one_backward():
    layer = leannorm.BatchNorm2d(3, statistics=leannorm.GridSampling(1 / 4, "step"), activation="relu")
    x, z = torch.randn(2, 4, 3, 9, 9, dtype=torch.float64).requires_grad_().unbind()
    layer.double()
    torch.manual_seed(0)
    together = torch.autograd.grad((layer(x) * layer(z)).sum(), [x, z])
    torch.manual_seed(0)
    clone = copy.deepcopy(layer)
    first, second = clone(x), clone(z)
    apart = [torch.autograd.grad(first, x, second.detach())[0], torch.autograd.grad(second, z, first.detach())[0]]
    torch.testing.assert_close(list(together), apart)


def test_extra_repr_shows_what_torch_has_not():
    text = repr(leannorm.BatchNorm2d(3, statistics=leannorm.GridSampling(1 / 32), activation="relu6"))
    assert "statistics=grid:1/32, activation=clamp(0.0, 6.0)" in text
    assert "frozen" not in text


def test_copies_and_pickles():
    layer = leannorm.BatchNorm2d(
        3, statistics=leannorm.FeatureSampling(1 / 4) + leannorm.FullBatch(), activation="gelu"
    )
    layer(torch.randn(4, 3, 8, 8))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(twin) == repr(layer)
        torch.testing.assert_close(twin.state_dict(), layer.state_dict())


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: leannorm.BatchNorm2d(3)(torch.ones(2, 3, 2, 2, dtype=torch.int64)), TypeError, r"call \.float"),
        (lambda: leannorm.BatchNorm1d(3)(torch.ones(1, 3)), ValueError, "GroupNorm, batch renorm.*VirtualDataset"),
        (lambda: leannorm.BatchNorm2d(3)(torch.ones(1, 3, 1, 1)), ValueError, "more than 1 value per channel"),
        (lambda: leannorm.BatchNorm2d(3)(torch.ones(2, 4, 2, 2)), ValueError, r"weight must have the shape \(4,\)"),
        (lambda: leannorm.BatchNorm2d(3)(torch.ones(2, 3)), ValueError, "expected 4D input"),
        (
            lambda: leannorm.BatchNorm2d(3)(torch.ones(2, 3, 2, 2), torch.ones(2, 3, 1, 1)),
            ValueError,
            "residual must have",
        ),
        (
            lambda: leannorm.BatchNorm2d(3, device="meta")(torch.ones(2, 3, 2, 2)),
            ValueError,
            "weight must be on the input's device, cpu, got meta",
        ),
        (
            lambda: leannorm.BatchNorm2d(3)(torch.ones(2, 3, 2, 2), torch.ones(2, 3, 2, 2, device="meta")),
            ValueError,
            "residual must be on the input's device, cpu, got meta",
        ),
        (
            lambda: leannorm.BatchNorm2d(3, activation="rleu"),
            ValueError,
            "unknown activation 'rleu'; choose one of relu",
        ),
        (lambda: leannorm.BatchNorm2d(3, activation=nn.ReLU()), TypeError, "activation must be a name"),
        (lambda: leannorm.BatchNorm2d(3, statistics="grid:1/8"), TypeError, "parse_statistics"),
        (lambda: leannorm.Activation("clamp", (1, 0)), ValueError, "low < high"),
        (lambda: leannorm.Activation("leaky_relu", (0,)), ValueError, "positive negative_slope"),
        (lambda: leannorm.Activation("relu", (0,)), ValueError, "takes the parameters"),
    ],
)
def test_bad_input_says_what_and_how_to_mend_it(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_torchs_synchronizing_converter_drops_nothing_in_silence():
    sampled = nn.Sequential(leannorm.BatchNorm2d(3, statistics=leannorm.GridSampling(1 / 8)))
    activated = nn.Sequential(leannorm.BatchNorm2d(3, activation="relu"))
    for model in (sampled, activated):
        with pytest.raises(RuntimeError, match=r"would drop the statistics.*leannorm\.revert"):
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(leannorm.BatchNorm2d(3)))
    assert type(plain[0]) is nn.SyncBatchNorm


@pytest.mark.parametrize("place", ["input", "residual"])
def test_a_tensor_that_has_left_a_transform_is_taken(place):
    left = []

    def keep(x):
        left.append(x)
        return x.sum()

    torch.func.grad(keep)(torch.randn(4, 3, 5, 5))
    other = torch.randn(4, 3, 5, 5, requires_grad=True)
    arguments = (left[0], other) if place == "input" else (other, left[0])
    layer = leannorm.BatchNorm2d(3, activation="relu")
    layer(*arguments).sum().backward()
    assert other.grad is not None
