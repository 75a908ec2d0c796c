"""The Triton kernels against float64 and against torch: interpreted on the CPU, compiled where there is a GPU."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

pytest.importorskip("triton")

import triton
import triton.language as tl
from test_cpu import away_from_kinks, inputs, laid_out, problem

from cases import ACTIVATIONS, CASES, SOURCES, Case, regions_of
from leannorm.backends import aten
from leannorm.backends import triton as backend
from leannorm.backends.triton.indexing import index, offsets, size
from leannorm.statistics import Regions
from triton_interpreter import DEVICE, ON_GPU, geometry, launchers, poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SERVED = [case for case in CASES if "empty" not in case.name and case.name != "transposed"] + [
    Case("2d wide", (2, 140, 3, 3), "channels_last"),
    Case("2d, 24 channels", (3, 24, 9, 5), "channels_last"),
    Case("2d, one pixel", (9, 5, 1, 1)),
    Case("2d, 16 rows of a plane", (2, 3, 4, 4)),
]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy, and what a mask then drops too
        yield


@pytest.fixture
def cut(monkeypatch):
    """Cut tensors otherwise: into smaller tiles, for more multiprocessors, with wider indices."""

    def cut(**constants):
        geometry.tiles.cache_clear()
        geometry.regions.cache_clear()
        for name, value in constants.items():
            monkeypatch.setattr(geometry, name, value)

    yield cut
    monkeypatch.undo()
    cut()


def on_device(tensor):
    """Move a tensor and keep its strides, which `.to` does for dense ones alone."""
    if tensor is None or not ON_GPU:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


def spelled(activation):
    return (activation.kind, list(activation.parameters)) if activation else ("", [])


def run(module, x, weight, bias, residual, dy, regions, draw, activation, eps=1e-5):
    """Call a back end's two functions as autograd does; give outputs and gradients."""
    kind, parameters = spelled(activation)
    places = draw, list(regions.boxes), list(regions.weights)
    y, mean, var = module.batch_norm(x, weight, bias, residual, *places, eps, kind, parameters)
    from_output = residual is not None and kind in ("relu", "clamp", "leaky_relu")
    kept = residual if kind and not from_output else None
    dx, dweight, dbias, dresidual = module.batch_norm_backward(
        dy, x, mean, var, weight, bias, kept, y if from_output else None, eps, kind, parameters, *places,
        residual is not None,
    )  # fmt: skip
    return {"y": y, "mean": mean, "var": var, "dx": dx, "dweight": dweight, "dbias": dbias, "dresidual": dresidual}


def kernels(*tensors, regions, draw, activation):
    """Run the kernels on the device, into poisoned memory."""
    with poisoned():
        found = run(launchers, *map(on_device, tensors), regions, on_device(draw), activation)
    return {name: value.cpu() for name, value in found.items()}


def assert_agrees(case, dtype, source, activation, *, residual, seed=0):
    """Hold the results to the formula in float64, at elements and gradients that no kink touches."""
    x, weight, bias, extra, dy, regions, draw = problem(case, dtype, source, residual=residual, seed=seed)
    dy = laid_out(dy * away_from_kinks(x, weight, bias, extra, regions, draw, activation), x)
    found = kernels(x, weight, bias, extra, dy, regions=regions, draw=draw, activation=activation)
    wide = [None if t is None else t.double() for t in (x, weight, bias, extra, dy)]
    wanted = run(aten, *wide, regions, draw, activation)
    rstd = (wanted["var"] + 1e-5).rsqrt()
    condition = 1 + (wanted["mean"].abs() * rstd).max().item()  # by which x - mean amplifies a rounding
    gain = (weight * rstd).abs().max().item() * dy.abs().max().item()
    unit = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]  # two roundings of dx
    for name, value in found.items():
        reference = wanted[name]
        if name in ("y", "dx", "dresidual") and value.numel():
            assert value.dtype == dtype
            assert value.stride() == torch.empty_like(x).stride()
        assert value.numel() == reference.numel()
        if reference.numel():
            scale = reference.abs().max().item()
            bound = 3e-6 * condition * (1 + scale + gain * (name == "dx"))
            if value.dtype == dtype:
                bound += unit * (scale + gain * (name == "dx"))
            error = (value.double() - reference).abs().max().item()
            assert error <= bound, f"{name}: error {error}, bound {bound}"


