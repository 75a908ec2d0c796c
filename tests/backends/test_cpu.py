"""The native CPU kernels against float64 and against torch, for each instruction set that the machine has."""

import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import leannorm.statistics
from cases import ACTIVATIONS, CASES, SOURCES, Case, regions_of
from leannorm import parse_statistics
from leannorm.backends import aten, cpu
from leannorm.functional import batch_norm

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")
HALVES = (torch.bfloat16, torch.float16)
NATIVE_CASES = [case for case in CASES if "empty" not in case.name] + [
    Case("2d wide", (2, 300, 6, 6), "channels_last"),
    Case("2d, 24 channels", (3, 24, 9, 5), "channels_last"),
    Case("2d, one channel last", (7, 1, 9, 5), "channels_last"),
    Case("2d, 8 channels", (2, 8, 70, 70)),
    Case("1d many", (600, 40)),
]


def laid_out(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like).copy_(x)


def run(module, x, weight, bias, residual, dy, regions, draw, activation, eps=1e-5, in_place=False):
    """Call a back end's two functions as autograd does, or so that dx may be written over dy; give outputs and
    gradients."""
    kind, parameters = (activation.kind, list(activation.parameters)) if activation else ("", [])
    places = draw, list(regions.boxes), list(regions.weights)
    forward = cpu._batch_norm if module is cpu else aten.batch_norm
    backward = cpu._batch_norm_backward if module is cpu else aten.batch_norm_backward
    if in_place:
        dy, backward = dy.clone(), partial(backward, in_place=True)
    y, mean, var = forward(x, weight, bias, residual, *places, eps, kind, parameters)
    from_output = residual is not None and kind in ("relu", "clamp", "leaky_relu")
    kept = residual if kind and not from_output else None
    dx, dweight, dbias, dresidual = backward(
        dy, x, mean, var, weight, bias, kept, y if from_output else None, eps, kind, parameters, *places,
        residual is not None,
    )  # fmt: skip
    return {"y": y, "mean": mean, "var": var, "dx": dx, "dweight": dweight, "dbias": dbias, "dresidual": dresidual}


