"""The operators against float64, against torch, and against the dispatcher's own checks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import leannorm.backends  # noqa: F401
from cases import ACTIVATIONS, CASES, SOURCES, Case, regions_of
from leannorm.functional import batch_norm
from leannorm.ops import definition
from leannorm.statistics import Regions

OPS = torch.ops.leannorm
GRADIENT_CASES = [case for case in CASES if case.name in ("1d", "1d length", "2d channels last", "3d")]


def sampled(x: Tensor, regions: Regions, draw: Tensor | None) -> list[Tensor]:
    """Take the regions' elements one by one, as (C, elements)."""
    dimensions = [0, *range(2, x.ndim)]
    if not regions.boxes:
        return [x.transpose(0, 1).flatten(1)]
    samples = []
    for r in range(len(regions.weights)):
        positions = []
        for k in range(len(dimensions)):
            at = r * len(dimensions) + k
            start, span, count, step = regions.boxes[4 * at : 4 * at + 4]
            shift = 0 if draw is None else int(draw[at]) % span
            positions.append([start + shift + i * step for i in range(count)])
        columns = [x[(n, slice(None), *s)] for n, *s in _product(positions)]
        samples.append(torch.stack(columns, 1))
    return samples


def _product(lists):
    return torch.cartesian_prod(*map(torch.tensor, lists)).reshape(-1, len(lists)).tolist()


def reference(x, weight, bias, residual, regions, draw, eps, activation):
    """Compute the layer from its formula, element by element, differentiably."""
    samples = sampled(x, regions, draw)
    shares = regions.weights or (1.0,)
    mean = sum(w * s.mean(1) for w, s in zip(shares, samples, strict=True))
    second = sum(w * ((s - mean.detach()[:, None]) ** 2).mean(1) for w, s in zip(shares, samples, strict=True))
    var = second - (mean - mean.detach()) ** 2
    shape = (1, -1, *(1,) * (x.ndim - 2))
    z = (x - mean.view(shape)) / (var + eps).sqrt().view(shape) * weight.view(shape) + bias.view(shape)
    z = z if residual is None else z + residual
    return definition.activate(z, activation.kind, activation.parameters) if activation else z, mean, var


def call(x, weight, bias, residual, regions, draw, eps, activation):
    return OPS.batch_norm(
        x, weight, bias, residual, draw, list(regions.boxes), list(regions.weights), eps,
        activation.kind if activation else "", list(activation.parameters) if activation else [],
    )  # fmt: skip


def setup(case: Case, source: str, dtype: torch.dtype, *, residual: bool):
    x = case.tensor(dtype)
    if "vdn" in source and x.shape[0] < 2:
        pytest.skip("no sample besides the virtual one")
    generator = torch.Generator().manual_seed(1)
    channels = x.shape[1]
    weight = torch.randn(channels, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64).to(dtype)
    extra = case.tensor(torch.float64, 2).sub(case.offset).to(dtype) if residual else None
    regions = regions_of(source, tuple(x.shape), x.is_contiguous())
    draw = torch.randint(0, 2**62, (regions.draws,), generator=generator) if regions.draws else None
    return x, weight, bias, extra, regions, draw


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64_equals_the_formula(case, source, activation, residual):
    x, weight, bias, extra, regions, draw = setup(case, source, torch.float64, residual=residual)
    inputs = [t.requires_grad_() for t in (x, weight, bias, extra) if t is not None]
    y, mean, var = call(x, weight, bias, extra, regions, draw, 1e-3, activation)
    assert y.shape == x.shape
    assert y.stride() == torch.empty_like(x).stride()
    if x.numel() == 0:
        assert not mean.any()
        y.sum().backward()
        assert not weight.grad.any()
        return
    expected, expected_mean, expected_var = reference(x, weight, bias, extra, regions, draw, 1e-3, activation)
    tolerance = 1e-10 if case.offset == 0 else 1e-6
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mean, expected_mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(var, expected_var, rtol=tolerance, atol=tolerance)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(y, inputs, dy)
    wanted = torch.autograd.grad(expected, inputs, dy)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS[:2], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if "empty" not in c.name], ids=lambda case: case.name)
def test_error_is_at_most_twice_torchs(case, activation, residual, dtype):
    if case.offset and dtype != torch.float32:
        pytest.skip("half precision cannot hold the offset")
    x, weight, bias, extra, regions, draw = setup(case, "full", dtype, residual=residual)
    repeats = 8  # of the incoming gradient: a single sum's error would be luck

    def torchs(x, weight, bias, extra):
        y = F.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-5)
        y = y if extra is None else y + extra
        return F.relu(y) if activation else y

    def ours(x, weight, bias, extra):
        return call(x, weight, bias, extra, regions, draw, 1e-5, activation)[0]

    def run(function, dtype):
        inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias, extra)]
        y = function(*inputs)
        generator = torch.Generator().manual_seed(3)
        gradients = []
        for _ in range(repeats):
            dy = torch.randn(y.shape, dtype=torch.float64, generator=generator).to(x.dtype)
            wanted = [t for t in inputs if t is not None]
            gradients.append(torch.autograd.grad(y, wanted, dy.to(dtype), retain_graph=True))
        return [y.double(), *(torch.stack(g).double() for g in zip(*gradients, strict=True))]

    truth = run(torchs, torch.float64)
    for exact, theirs, found in zip(truth, run(torchs, dtype), run(ours, dtype), strict=True):
        unit = exact.abs().max() * torch.finfo(dtype).eps
        assert (found - exact).norm() <= 2 * (theirs - exact).norm() + unit