def fits(case, dtype, source):
    return not (case.offset and dtype != torch.float32) and not ("vdn" in source and case.shape[0] < 2)


EVERYTHING = list(itertools.product(ACTIVATIONS, (False, True), DTYPES))


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_the_case_list(case):
    """Every case with every source; the activation, the residual and the dtype take turns."""
    turns = itertools.cycle(EVERYTHING[SERVED.index(case) :: 5] + EVERYTHING)
    for source in SOURCES:
        activation, residual, dtype = next(turn for turn in turns if fits(case, turn[2], "full"))
        if fits(case, dtype, source):
            assert_agrees(case, dtype, source, activation, residual=residual)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("source", ["full", "fs:1/8@step+vdn:1"])
def test_every_activation_residual_and_dtype(source, activation):
    for residual, dtype in itertools.product((False, True), DTYPES):
        assert_agrees(SERVED[6], dtype, source, activation, residual=residual)


@settings(max_examples=25)
@given(inputs())
def test_drawn_inputs(drawn):
    case, dtype, source, activation, residual, seed = drawn
    if regions_of(source, case.shape).inverse_count < 1:
        assert_agrees(case, dtype, source, activation, residual=residual, seed=seed)


@pytest.mark.sweep
@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_everything_with_everything(case):
    for (activation, residual, dtype), source in itertools.product(EVERYTHING, SOURCES):
        if fits(case, dtype, source):
            assert_agrees(case, dtype, source, activation, residual=residual)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("source", ["full", "grid:1/4@step", "0.75*grid:1/4+0.25*bs:1/2"])
def test_many_splits_and_many_tiles(cut, source, layout):
    case = Case("", (3, 5, 8, 5), layout)
    for multiprocessors, activation in ((1, ACTIVATIONS[4]), (20, ACTIVATIONS[1])):
        cut(TILE=32, CHANNELS=4, PLANE=32, _multiprocessors=lambda _, count=multiprocessors: count)
        tiles = geometry.tiles(torch.Size(case.shape), layout != "contiguous", torch.device("cpu"))
        assert (tiles.splits > 2) == (multiprocessors > 1)
        assert_agrees(case, torch.float32, source, activation, residual=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_wide_indices_give_the_same(cut, layout):
    case = Case("", (3, 6, 5, 7), layout)
    for source in ("full", "fs:1/8@step+vdn:1"):
        x, weight, bias, extra, dy, regions, draw = problem(case, torch.float32, source, residual=True)
        results = []
        for wide in (2**30, 0):
            cut(WIDE=wide)
            assert geometry.tiles(x.shape, False, x.device).options["WIDE"] == (wide == 0)
            results.append(kernels(x, weight, bias, extra, dy, regions=regions, draw=draw, activation=ACTIVATIONS[1]))
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name


def test_tensors_beyond_32_bits_have_wide_indices():
    for shape, wide in (((2**31, 1), True), ((2**22, 2**9), True), ((2**20, 2**9), False)):
        assert geometry.tiles(torch.Size(shape), True, torch.device("cpu")).options["WIDE"] == wide


@triton.jit
def offsets_kernel(out, plane, row, channels, spatial, CHANNELS_LAST: tl.constexpr):  # noqa: N803
    i_plane, i_row = index(plane, True), index(row, True) + tl.arange(0, 4)
    i_c = index(tl.arange(0, 2), True)
    o = offsets(i_plane, i_row, i_c, size(channels, 1, True), size(spatial, 1, True), CHANNELS_LAST, 1)
    tl.store(out + tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :], o)