def problem(case, dtype, source, *, residual, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = case.tensor(dtype, seed)
    channels = x.shape[1]
    weight, bias = torch.randn(2, channels, generator=generator)
    extra = laid_out(torch.randn(x.shape, generator=generator), x) if residual else None
    dy = laid_out(torch.randn(x.shape, generator=generator), x)
    regions = regions_of(source, tuple(x.shape), x.is_contiguous())
    draw = torch.randint(0, 2**62, (regions.draws,), generator=generator) if regions.draws else None
    return x, weight, bias, extra, dy, regions, draw


def away_from_kinks(x, weight, bias, extra, regions, draw, activation):
    """Where act' is smooth, so that a rounding of z does not change the gradient."""
    if activation is None or activation.kind in ("silu", "gelu", "gelu_tanh"):
        return torch.ones_like(x, dtype=torch.bool)
    kinks = {"relu": (0,), "leaky_relu": (0,), "hardswish": (-3, 3)}.get(activation.kind, activation.parameters)
    wide = [None if t is None else t.double() for t in (x, weight, bias, extra)]
    z = aten.batch_norm(*wide, draw, list(regions.boxes), list(regions.weights), 1e-5, "", [])[0]
    return torch.stack([(z - k).abs() > 0.02 for k in kinks]).all(0)


def assert_agrees(case, dtype, source, activation, *, residual, seed=0):
    """Hold the native results to the formula in float64, at elements and gradients that no kink touches."""
    x, weight, bias, extra, dy, regions, draw = problem(case, dtype, source, residual=residual, seed=seed)
    smooth = away_from_kinks(x, weight, bias, extra, regions, draw, activation)
    dy = laid_out(dy * smooth, x)
    assert cpu.why_not(x) is None
    wide = [None if t is None else t.double() for t in (x, weight, bias, extra, dy)]
    wanted = run(aten, *wide, regions, draw, activation)
    rstd = (wanted["var"] + 1e-5).rsqrt()
    condition = 1 + (wanted["mean"].abs() * rstd).max().item()  # by which x - mean amplifies a rounding
    gain = (weight * rstd).abs().max().item() * dy.abs().max().item()
    rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    found = [
        one
        for in_place in (False, True)
        for one in run(cpu, x, weight, bias, extra, dy, regions, draw, activation, in_place=in_place).items()
    ]
    for name, value in found:
        reference = wanted[name]
        if name in ("y", "dx", "dresidual"):
            assert value.dtype == dtype
            if value.numel():
                assert value.stride() == torch.empty_like(x).stride()
        if not reference.numel():
            continue
        scale = reference.abs().max().item()
        bound = 3e-6 * condition * (1 + scale + gain * (name == "dx"))
        if value.dtype == dtype:
            bound += rounding * scale
        error = (value.double() - reference).abs().max().item()
        assert error <= bound, f"{name}: error {error}, bound {bound}"


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_the_case_list(instruction_set, case, dtype, residual):
    if case.offset and dtype != torch.float32:
        pytest.skip("half precision cannot hold the offset")
    if case.name == "transposed":
        assert "memory order" in cpu.why_not(case.tensor(dtype))
        return
    for source in SOURCES:
        if "vdn" in source and case.shape[0] < 2:
            continue
        for activation in ACTIVATIONS:
            assert_agrees(case, dtype, source, activation, residual=residual)


@st.composite
def inputs(draw):
    spatial = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    shape = (draw(st.integers(2, 5)), draw(st.sampled_from([1, 2, 3, 8, 17, 24, 33, 64, 130])), *spatial)
    layouts = ["contiguous", "strided"] + ["channels_last"] * (len(shape) > 3)
    return (
        Case("drawn", shape, draw(st.sampled_from(layouts))),
        draw(st.sampled_from([torch.float32, *HALVES])),
        draw(st.sampled_from(SOURCES)),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.booleans()),
        draw(st.integers(0, 2**20)),
    )


def agrees(drawn):
    case, dtype, source, activation, residual, seed = drawn
    if regions_of(source, case.shape).inverse_count < 1:
        assert_agrees(case, dtype, source, activation, residual=residual, seed=seed)


@settings(max_examples=200)
@given(inputs())
def test_drawn_inputs(drawn):
    agrees(drawn)


@pytest.mark.slow
@settings(max_examples=2000)
@given(inputs())
def test_many_drawn_inputs(drawn):
    agrees(drawn)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_error_is_at_most_twice_torchs(instruction_set, activation, dtype, layout):
    case = Case("", (8, 19, 30, 30), layout, offset=0.5)
    x, weight, bias, _, dy, regions, _ = problem(case, dtype, "full", residual=False)
    dy = laid_out(dy * away_from_kinks(x, weight, bias, None, regions, None, activation), x)

    def gradients(function, *tensors, dy):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    def torchs(x, weight, bias):
        y = F.batch_norm(x, None, None, weight, bias, True)
        return aten.definition.activate(y, activation.kind, activation.parameters) if activation else y

    def ours(x, weight, bias):
        return batch_norm(x, weight, bias, activation=activation)[0]

    exact = gradients(torchs, x.double(), weight.double(), bias.double(), dy=dy.double())
    names = "y", "dx", "dweight", "dbias"
    found, peer = (gradients(f, x, weight, bias, dy=dy) for f in (ours, torchs))
    for name, e, a, b in zip(names, exact, found, peer, strict=True):
        our_error, their_error = ((v.double() - e).square().mean().sqrt().item() for v in (a, b))
        floor = torch.finfo(torch.float32).eps * e.abs().amax().item()
        assert our_error <= 2 * max(their_error, floor), name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("source", ["full", "grid:1/4"])