@pytest.mark.parametrize("source", SOURCES)
def test_tensor_indices_and_slices_agree(source):
    x, _, _, _, regions, draw = setup(CASES[5], source, torch.float64, residual=False)
    sliced = definition.indices(x, draw, regions.boxes, read_draw=True)
    gathered = definition.indices(x, draw, regions.boxes, read_draw=False)
    for a, b in zip(sliced, gathered, strict=True):
        assert torch.equal(x[a], x[b])


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: case.name)
def test_gradcheck(case, source, activation, residual):
    shape = (*case.shape[:2], *(min(size, 3) for size in case.shape[2:]))
    small = Case(case.name, shape, case.layout)
    x, weight, bias, extra, regions, draw = setup(small, source, torch.float64, residual=residual)
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias, extra) if t is not None)

    def function(x, weight, bias, extra=None):
        return call(x, weight, bias, extra, regions, draw, 1e-3, activation)[0]

    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


FAST_CHECKS = {
    (case, source, activation)
    for case in (CASES[0], CASES[3], CASES[4])
    for source in ("full", "grid:1/8@step", "fs:1/8@step+vdn:1")
    for activation in (None, ACTIVATIONS[1], ACTIVATIONS[4])
}


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(
    ("case", "source", "activation"),
    [
        pytest.param(*check, marks=() if check in FAST_CHECKS else pytest.mark.slow, id="-".join(map(str, check)))
        for check in itertools.product((*GRADIENT_CASES, CASES[2]), SOURCES, ACTIVATIONS)
    ],
)
def test_opcheck_of_the_fused_operators(case, source, activation, residual):
    x, weight, bias, extra, regions, draw = setup(case, source, torch.float32, residual=residual)
    kind, parameters = (activation.kind, list(activation.parameters)) if activation else ("", [])
    places = (draw, list(regions.boxes), list(regions.weights))
    y, mean, var = OPS.batch_norm(x, weight, bias, extra, *places, 1e-5, kind, parameters)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, weight, bias, extra)]
    torch.library.opcheck(OPS.batch_norm, (*leaves, *places, 1e-5, kind, parameters))
    args = (y, x, mean, var, weight, bias, extra, y, 1e-5, kind, parameters, *places, residual)
    torch.library.opcheck(OPS.batch_norm_backward, args)


@pytest.mark.parametrize("source", ["grid:1/8", "bs:1/4", "fs:1/8@step+vdn:1"])
def test_steps_give_what_the_fused_operators_give(source):
    x, weight, bias, extra, regions, draw = setup(CASES[3], source, torch.float64, residual=True)
    places = (draw, list(regions.boxes), list(regions.weights))
    silu = ("silu", [])
    dy = torch.randn_like(x)
    y, mean, var = OPS.batch_norm(x, weight, bias, extra, *places, 1e-5, *silu)
    torch.testing.assert_close(OPS.moments(x, *places), (mean, var))
    torch.testing.assert_close(OPS.normalize(x, mean, var, weight, bias, extra, 1e-5, *silu), y)
    point = (mean, var, weight, bias, extra, None, 1e-5, *silu)
    wanted = OPS.batch_norm_backward(dy, x, *point, *places, True)
    dx, *sums, dresidual = OPS.backward_fused(dy, x, *point, True)
    corrected = OPS.correct(dx, x, mean, var, weight, *sums, 1e-5, *places)
    torch.testing.assert_close((corrected, *sums, dresidual), wanted)
    torch.testing.assert_close(OPS.backward_reduce(dy, x, *point), tuple(sums))
    for op, args in {
        OPS.moments: (x, *places),
        OPS.normalize: (x, mean, var, weight, bias, extra, 1e-5, *silu),
        OPS.backward_reduce: (dy, x, *point),
        OPS.backward_fused: (dy, x, *point, True),
        OPS.correct: (dx, x, mean, var, weight, *sums, 1e-5, *places),
    }.items():
        torch.library.opcheck(op, args)


def test_exact_steps_give_what_the_fused_operators_give():
    x, weight, bias, extra, _, _ = setup(CASES[3], "full", torch.float64, residual=True)
    dy = torch.randn_like(x)
    mean, var = OPS.moments(x, None, [], [])
    point = (mean, var, weight, bias, extra, None, 1e-5, "gelu", [])
    sums = OPS.backward_reduce(dy, x, *point)
    count = torch.tensor(x.numel() / x.shape[1])
    dx, dresidual = OPS.backward_apply(dy, x, *point, *sums, count, True)
    wanted = OPS.batch_norm_backward(dy, x, *point, None, [], [], True)
    torch.testing.assert_close((dx, *sums, dresidual), wanted)
    torch.library.opcheck(OPS.backward_apply, (dy, x, *point, *sums, count, True))


def test_operators_without_derivative_say_so():
    x = torch.randn(4, 3, requires_grad=True)
    mean, _ = OPS.moments(x, None, [], [])
    with pytest.raises(RuntimeError, match="moments has no derivative; use"):
        mean.sum().backward()


def test_statistics_carry_no_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    y, mean, var = batch_norm(x)
    assert y.requires_grad
    assert not mean.requires_grad
    assert not var.requires_grad


def test_overlapping_regions_add_up():
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    box = (0, 1, 4, 1, 1, 1, 3, 1, 2, 1, 3, 1)
    twice = Regions(box * 2, (0.5, 0.5), 0, 1 / 72)
    once = Regions(box, (1.0,), 0, 1 / 36)
    results = [batch_norm(x, statistics=regions, activation="silu")[0] for regions in (twice, once)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in results))


def test_equal_seeds_draw_equal_places():
    x = torch.randn(8, 3, 16, 16)
    regions = regions_of("fs:1/8@step", x.shape)
    means = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        means.append(batch_norm(x, statistics=regions)[1])
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])