@pytest.mark.parametrize("channels_last", [True, False])
def test_offsets_beyond_32_bits(channels_last):
    plane, row, channels, spatial = 3, 2**31 + 5, 2**12 + 1, 2**31 + 9
    out = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)
    offsets_kernel[(1,)](out, plane, row, channels, spatial, CHANNELS_LAST=channels_last)
    if channels_last:
        expected = [[(row + r) * channels + c for c in (0, 1)] for r in range(4)]
    else:
        expected = [[(plane * channels + c) * spatial + row + r for c in (0, 1)] for r in range(4)]
    assert out.tolist() == expected


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_error_is_at_most_twice_torchs(activation, dtype, layout):
    case = Case("", (4, 9, 16, 16), layout, offset=0.5)
    x, weight, bias, _, dy, regions, _ = problem(case, dtype, "full", residual=False)
    dy = laid_out(dy * away_from_kinks(x, weight, bias, None, regions, None, activation), x)

    def torchs(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight.to(x.dtype), bias.to(x.dtype))]
        y = F.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
        y = aten.definition.activate(y, *spelled(activation)) if activation else y
        return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, leaves, dy.to(dtype)))]

    parameters = weight.to(dtype), bias.to(dtype)
    found = kernels(x, *parameters, None, dy, regions=regions, draw=None, activation=activation)
    ours = [found[name].double() for name in ("y", "dx", "dweight", "dbias")]
    for name, exact, theirs, mine in zip(
        ["y", "dx", "dweight", "dbias"], torchs(torch.float64), torchs(dtype), ours, strict=True
    ):
        our_error, their_error = ((v - exact).square().mean().sqrt().item() for v in (mine, theirs))
        assert our_error <= 2 * their_error + torch.finfo(torch.float32).eps * exact.abs().max().item(), name


@pytest.mark.parametrize("source", ["grid:1/8", "bs:1/4", "fs:1/8@step+vdn:1"])
def test_steps_give_what_the_fused_operators_give(source):
    x, weight, bias, extra, dy, regions, draw = problem(CASES[3], torch.float32, source, residual=True)
    x, weight, bias, extra, dy, draw = map(on_device, (x, weight, bias, extra, dy, draw))
    places = (draw, list(regions.boxes), list(regions.weights))
    silu = ("silu", [])
    with poisoned():
        y, mean, var = launchers.batch_norm(x, weight, bias, extra, *places, 1e-5, *silu)
        torch.testing.assert_close(launchers.moments(x, *places), (mean, var))
        torch.testing.assert_close(launchers.normalize(x, mean, var, weight, bias, extra, 1e-5, *silu), y)
        point = (mean, var, weight, bias, extra, None, 1e-5, *silu)
        wanted = launchers.batch_norm_backward(dy, x, *point, *places, True)
        dx, *sums, dresidual = launchers.backward_fused(dy, x, *point, True)
        before = dx.clone()
        corrected = launchers.correct(dx, x, mean, var, weight, *sums, 1e-5, *places)
        torch.testing.assert_close((corrected, *sums, dresidual), wanted)
        torch.testing.assert_close(launchers.backward_reduce(dy, x, *point), tuple(sums))
        assert torch.equal(dx, before)


@pytest.mark.parametrize("activation", ["", "relu", "gelu"])
def test_exact_steps_give_what_the_fused_operators_give(activation):
    x, weight, bias, extra, dy, _, _ = problem(CASES[3], torch.float32, "full", residual=True)
    x, weight, bias, extra, dy = map(on_device, (x, weight, bias, extra, dy))
    with poisoned():
        mean, var = launchers.moments(x, None, [], [])
        point = (mean, var, weight, bias, extra, None, 1e-5, activation, [])
        sums = launchers.backward_reduce(dy, x, *point)
        count = torch.tensor(x.numel() / x.shape[1], device=x.device)
        dx, dresidual = launchers.backward_apply(dy, x, *point, *sums, count, True)
        wanted = launchers.batch_norm_backward(dy, x, *point, None, [], [], True)
    torch.testing.assert_close((dx, *sums, dresidual), wanted)


