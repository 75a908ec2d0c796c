"""The convolution folded with its batch norm while training: against the two one after the other."""

import dataclasses
import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import leannorm.backends
from cases import regions_of
from conv_cases import CONV_CASES, PIECEWISE, SMOOTH, SOURCES, ConvCase, Setup, make
from leannorm import Activation, FullBatch, GridSampling
from leannorm.backends import activated_convolution, sampled_windows
from leannorm.backends.activated_convolution import Convolution, activated
from leannorm.functional import batch_norm, conv_batch_norm
from leannorm.ops.conv_batch_norm import convolution

OPS = torch.ops.leannorm
BY_NAME = {case.name: case for case in CONV_CASES}
RELU, SILU = Activation("relu"), Activation("silu")


def sampled(case: ConvCase, source: str) -> bool:
    """Whether the source takes some of the outputs, not all."""
    if "vdn" in source and case.shape[0] < 2:
        return False
    return bool(regions_of(source, case.output).boxes)


def gradients(y, setup: Setup, dy):
    return torch.autograd.grad(y, [t for t in setup.tensors if t is not None], dy, allow_unused=True)


ALL = [(case, source) for case, source in itertools.product(CONV_CASES, SOURCES) if sampled(case, source)]
IDS = [f"{case.name}-{source}" for case, source in ALL]


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [*PIECEWISE, SMOOTH[0]], ids=str)
@pytest.mark.parametrize(("case", "source"), ALL, ids=IDS)
def test_float64_equals_one_after_the_other(case, source, activation, residual):
    setup = make(case, source, activation, torch.float64, residual=residual)
    y, mean, var, *_ = OPS.conv_batch_norm(*setup.arguments)
    expected = setup.composition()
    tolerance = 1e-10 * max(1.0, case.offset)
    torch.testing.assert_close((y, mean, var), tuple(expected), rtol=tolerance, atol=tolerance)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    before = dy.clone()
    found, wanted = gradients(y, setup, dy), gradients(expected[0], setup, dy)
    assert torch.equal(dy, before)
    for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
        assert (f == 0).all() if i == 2 else (f - w).norm() <= tolerance * max(1.0, w.norm())


@pytest.mark.parametrize("activation", SMOOTH[1:], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_activations_that_need_the_sum_before_them(activation, residual):
    setup = make(BY_NAME["3x3 channels last"], "grid:1/8", activation, torch.float64, residual=residual)
    y, *_ = OPS.conv_batch_norm(*setup.arguments)
    expected, *_ = setup.composition()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    for i, pair in enumerate(zip(gradients(y, setup, dy), gradients(expected, setup, dy), strict=True)):
        if i != 2:
            torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [*PIECEWISE, SILU], ids=str)
@pytest.mark.parametrize("source", ["grid:1/4", "fs:1/8@step+vdn:1"])
@pytest.mark.parametrize("name", ["3x3 stride 2 odd", "depth-wise", "1d", "linear"])
def test_gradcheck(name, source, activation, residual):
    case = BY_NAME[name]
    shape = (3 if case.shape[2:] else 12, case.shape[1], *(5,) * (len(case.shape) - 2))
    small = dataclasses.replace(case, shape=shape)
    setup = make(small, source, activation, torch.float64, residual=residual)
    inputs = tuple(t for i, t in enumerate(setup.tensors) if t is not None and i != 2)

    def function(x, weight, gamma, beta, extra=None):
        return OPS.conv_batch_norm(x, weight, None, gamma, beta, extra, *setup.convolution, *setup.rest)[0]

    assert gradcheck(function, inputs, fast_mode=True)
    if residual and activation is SILU:
        with pytest.raises(RuntimeError, match="has no second derivative: it does not keep the residual"):
            gradgradcheck(function, inputs, fast_mode=True)
    else:
        assert gradgradcheck(function, inputs, fast_mode=True)


def sides(setup: Setup):
    return (
        (setup.to(torch.float64), Setup.torchs),
        (setup.to(setup.tensors[0].dtype), Setup.torchs),
        (setup.to(setup.tensors[0].dtype), lambda setup: OPS.conv_batch_norm(*setup.arguments)[0]),
    )


