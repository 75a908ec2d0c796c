"""Layers that compute with the Triton kernels: training and running statistics, eval mode, frozen.

Where there is no GPU the interpreter's kernels are put in the place of the CPU's.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

import leannorm
from leannorm import backends
from leannorm.functional import scale_shift
from leannorm.ops import eager
from triton_interpreter import DEVICE, ON_GPU, launchers, poisoned

OPERATORS = ("batch_norm", "batch_norm_backward", "normalize", "backward_fused", "track")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The operators that are called, in order."""
    found = []

    def counted(name):
        launcher = getattr(launchers, name)
        return lambda *args: found.append(name) or launcher(*args)

    replaced = {name: counted(name) for name in OPERATORS}
    if ON_GPU:
        for name, launcher in replaced.items():
            monkeypatch.setattr(launchers, name, launcher)
    else:
        monkeypatch.setattr(eager, "_kernels", {(name, "cpu"): launcher for name, launcher in replaced.items()})
        monkeypatch.setattr(backends, "takes", lambda x: True)
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy
        yield found


def layer_of(**options):
    layer = leannorm.BatchNorm2d(5, **options).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.copy_(torch.randn(5, generator=generator))
        layer.running_var.copy_(torch.rand(5, generator=generator) + 0.5)
    return layer


def tensors(requires_grad=True):
    generator = torch.Generator().manual_seed(1)
    x, residual, dy = (
        torch.randn(4, 5, 6, 7, generator=generator).to(DEVICE).contiguous(memory_format=torch.channels_last)
        for _ in range(3)
    )
    return x.requires_grad_(requires_grad), residual.requires_grad_(requires_grad), dy


@pytest.mark.parametrize("momentum", [0.1, 0.75])
def test_a_training_step_is_torchs(calls, momentum):
    layer = layer_of(momentum=momentum, activation="relu")
    torchs = nn.BatchNorm2d(5, momentum=momentum).to(DEVICE)
    torchs.load_state_dict(layer.state_dict())
    x, residual, dy = tensors()
    found, wanted = [], []
    for results, step, norm in (
        (found, lambda: layer(x, residual), layer),
        (wanted, lambda: F.relu(torchs(x) + residual), torchs),
    ):
        with poisoned():
            for _ in range(3):
                y = step()
            inputs = [x, residual, norm.weight, norm.bias]
            results += [y.detach(), *torch.autograd.grad(y, inputs, dy), *norm.buffers()]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert calls == ["batch_norm", "track"] * 3 + ["batch_norm_backward"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_given_statistics_with_a_residual_are_one_operator(calls, activation, frozen):
    layer = layer_of(activation=activation)
    layer = leannorm.freeze(nn.Sequential(layer))[0][0].train() if frozen else layer.eval()
    buffers = [buffer.clone() for buffer in layer.buffers()]
    x, residual, dy = tensors()
    inputs = [t for t in (x, residual, layer.weight, layer.bias) if t.requires_grad]
    with poisoned():
        y = layer(x, residual)
        found = [y.detach(), *torch.autograd.grad(y, inputs, dy)]
    z = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias) + residual
    wanted = {"relu": F.relu, "silu": F.silu, None: lambda z: z}[activation](z)
    torch.testing.assert_close(found, [wanted.detach(), *torch.autograd.grad(wanted, inputs, dy)], rtol=1e-4, atol=1e-5)
    assert calls == ["normalize", "backward_fused"]
    assert all(torch.equal(a, b) for a, b in zip(buffers, layer.buffers(), strict=True))


def test_given_statistics_alone_are_torchs_to_the_bit(calls):
    layer, (x, *_) = layer_of().eval(), tensors()
    assert torch.equal(layer(x), F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_of_a_normalization_is_one_operator(calls, dtype):
    x, residual, _ = (t.detach().to(dtype) for t in tensors())
    scale, shift = torch.randn(2, 5, 1, 1, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    y = scale_shift(x, scale, shift, residual, "relu")
    wanted = F.relu(scale.double() * x.double() + shift.double() + residual.double())
    torch.testing.assert_close(y.double(), wanted, rtol=8e-3 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)
    assert calls == ["normalize"]


VALUES = {
    "ordinary": (1.5, 2.0),
    "nan": (float("nan"), 1.0),
    "infinite": (1.0, float("inf")),
    "large": (1e19, 1e30),
}


@pytest.mark.parametrize(
    ("factor", "between", "guarded"), list(itertools.product((0.0, 0.1, 0.5, 1.0), (False, True), (False, True)))
)
def test_running_statistics_move_by_the_layers_formula(calls, factor, between, guarded):
    source = leannorm.NaiveSampling(1 / 4, between_steps=between)
    layer = layer_of(statistics=source, guard_nonfinite=guarded)
    mean, var = (torch.tensor([*values, 3.0]).to(DEVICE) for values in zip(*VALUES.values(), strict=True))
    expected = copy.deepcopy(layer)
    expected._track_natively = lambda *_, **__: False
    for each in (layer, expected):
        each._track(mean, var, factor, unbiased=1.25)
    assert calls == ["track"]
    torch.testing.assert_close(layer.running_mean, expected.running_mean, equal_nan=True)
    torch.testing.assert_close(layer.running_var, expected.running_var, equal_nan=True)


def test_many_channels_move_and_batches_are_counted():
    running, batches = torch.zeros(2, 600, device=DEVICE), torch.tensor(3, device=DEVICE)
    new = torch.arange(1200.0, device=DEVICE).view(2, 600)
    assert launchers.track(*running, batches, *new, 2.0, 0.25, False, False)
    torch.testing.assert_close(running, torch.stack([new[0] / 4, new[1] / 2]))
    assert batches == 4


@pytest.mark.parametrize("change", ["dtype", "strides", "subclass", "shape", "batches"])
def test_what_cannot_be_moved_is_left_as_it_is(change):
    running, batches, mean = torch.zeros(2, 5, device=DEVICE), torch.tensor(3, device=DEVICE), torch.ones(5).to(DEVICE)
    running_mean, running_var = running
    match change:
        case "dtype":
            running_var = running_var.double()
        case "strides":
            running_var = torch.zeros(5, 2, device=DEVICE)[:, 0]
        case "subclass":
            running_var = running_var.as_subclass(type("Own", (torch.Tensor,), {}))
        case "shape":
            running_var = torch.zeros(6, device=DEVICE)
        case "batches":
            batches = batches.float()
    assert not launchers.track(running_mean, running_var, batches, mean, mean, 1.0, 0.5, False, False)
    assert not running.any()
    assert batches == 3


def test_a_saved_statistic_that_moves_is_an_error_in_backward_as_in_torch():
    layer = layer_of()
    product = torch.ones(5, device=DEVICE, requires_grad=True) * layer.running_mean
    layer(tensors()[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