def test_threads_and_repeats(source, layout):
    case = Case("", (8, 24, 40, 40), layout)
    given = problem(case, torch.float32, source, residual=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4, 4):
            torch.set_num_threads(threads)
            results.append(run(cpu, *given, ACTIVATIONS[4]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:3]:
        for name, value in other.items():
            torch.testing.assert_close(value, results[0][name], rtol=2e-5, atol=2e-5)
    for name, value in results[3].items():
        assert torch.equal(value, results[2][name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nonfinite_values_stay_in_their_channel(instruction_set, layout, bad):
    x, weight, bias, _, dy, regions, draw = problem(
        Case("", (3, 19, 7, 9), layout), torch.float32, "full", residual=False
    )
    x[1, 4, 2, 3] = bad
    good = torch.arange(19) != 4
    for activation in ACTIVATIONS:
        found = run(cpu, x, weight, bias, None, dy, regions, draw, activation)
        assert found["y"][:, 4].isnan().any()
        assert not found["var"][4].isfinite()
        for name, value in found.items():
            if value.numel():
                assert (value[:, good] if value.ndim > 1 else value[good]).isfinite().all(), name
        assert found["dx"][:, 4].isnan().any()


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a], ids=str)
def test_activations_at_the_ends_of_the_range(instruction_set, activation):
    """With mean 0 and variance 1 - eps given by the sample, z is x itself."""
    tail = torch.tensor([0.0, -0.0, 3, -3, 6, 0.75, -0.5, 1e-30, -1e-30, 20, -20, 90, -90, 110, -110, 1e4, -1e4])
    x = torch.cat([tail, tail.new_tensor([1.0, -1.0])])[:, None].requires_grad_()
    sample = leannorm.statistics.Regions((len(tail), 1, 2, 1), (1.0,), 0, 0.5)
    y, mean, var = batch_norm(x, statistics=sample, eps=1e-12, activation=activation)
    assert (mean, var) == (0, 1)
    z = x.detach().double().requires_grad_()
    expected = aten.definition.activate(z, activation.kind, activation.parameters)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=1e-7)
    found = torch.autograd.grad(y[: len(tail)].sum(), x)[0][: len(tail)]
    wanted = torch.autograd.grad(expected[: len(tail)].sum(), z)[0][: len(tail)]
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)


def test_other_layouts_of_the_gradient_and_the_residual_are_taken():
    x, weight, bias, extra, dy, regions, draw = problem(
        Case("", (4, 6, 5, 5), "channels_last"), torch.float32, "grid:1/4", residual=True
    )
    plain = run(cpu, x, weight, bias, extra, dy, regions, draw, None)
    other = run(cpu, x, weight, bias, extra.contiguous(), dy.contiguous(), regions, draw, None)
    for name, value in plain.items():
        assert torch.equal(value, other[name]), name
    expanded = torch.ones(()).expand(x.shape)
    same = laid_out(expanded, x)
    a, b = (run(cpu, x, weight, bias, extra, g, regions, draw, None) for g in (expanded, same))
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_reasons():
    x = torch.randn(4, 3, 8, 8)
    assert cpu.why_not(x) is None
    assert cpu.why_not(x[:, :, ::2]) is None
    assert "float64" in cpu.why_not(x.double())
    assert "empty" in cpu.why_not(x[:0])
    assert "meta" in cpu.why_not(x.to("meta"))
    assert "memory order" in cpu.why_not(x.permute(0, 2, 1, 3))


def test_one_openmp_runtime_is_loaded():
    """Two would mean two pools of threads on the same cores."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    program = (
        "import torch, leannorm.backends; torch.randn(9, 8, 99, 99).sum();"
        "leannorm.backends.cpu._kernels.instruction_set();"
        "print({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l or 'libomp' in l})"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert len(eval(loaded)) == 1, loaded


@pytest.mark.parametrize("watched", [False, True])
def test_eager_mode_and_the_dispatcher_call_the_kernels(watched, monkeypatch):
    monkeypatch.setattr(cpu, "aten", None)  # the kernels serve, or nothing does
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch() if watched else nullcontext():
        batch_norm(x, statistics=parse_statistics("grid:1/4"))[0].sum().backward()
    names = [name for name in seen if "leannorm" in name]
    assert names == (["leannorm.batch_norm.default", "leannorm.batch_norm_backward.default"] if watched else [])