ROUNDED = [case for case in CONV_CASES if "wide" not in case.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, RELU, SILU], ids=str)
@pytest.mark.parametrize("case", ROUNDED, ids=lambda case: case.name)
def test_error_is_at_most_twice_torchs(case, activation, residual, dtype):
    if case.name.startswith("3d") and dtype == torch.float16:
        pytest.skip("torch's convolution of float16 in 3d is a matter of seconds")
    if case.offset > 100 and dtype != torch.float32:
        pytest.skip("torch's own result is noise, too")
    found = [[], [], []]
    for seed in range(16 if case.offset and activation is SILU else 4):  # a single sum's error would be luck
        setup = make(case, "grid:1/4", activation, dtype, residual=residual, seed=seed)
        dy = torch.randn(case.output, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        # nor may the rounding decide the sign before a ReLU
        z = Setup(setup.to(torch.float64).tensors, setup.convolution, (*setup.rest[:-2], "", [])).composition()[0]
        dy = torch.where(z.abs() > 16 * torch.finfo(dtype).eps * z.abs().max(), dy, 0).to(dtype)
        for values, (side, compute) in zip(found, sides(setup), strict=True):
            y = compute(side)
            tensors = [t for i, t in enumerate(side.tensors) if t is not None and i != 2]
            values.append([y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))])
    stacks = [[torch.stack(tensors).double() for tensors in zip(*values, strict=True)] for values in found]
    torchs = [(theirs - exact).norm() / exact.norm() for exact, theirs, _ in zip(*stacks, strict=True)]
    torchs[3] = max(torchs[2:4])  # gamma's gradient is a product with the filters' gradient, and has its rounding
    for allowed, exact, _, ours in zip(torchs, *stacks, strict=True):
        unit = exact.abs().max() * torch.finfo(dtype).eps
        assert (ours - exact).norm() <= 2 * allowed * exact.norm() + unit


