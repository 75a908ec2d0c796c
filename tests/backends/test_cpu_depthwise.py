"""The native depthwise convolution with its batch norm, against float64 and against PyTorch's convolution with it."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conv_cases import PIECEWISE, SMOOTH, SOURCES, ConvCase, Setup, make
from leannorm import Activation
from leannorm.backends import cpu
from leannorm.backends.cpu import depthwise

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")
OPS = torch.ops.leannorm
RELU = Activation("relu")


def case(shape, **others) -> ConvCase:
    channels = shape[1]
    return ConvCase("", shape, out=channels, groups=channels, layout="channels_last", **others)


WIDE = {
    "80 channels": case((2, 80, 14, 14)),
    "stride 2": case((3, 96, 15, 14), stride=2),
    "stride 3 of 2": case((2, 40, 9, 10), kernel=2, stride=3),
    "5x5": case((2, 72, 12, 30), kernel=5, padding=2),
    "7x7 stride 2": case((2, 33, 20, 9), kernel=7, stride=2, padding=3),
    "dilated by 3": case((2, 24, 13, 17), padding=3, dilation=3, stride=2),
    "1x1": case((2, 20, 6, 6), kernel=1, padding=0),
    "one row": case((3, 64, 1, 300)),
    "two positions": case((9, 130, 2, 1)),
    "around the caches": case((4, 96, 76, 76)),
}


def results(setup: Setup, dy: torch.Tensor) -> list[torch.Tensor]:
    y, mean, var, sample, kept = OPS.conv_batch_norm(*setup.arguments)
    inputs = [t for i, t in enumerate(setup.tensors) if t is not None and i != 2]
    return [y, mean, var, sample, kept, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def plan(setup: Setup):
    x, weight, *_ = setup.tensors
    places = setup.rest[:3]
    return depthwise.plan(x, weight, *setup.convolution, *places)


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def incoming(case: ConvCase, seed: int = 0) -> torch.Tensor:
    return torch.randn(case.output, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, RELU, Activation("silu")], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_error_is_at_most_twice_torchs(monkeypatch, instruction_set, name, activation, residual, dtype):
    case = WIDE[name]
    setup = make(case, "grid:1/4", activation, dtype, residual=residual)
    exact = make(case, "grid:1/4", activation, dtype, residual=residual).to(torch.float64)
    z = Setup(exact.tensors, exact.convolution, (*exact.rest[:-2], "", [])).composition()[0]
    near = z.abs() <= 16 * torch.finfo(dtype).eps * z.abs().max()  # rounding may decide the sign
    dy = incoming(case).masked_fill(near, 0)
    assert plan(setup) is not None
    assert plan(exact) is None
    ours, expected = results(setup, dy), results(exact, dy)
    monkeypatch.setattr(depthwise, "plan", lambda *_: None)
    for found, theirs, wanted in zip(ours, results(setup, dy), expected, strict=True):
        assert (found.dtype, found.shape, found.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        if found.numel():
            unit = 4 * torch.finfo(dtype).eps * wanted.norm()
            assert (found.double() - wanted).norm() <= 2 * (theirs.double() - wanted).norm() + unit


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("activation", [*PIECEWISE, *SMOOTH], ids=str)
def test_sources_and_activations(instruction_set, source, activation):
    setup = make(WIDE["stride 2"], source, activation, torch.float32)
    dy = incoming(WIDE["stride 2"])
    for found, wanted in zip(results(setup, dy), results(setup.to(torch.float64), dy), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    drawn = case(
        (draw(1, 4), draw(2, 70), draw(1, 12), draw(1, 12)),
        kernel=draw(1, 5),
        stride=draw(1, 4),
        padding=draw(0, 4),
        dilation=draw(1, 3),
    )
    assume(min(drawn.output) > 0)
    activation = data.draw(st.sampled_from([*PIECEWISE, *SMOOTH]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    source = data.draw(st.sampled_from([s for s in SOURCES if "vdn" not in s]))
    setup = make(drawn, source, activation, dtype, residual=data.draw(st.booleans()), seed=draw(0, 1000))
    assume(setup.rest[1])
    exact = setup.to(torch.float64)
    z = Setup(exact.tensors, exact.convolution, (*exact.rest[:-2], "", [])).composition()[0]
    edges = torch.tensor([0, *(activation.parameters if activation else ())])
    distance = (z[..., None] - edges).abs().amin(-1)
    dy = incoming(drawn).masked_fill(distance <= 64 * torch.finfo(dtype).eps * z.abs().max(), 0)
    with threads(draw(1, 3)):
        ours = results(setup, dy)
    _, _, var, *_ = expected = results(exact, dy)
    assume(var.min() > 1e-2)  # else a division by next to nothing enlarges every rounding
    for found, wanted in zip(ours, expected, strict=True):
        if found.numel():
            assert (found.double() - wanted).norm() <= 64 * torch.finfo(dtype).eps * (1 + wanted.norm()) * drawn.kernel


@pytest.mark.parametrize("activation", [RELU, Activation("gelu")], ids=str)
def test_threads_change_rounding_alone_and_nothing_changes_without_them(activation):
    shape = WIDE["5x5"]
    found = []
    for count in (1, 2, 4, 4):
        with threads(count):
            found.append(results(make(shape, "grid:1/8", activation, torch.float32), incoming(shape)))
    for one, two, four, again in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, four)
        assert torch.equal(four, again)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads(value):
    setup = make(WIDE["80 channels"], "bs:1/2", RELU, torch.float32)
    with torch.no_grad():
        setup.tensors[0][-1, 3, 5, 5] = value
        setup.tensors[0][-1, 7] = value
    dy = incoming(WIDE["80 channels"])
    for found, wanted in zip(results(setup, dy), results(setup.to(torch.float64), dy), strict=True):
        assert torch.equal(found.isfinite(), wanted.isfinite())


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(WIDE["5x5"], layout="contiguous"),
        dataclasses.replace(WIDE["5x5"], out=144),
        dataclasses.replace(WIDE["5x5"], groups=36),
        dataclasses.replace(WIDE["5x5"], kernel=12, padding=6),
        ConvCase("", (3, 8, 12), out=8, groups=8),
    ],
    ids=["contiguous", "two outputs an input", "two inputs an output", "many taps", "1d"],
)
def test_other_convolutions_are_left_to_torch(other):
    setup = make(other, "grid:1/4", RELU, torch.float32)
    assert plan(setup) is None
    OPS.conv_batch_norm(*setup.arguments)[0].sum().backward()


def test_gradients_come_in_any_memory_order():
    setup = make(WIDE["80 channels"], "grid:1/4", RELU, torch.float32)
    dy = incoming(WIDE["80 channels"])
    last = dy.contiguous(memory_format=torch.channels_last)
    for one, other in zip(results(setup, dy), results(setup, last), strict=True):
        assert torch.equal(one, other)
    y, *_ = OPS.conv_batch_norm(*setup.arguments)
    y.sum().backward()  # a gradient of one element, expanded
    assert setup.tensors[0].grad.isfinite().all()


def test_filters_in_any_memory_order():
    setup = make(WIDE["80 channels"], "grid:1/4", RELU, torch.float32)
    x, weight, *others = setup.tensors
    turned = weight.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    dy = incoming(WIDE["80 channels"])
    found = results(Setup((x, turned, *others), setup.convolution, setup.rest), dy)
    for one, other in zip(found, results(setup, dy), strict=True):
        assert torch.equal(one, other)
