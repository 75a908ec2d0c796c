"""Batch norm with given statistics (eval mode, frozen layers) as one native operator: its values and its calls."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import leannorm
from cases import ACTIVATIONS, CASES, Case
from leannorm.backends import cpu
from leannorm.functional import normalize
from leannorm.ops import definition

native = pytest.mark.skipif(not cpu.available, reason="the extension was not built")
OPS = torch.ops.leannorm
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GIVEN_CASES = [case for case in CASES if "empty" not in case.name and case.name != "transposed"] + [
    Case("2d wide", (2, 300, 6, 6), "channels_last"),
    Case("2d, 24 channels", (3, 24, 9, 5), "channels_last"),
    Case("2d, one sample of large planes", (1, 3, 260, 257)),
    Case("1d many", (600, 40)),
]


def problem(case, dtype, *, residual, seed=0):
    """Input, mean, var, weight, bias, residual and the incoming gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = case.tensor(dtype, seed)
    mean, weight, bias = torch.randn(3, x.shape[1], generator=generator)
    var = 0.5 + torch.rand(x.shape[1], generator=generator)
    extra, dy = (torch.empty_like(x).copy_(torch.randn(x.shape, generator=generator)) for _ in range(2))
    return x, mean + case.offset, var, weight, bias, extra if residual else None, dy


def torchs(x, mean, var, weight, bias, residual, activation):
    y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-5)
    y = y if residual is None else y + residual
    return definition.activate(y, activation.kind, activation.parameters) if activation else y


def ours(x, mean, var, weight, bias, residual, activation):
    return normalize(x, mean, var, weight, bias, residual=residual, activation=activation)


def smooth(given, activation):
    """Where no kink of the activation is near, so that a rounding of z does not change the gradient."""
    kinks = {"relu": (0,), "leaky_relu": (0,), "hardswish": (-3, 3), "clamp": activation and activation.parameters}
    z = torchs(*(None if t is None else t.double() for t in given), None)
    near = [(z - kink).abs() < 0.02 for kink in kinks.get(activation.kind if activation else "", ())]
    return ~torch.stack(near).any(0) if near else torch.ones_like(z, dtype=torch.bool)


def results(function, given, dy, activation, dtype=None):
    """y and the gradients of input, weight, bias and residual, in float64."""
    tensors = [None if t is None else t.to(dtype or t.dtype) for t in given]
    leaves = [None if t is None else t.detach().requires_grad_(i not in (1, 2)) for i, t in enumerate(tensors)]
    y = function(*leaves, activation)
    found = torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], dy.to(y.dtype))
    return [t.detach().double() for t in (y, *found)]


def assert_agrees(case, dtype, activation, *, residual, seed=0):
    *given, dy = problem(case, dtype, residual=residual, seed=seed)
    dy = dy * smooth(given, activation)
    y = ours(*given, activation)
    assert (y.dtype, y.stride()) == (dtype, torch.empty_like(given[0]).stride())
    found, exact = results(ours, given, dy, activation), results(torchs, given, dy, activation, torch.float64)
    peer = results(torchs, given, dy, activation)
    for name, a, theirs, truth in zip(("y", "dx", "dweight", "dbias", "dresidual"), found, peer, exact, strict=False):
        floor = 2e-6 * (1 + case.offset) * (1 + truth.abs().max())  # one element's error would be luck
        error, bound = (a - truth).abs().max(), 2 * (theirs - truth).abs().max() + floor
        assert error <= bound, f"{name}: error {error}, bound {bound}"


@native
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("case", GIVEN_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_torchs(instruction_set, case, dtype, residual):
    if case.offset and dtype != torch.float32:
        pytest.skip("half precision cannot hold the offset")
    for activation in ACTIVATIONS:
        assert_agrees(case, dtype, activation, residual=residual)


@native
@settings(max_examples=150)
@given(st.data())
def test_drawn_inputs(data):
    spatial = tuple(data.draw(st.lists(st.integers(1, 9), max_size=3)))
    shape = (data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 2, 3, 8, 17, 24, 33, 64, 130])), *spatial)
    layout = data.draw(st.sampled_from(["contiguous", "strided"] + ["channels_last"] * (len(shape) > 3)))
    dtype, activation = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(ACTIVATIONS))
    residual, seed = data.draw(st.booleans()), data.draw(st.integers(0, 2**20))
    assert_agrees(Case("drawn", shape, layout), dtype, activation, residual=residual, seed=seed)