FAST_CHECKS = ("3x3 channels last", "one sample", "1d", "linear")


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", [None, RELU, SILU], ids=str)
@pytest.mark.parametrize(
    ("case", "source"),
    [
        pytest.param(
            case, source, marks=() if case.name in FAST_CHECKS else pytest.mark.slow, id=f"{case.name}-{source}"
        )
        for case, source in ALL
        if source in ("grid:1/8@step", "fs:1/8@step+vdn:1")
    ],
)
def test_opcheck(case, source, activation, residual):
    setup = make(case, source, activation, torch.float32, residual=residual)
    torch.library.opcheck(OPS.conv_batch_norm, setup.arguments)
    x, weight, _, gamma, *_ = setup.tensors
    y, mean, var, sample, kept = OPS.conv_batch_norm(*setup.arguments)
    dy, at = torch.randn_like(y), {None: None, RELU: y, SILU: kept}[activation]
    args = (dy, x, weight, gamma, at, mean, var, sample, *setup.convolution, *setup.rest, True, residual)
    torch.library.opcheck(
        OPS.conv_batch_norm_backward, [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["1x1 stride 2", "3x3", "dilated", "wide padding", "even kernel", "1d", "linear"])
def test_windows_by_slices_and_by_indices_give_the_sampled_outputs(name, source):
    case = BY_NAME[name]
    if not sampled(case, source):
        pytest.skip("takes all outputs")
    setup = make(case, source, None, torch.float64)
    x, weight = setup.tensors[0].detach(), setup.tensors[1].detach()
    draw, boxes = setup.rest[:2]
    _, _, _, sample, _ = OPS.conv_batch_norm(*setup.arguments)
    settings = Convolution(*(tuple(s) if isinstance(s, list) else s for s in setup.convolution))
    for read_draw in (True, False):
        taken = sampled_windows.windows(x, weight.shape[2:], settings, draw, boxes, read_draw=read_draw)
        parts = [convolution(w.crop, weight, None, w.stride, w.padding, w.dilation, case.groups) for w in taken]
        found = torch.cat([part.movedim(1, -1).flatten(0, -2) for part in parts])
        torch.testing.assert_close(found, sample)
    u = convolution(x, weight, None, *setup.convolution)
    index = leannorm.ops.definition.indices(u, draw, boxes, read_draw=True)
    torch.testing.assert_close(sample, torch.cat([u[i].movedim(1, -1).flatten(0, -2) for i in index]))


def test_what_is_kept_for_backward():
    case = ConvCase("", (4, 8, 16, 16), out=8, layout="channels_last")

    def kept(activation, residual):
        setup = make(case, "grid:1/8", activation, torch.float32, residual=residual)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y, *_ = OPS.conv_batch_norm(*setup.arguments)
        large = [t for t in saved if t.numel() == y.numel()]
        return sum(t.data_ptr() == y.data_ptr() for t in large), len(large)

    assert kept(None, False) == (0, 1)  # the input alone
    assert kept(None, True) == (0, 1)
    assert kept(RELU, True) == (1, 2)
    assert kept(SILU, True) == (0, 2)


@pytest.mark.parametrize("case", CONV_CASES, ids=lambda case: case.name)
def test_the_output_has_the_memory_format_of_torchs(case):
    setup = make(case, "grid:1/2", RELU, torch.float32)
    x, weight, *_ = setup.tensors
    y, *_ = OPS.conv_batch_norm(*setup.arguments)
    assert y.stride() == convolution(x, weight, None, *setup.convolution).stride()


def test_gradients_that_nobody_needs_are_not_computed():
    setup = make(BY_NAME["3x3"], "grid:1/8", RELU, torch.float32)
    setup.tensors[0].requires_grad_(False)
    y, *_ = OPS.conv_batch_norm(*setup.arguments)
    y.sum().backward()
    assert setup.tensors[0].grad is None
    assert not setup.tensors[2].grad.any()
    assert setup.tensors[1].grad.any()


def test_the_mean_holds_the_convolutions_bias():
    x, w, b = torch.randn(4, 3, 8, 8), torch.randn(5, 3, 3, 3), torch.randn(5)
    settings = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    source = GridSampling(1 / 4)
    found = conv_batch_norm(x, w, b, statistics=source, activation="relu", **settings)
    expected = batch_norm(torch.nn.functional.conv2d(x, w, b, padding=1), statistics=source, activation="relu")
    torch.testing.assert_close(found, expected)


def test_filters_of_a_wider_dtype_are_rounded_once():
    setup = make(BY_NAME["3x3"], "grid:1/4", RELU, torch.float32)
    x, weight, *others = setup.tensors
    half = Setup((x.detach().bfloat16().requires_grad_(), weight, *others), setup.convolution, setup.rest)
    y, *_ = OPS.conv_batch_norm(*half.arguments)
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y.float().square().sum(), [*half.tensors[:2]])
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32]
    expected, *_ = Setup((half.tensors[0].float(), weight, *others), setup.convolution, setup.rest).composition()
    assert (y.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", PIECEWISE, ids=str)
def test_private_operators_give_what_plain_ones_give(monkeypatch, activation, residual, dtype):
    setup = make(BY_NAME["3x3 stride 2 odd"], "grid:1/4", activation, dtype, residual=residual)
    x, weight, _, _, bias, extra = (None if t is None else t.detach() for t in setup.tensors)
    settings = Convolution(*(tuple(s) if isinstance(s, list) else s for s in setup.convolution))
    kind, parameters = setup.rest[-2:]
    given = (x, weight, bias.float(), extra, settings, kind, parameters)
    found = activated(*given)
    monkeypatch.setattr(activated_convolution, "_OPERATORS", {})
    tolerance = 4 * torch.finfo(dtype).eps * found.abs().max().item()
    torch.testing.assert_close(found, activated(*given), rtol=0, atol=tolerance)


def test_a_private_operator_that_is_gone_or_gives_something_else_is_not_taken():
    def gone(*_):
        raise AttributeError("no such operator")

    def wrong(x, *_):
        return torch.zeros(2, 8, 5, 5)

    for operator in (gone, wrong):
        assert not activated_convolution._serves(operator, "cpu", torch.float32, 2, False, "relu")
    if torch.backends.mkldnn.is_available():
        assert activated_convolution._serves(activated_convolution._onednn, "cpu", torch.float32, 2, True, "relu")


SETTINGS = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"statistics": FullBatch()},
            "need the convolution's whole output first; call the convolution, then batch_norm",
        ),
        ({"statistics": GridSampling(1.0)}, "need the convolution's whole output first"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"weight": torch.ones(4)}, r"weight must have the shape \(5,\)"),
        ({"residual": torch.ones(4, 5, 8, 7)}, "residual must have the input's shape and dtype"),
        (
            {"statistics": GridSampling(1e-3, minimum=1), "input": torch.ones(1, 3, 8, 8)},
            "more than 1 value per channel",
        ),
    ],
)
def test_refusals(changes, message):
    given = {"input": torch.randn(4, 3, 8, 8), "conv_weight": torch.randn(5, 3, 3, 3), **SETTINGS}
    given |= {"statistics": GridSampling(1 / 4)} | changes
    with pytest.raises(ValueError, match=message):
        conv_batch_norm(**given)


def test_an_operator_without_derivative_says_so():
    setup = make(BY_NAME["3x3"], "grid:1/8", None, torch.float32)
    x, weight, _, gamma, *_ = setup.tensors
    y, mean, var, sample, _ = OPS.conv_batch_norm(*setup.arguments)
    args = (y.detach(), x, weight, gamma, None, mean, var, sample, *setup.convolution, *setup.rest, True, False)
    with pytest.raises(RuntimeError, match="conv_batch_norm_backward has no derivative; use"):
        OPS.conv_batch_norm_backward(*args)[0].sum().backward()
