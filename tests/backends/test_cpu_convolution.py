"""Native convolutions with their batch norm, against float64 and against PyTorch's convolution with it."""

import dataclasses

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from thread_count import threads

from conv_cases import PIECEWISE, SMOOTH, SOURCES, ConvCase, Setup, make
from leannorm import Activation
from leannorm.backends import cpu
from leannorm.backends.cpu import convolution as native

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")
OPS = torch.ops.leannorm
RELU = Activation("relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def depthwise(shape, **others) -> ConvCase:
    channels = shape[1]
    return ConvCase("", shape, out=channels, groups=channels, layout="channels_last", **others)


def pointwise(shape, out, stride=1) -> ConvCase:
    return ConvCase("", shape, out=out, kernel=1, padding=0, stride=stride, layout="channels_last")


DEPTHWISE = {
    "80 channels": depthwise((2, 80, 14, 14)),
    "stride 2": depthwise((3, 96, 15, 14), stride=2),
    "stride 3 of 2": depthwise((2, 40, 9, 10), kernel=2, stride=3),
    "5x5": depthwise((2, 72, 12, 30), kernel=5, padding=2),
    "7x7 stride 2": depthwise((2, 33, 20, 9), kernel=7, stride=2, padding=3),
    "dilated by 3": depthwise((2, 24, 13, 17), padding=3, dilation=3, stride=2),
    "1x1": depthwise((2, 20, 6, 6), kernel=1, padding=0),
    "one row": depthwise((3, 64, 1, 300)),
    "two positions": depthwise((9, 130, 2, 1)),
    "around the caches": depthwise((4, 96, 76, 76)),
}
POINTWISE = {
    "64 to 80": pointwise((2, 64, 14, 14), 80),
    "7 to 5": pointwise((3, 7, 9, 11), 5),
    "3 to 17 stride 3": pointwise((1, 3, 40, 40), 17, stride=3),
    "65 to 130 stride 2": pointwise((2, 65, 15, 14), 130, stride=2),
    "wide": pointwise((1, 1200, 6, 7), 600),
    "2 to 24": pointwise((4, 2, 8, 8), 24),
    "pointwise around the caches": pointwise((4, 192, 56, 56), 256),
}
WIDE = DEPTHWISE | POINTWISE


def results(setup: Setup, dy: torch.Tensor) -> list[torch.Tensor]:
    y, mean, var, sample, kept = OPS.conv_batch_norm(*setup.arguments)
    inputs = [t for i, t in enumerate(setup.tensors) if t is not None and i != 2]
    return [y, mean, var, sample, kept, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def plan(setup: Setup):
    x, weight, *_ = setup.tensors
    places = setup.rest[:3]
    return native.plan(x, weight, *setup.convolution, *places)


def is_taken(case: ConvCase, dtype: torch.dtype) -> bool:
    return case.groups > 1 or dtype is torch.float32


def incoming(case: ConvCase, seed: int = 0) -> torch.Tensor:
    return torch.randn(case.output, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in WIDE for dtype in DTYPES if is_taken(WIDE[name], dtype)],
    ids=str,
)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, RELU, Activation("silu")], ids=str)
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
    monkeypatch.setattr(native, "plan", lambda *_: None)
    for found, theirs, wanted in zip(ours, results(setup, dy), expected, strict=True):
        assert (found.dtype, found.shape, found.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        if found.numel():
            unit = 4 * torch.finfo(dtype).eps * wanted.norm()
            assert (found.double() - wanted).norm() <= 2 * (theirs.double() - wanted).norm() + unit


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("activation", [*PIECEWISE, *SMOOTH], ids=str)
@pytest.mark.parametrize("name", ["stride 2", "65 to 130 stride 2"])
def test_sources_and_activations(instruction_set, name, source, activation):
    setup = make(WIDE[name], source, activation, torch.float32)
    dy = incoming(WIDE[name])
    for found, wanted in zip(results(setup, dy), results(setup.to(torch.float64), dy), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    shape = (draw(1, 4), draw(2, 70), draw(1, 12), draw(1, 12))
    if data.draw(st.booleans()):
        drawn = pointwise(shape, draw(1, 70), stride=draw(1, 4))
    else:
        drawn = depthwise(shape, kernel=draw(1, 5), stride=draw(1, 4), padding=draw(0, 4), dilation=draw(1, 3))
    assume(min(drawn.output) > 0)
    activation = data.draw(st.sampled_from([*PIECEWISE, *SMOOTH]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    assume(is_taken(drawn, dtype))
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
@pytest.mark.parametrize(("name", "atol"), [("5x5", 1e-5), ("64 to 80", 3e-5)])  # products add up more
def test_threads_change_rounding_alone_and_nothing_changes_without_them(name, atol, activation):
    shape = WIDE[name]
    found = []
    for count in (1, 2, 4, 4):
        with threads(count):
            found.append(results(make(shape, "grid:1/8", activation, torch.float32), incoming(shape)))
    for one, two, four, again in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1.3e-6, atol=atol)
        torch.testing.assert_close(one, four, rtol=1.3e-6, atol=atol)
        assert torch.equal(four, again)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["80 channels", "64 to 80"])
def test_what_is_not_finite_spreads(name, value):
    setup = make(WIDE[name], "bs:1/2", RELU, torch.float32)
    with torch.no_grad():
        setup.tensors[0][-1, 3, 5, 5] = value
        setup.tensors[0][-1, 7] = value
    dy = incoming(WIDE[name])
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
        dataclasses.replace(POINTWISE["7 to 5"], layout="contiguous"),
        dataclasses.replace(POINTWISE["7 to 5"], padding=1),
        dataclasses.replace(POINTWISE["7 to 5"], kernel=2),
        pointwise((2, 2049, 2, 2), 2048),
        ConvCase("", (24, 5)),
    ],
    ids=[
        "contiguous",
        "two outputs an input",
        "two inputs an output",
        "many taps",
        "1d",
        "pointwise, contiguous",
        "pointwise, padded",
        "2x2",
        "many weights",
        "linear",
    ],
)
def test_other_convolutions_are_left_to_torch(other):
    setup = make(other, "grid:1/4", RELU, torch.float32)
    assert plan(setup) is None
    OPS.conv_batch_norm(*setup.arguments)[0].sum().backward()


@pytest.mark.parametrize("name", ["80 channels", "64 to 80"])
def test_gradients_come_in_any_memory_order(name):
    setup = make(WIDE[name], "grid:1/4", RELU, torch.float32)
    dy = incoming(WIDE[name])
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


def test_a_pointwise_convolution_of_half_precision_is_left_to_torch():
    setup = make(POINTWISE["64 to 80"], "grid:1/4", RELU, torch.bfloat16)
    assert plan(setup) is None


@pytest.mark.parametrize("name", ["64 to 80", "65 to 130 stride 2"])
def test_a_pointwise_convolution_of_the_network_s_input(name):
    setup = make(POINTWISE[name], "grid:1/4", RELU, torch.float32)
    dy = incoming(POINTWISE[name])
    x, *others = setup.tensors
    without = Setup((x.detach(), *others), setup.convolution, setup.rest)
    y, *_ = OPS.conv_batch_norm(*without.arguments)
    weight = setup.tensors[1]
    (found,) = torch.autograd.grad(y, weight, dy)
    y, *_ = OPS.conv_batch_norm(*setup.arguments)
    (wanted,) = torch.autograd.grad(y, weight, dy)
    assert torch.equal(found, wanted)