@native
@pytest.mark.parametrize("case", GIVEN_CASES, ids=lambda case: case.name)
def test_threads_and_repeats(case):
    *given, dy = problem(case, torch.float32, residual=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4, 4):
            torch.set_num_threads(threads)
            found.append(results(ours, given, dy, ACTIVATIONS[4]))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found[1:3], [found[0]] * 2, rtol=2e-5, atol=2e-5)
    assert all(torch.equal(a, b) for a, b in zip(found[2], found[3], strict=True))


@native
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nonfinite_values_stay_in_their_place(instruction_set, layout, bad):
    *given, dy = problem(Case("", (3, 19, 7, 9), layout), torch.float32, residual=False)
    given[0][1, 4, 2, 3] = bad
    for activation in ACTIVATIONS:
        found, wanted = results(ours, given, dy, activation), results(torchs, given, dy, activation, torch.float64)
        torch.testing.assert_close(found[0], wanted[0], rtol=4e-6, atol=4e-6, equal_nan=True)
        assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(found[1:], wanted[1:], strict=True))


def counted(monkeypatch):
    """Count the calls of the kernels."""
    calls = []
    for name in ("normalize", "backward_fused"):
        kernel = cpu.eager._kernels[name, "cpu"]

        def count(*args, name=name, kernel=kernel):
            calls.append(name)
            return kernel(*args)

        monkeypatch.setitem(cpu.eager._kernels, (name, "cpu"), count)
    return calls


@native
@pytest.mark.parametrize(
    ("activation", "residual"),
    [(a, r) for a in ACTIVATIONS for r in (False, True) if a or r],
    ids=lambda value: {True: "residual", False: ""}.get(value, str(value)),
)
def test_a_frozen_layer_and_what_follows_are_one_operator_a_direction(monkeypatch, activation, residual):
    monkeypatch.setattr(cpu, "aten", None)  # the kernels serve, or nothing does
    calls = counted(monkeypatch)
    monkeypatch.setattr(F, "batch_norm", None)
    layer, x = leannorm.BatchNorm2d(3, activation=activation), torch.randn(4, 3, 8, 8, requires_grad=True)
    leannorm.freeze(layer)
    y = layer.train()(x, x.detach().clone().requires_grad_() if residual else None)
    assert calls == ["normalize"]
    y.sum().backward()
    assert calls == ["normalize", "backward_fused"]
    assert (layer.running_mean == 0).all()
    assert layer.weight.grad.shape == layer.bias.grad.shape == (3,)


@native
def test_a_layer_alone_is_torchs_operator_bit_for_bit(monkeypatch):
    calls = counted(monkeypatch)
    layer, x = leannorm.BatchNorm2d(3).eval(), torch.randn(4, 3, 8, 8)
    layer.running_mean.normal_()
    assert torch.equal(layer(x), F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias))
    assert calls == []


@native
@pytest.mark.parametrize("reason", ["float64", "empty", "memory order", "a dispatch mode"])
def test_what_the_native_operator_does_not_take_goes_to_torch(monkeypatch, reason):
    calls = counted(monkeypatch)
    x = torch.randn(2, 3, 4, 4)
    refused = {"float64": x.double(), "empty": x[:0], "memory order": x.permute(0, 2, 1, 3)}
    x = refused.get(reason, x)
    assert reason not in refused or reason in cpu.why_not(x)
    layer = leannorm.BatchNorm2d(x.shape[1], activation="silu", dtype=x.dtype).eval()
    x.requires_grad_()
    with FlopCounterMode(display=False) if reason == "a dispatch mode" else nullcontext():
        y = layer(x)
    assert calls == []
    y.sum().backward()
    expected = F.silu(F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias))
    assert torch.equal(y, expected)