def test_overlapping_regions_add_up():
    x, weight, bias, _, dy, _, _ = problem(Case("", (4, 2, 6, 6)), torch.float32, "full", residual=False)
    box = (0, 1, 4, 1, 1, 1, 3, 1, 2, 1, 3, 1)
    twice, once = Regions(box * 2, (0.5, 0.5), 0, 1 / 72), Regions(box, (1.0,), 0, 1 / 36)
    results = [
        kernels(x, weight, bias, None, dy, regions=regions, draw=None, activation=ACTIVATIONS[4])
        for regions in (twice, once)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nonfinite_values_stay_in_their_channel(layout, bad):
    x, weight, bias, _, dy, regions, _ = problem(Case("", (3, 7, 5, 3), layout), torch.float32, "full", residual=False)
    x[1, 4, 2, 1] = bad
    good = torch.arange(7) != 4
    for activation in ACTIVATIONS:
        found = kernels(x, weight, bias, None, dy, regions=regions, draw=None, activation=activation)
        assert found["y"][:, 4].isnan().all()
        assert not found["var"][4].isfinite()
        for name, value in found.items():
            if value.numel():
                assert (value[:, good] if value.ndim > 1 else value[good]).isfinite().all(), name
        assert found["dx"][:, 4].isnan().any()


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a], ids=str)
def test_activations_at_the_ends_of_the_range(activation):
    """With mean 0 and variance 1 - eps given, z is x itself."""
    z = torch.tensor([0.0, -0.0, 3, -3, 6, 0.75, -0.5, 1e-30, -1e-30, 20, -20, 90, -90, 110, -110, 1e4, -1e4])[:, None]
    x, mean, var = on_device(z), *(on_device(torch.tensor([value])) for value in (0.0, 1.0))
    dy, kind = torch.ones_like(x), spelled(activation)
    y = launchers.normalize(x, mean, var, None, None, None, 1e-12, *kind).cpu()
    dx = launchers.backward_fused(dy, x, mean, var, None, None, None, None, 1e-12, *kind, False)[0].cpu()
    expected = aten.definition.activate(leaf := z.double().requires_grad_(), *kind)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(dx.double(), torch.autograd.grad(expected.sum(), leaf)[0], rtol=2e-6, atol=1e-6)


def test_other_layouts_and_dtypes_of_what_comes_with_x_are_taken():
    x, weight, bias, extra, dy, regions, draw = problem(
        Case("", (4, 6, 5, 5), "channels_last"), torch.float32, "grid:1/4", residual=True
    )
    places = {"regions": regions, "draw": draw, "activation": None}
    plain = kernels(x, weight, bias, extra, dy, **places)
    spread = torch.stack([weight, bias], 1)
    other = kernels(x, spread[:, 0], spread[:, 1], extra.contiguous(), dy.contiguous(), **places)
    for name, value in plain.items():
        assert torch.equal(value, other[name]), name
    halves = weight.to(torch.bfloat16), bias.to(torch.bfloat16)
    same = kernels(x, *(h.float() for h in halves), extra, dy, **places)
    for name, value in kernels(x, *halves, extra, dy, **places).items():
        assert torch.equal(value, same[name]), name
    without = kernels(x, None, None, extra, dy, **places)
    ones = kernels(x, torch.ones(6), torch.zeros(6), extra, dy, **places)
    for name, value in without.items():
        assert torch.equal(value, ones[name]), name


def test_reasons(monkeypatch):
    x = torch.randn(4, 3, 8, 8)
    assert "for GPUs" in backend.why_not(x)
    assert "for GPUs" in backend.why_not(torch.nn.Parameter(x)[:, :, ::2])
    assert "float64" in backend.why_not(x.double())
    assert "empty" in backend.why_not(x[:0])
    assert "three spatial" in backend.why_not(x[..., None, None])
    assert "memory order" in backend.why_not(x.permute(0, 2, 1, 3))
    assert "FakeTensor" in backend.why_not(torch._subclasses.FakeTensorMode().from_tensor(x))
    monkeypatch.setattr(backend, "installed", False)
    assert "leannorm[gpu]" in backend.why_not(x)


def test_what_the_kernels_refuse_goes_to_the_reference():
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert set(backend._INPUT) == set(aten.kernels) - {"snapshot"}
    found = backend._operator("moments", 0)(x, None, [], [])
    torch.testing.assert_close(found, aten.kernels["moments"](x, None, [], []))