@native
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", r"ignore:.torch\.jit\..*deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["export", "strict export", "make_fx", "compile", "jit.trace", "vmap", "jvp", "dual"])
def test_what_records_or_transforms_a_call_sees_plain_operators(monkeypatch, how):
    calls = counted(monkeypatch)
    layer, x = leannorm.BatchNorm2d(3, activation="gelu").eval(), torch.randn(2, 3, 4, 4)
    graph = None
    with torch.no_grad() if how != "dual" else nullcontext():
        match how:
            case "export" | "strict export":
                graph = torch.export.export(layer, (x,), strict=how == "strict export").graph
            case "make_fx":
                graph = torch.fx.experimental.proxy_tensor.make_fx(layer)(x).graph
            case "compile":

                def backend(module, inputs):
                    nonlocal graph
                    graph = module.graph
                    return module

                torch._dynamo.reset()
                torch.compile(layer, fullgraph=True, backend=backend)(x)
            case "jit.trace":
                assert "leannorm::" not in str(torch.jit.trace(layer, x, check_trace=False).inlined_graph)
            case "vmap":
                torch.vmap(lambda one: layer(one[None]))(x)
            case "jvp":
                torch.func.jvp(layer, (x,), (x,))
            case "dual":
                with forward_ad.dual_level():
                    assert forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent is not None
    assert calls == []
    assert not any("leannorm" in str(node.target) for node in (graph.nodes if graph else ()))


@native
def test_statistics_of_another_shape_or_device_are_not_read():
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="running_mean should contain 3 elements not 4"):
        normalize(x, torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="weight must be on the input's device, cpu, got meta"):
        normalize(x, torch.zeros(3), torch.ones(3), torch.ones(3, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        normalize(x, torch.zeros(3, device="meta"), torch.ones(3)).sum().item()


@native
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_jacobians_of_many_gradients_at_once(training, vectorize):
    layer = leannorm.BatchNorm1d(3, activation="silu").train(training)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.functional.jacobian(layer, x, vectorize=vectorize)
    wanted = torch.autograd.functional.jacobian(copy.deepcopy(layer).double(), x.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_have_gradients(activation):
    *given, dy = problem(Case("", (2, 3, 4, 4)), torch.float32, residual=True)
    seconds = []
    for function, dtype in ((ours, torch.float32), (torchs, torch.float64)):
        tensors = [t.to(dtype).detach().requires_grad_(i not in (1, 2)) for i, t in enumerate(given)]
        leaves = [t for t in tensors if t.requires_grad]
        first = torch.autograd.grad(function(*tensors, activation), leaves, dy.to(dtype), create_graph=True)
        loss = sum(g.square().sum() for g in first)
        found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        seconds.append([t.double() for t in found])
    torch.testing.assert_close(*seconds, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_derivatives_of_the_operator(activation, residual):
    x, mean, var, *others, _ = problem(Case("", (2, 3, 3, 2)), torch.float64, residual=residual)
    kind = (activation.kind, list(activation.parameters)) if activation else ("", [])
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, *others)]

    def function(x, *others):
        return OPS.normalize(x, mean.double(), var.double(), *others, *(None,) * (3 - len(others)), 1e-3, *kind)

    inputs = tuple(t for t in leaves if t is not None)
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)
    single = [None if t is None else t.float().detach().requires_grad_() for t in leaves]
    torch.library.opcheck(OPS.normalize, (single[0], mean, var, *single[1:], 1e-3, *kind))
    y = OPS.normalize(single[0], mean, var, *single[1:], 1e-3, *kind).detach()
    point = [None if t is None else t.detach() for t in single[1:]]
    torch.library.opcheck(OPS.backward_fused, (y, single[0].detach(), mean, var, *point, y, 1e-3, *kind, residual))


def test_statistics_that_want_a_gradient_are_told_where_it_is_had():
    x = torch.randn(2, 3, 4, 4)
    mean = torch.zeros(3, requires_grad=True)
    y = OPS.normalize(x, mean, torch.ones(3), None, None, None, 1e-5, "", [])
    with pytest.raises(RuntimeError, match="normalize_by, through which their gradients flow"):
        y.sum().backward()


def test_a_network_in_eval_mode_equals_torchs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x):
            return self.act(self.bn(self.conv(x)) + x)

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), Block(), Block())
    x = torch.randn(4, 3, 12, 12)
    for _ in range(3):
        plain(x)
    ours, _ = leannorm.fuse(leannorm.convert(copy.deepcopy(plain), leannorm.GridSampling(1 / 8))[0])
    gradients = []
    for model in (plain, ours):
        leaf = x.clone().requires_grad_()
        y = model.eval()(leaf)
        y.square().sum().backward()
        gradients.append([y, leaf.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)
