"""The signs that the native kernels keep in place of the output of BN + add + activation."""

import pytest
import torch
from test_cpu import HALVES, NATIVE_CASES, problem
from torch.autograd.graph import saved_tensors_hooks

import leannorm
from cases import SOURCES
from leannorm.activation import as_activation
from leannorm.backends import cpu
from leannorm.functional import batch_norm
from leannorm.ops import definition

pytestmark = pytest.mark.skipif(not cpu.available, reason="the extension was not built")

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ACTIVATIONS = [as_activation(name) for name in ("relu", "relu6", "leaky_relu")]


def forward_and_backward(inputs, activation, *, with_signs):
    x, weight, bias, extra, dy, regions, draw = inputs
    point = 1e-5, activation.kind, list(activation.parameters)
    places = draw, list(regions.boxes), list(regions.weights)
    y, mean, var, *signs = cpu._batch_norm(x, weight, bias, extra, *places, *point, with_signs=with_signs)
    told_by = signs[0] if signs else y
    gradients = cpu._batch_norm_backward(dy, x, mean, var, weight, bias, None, told_by, *point, *places, True)
    return signs, (y, mean, var, *gradients)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda case: case.name)
def test_gradients_by_signs_are_those_by_the_output(instruction_set, case, dtype, activation):
    if case.name == "transposed":
        pytest.skip("the kernels do not take this memory order")
    for source in SOURCES:
        if "vdn" in source and case.shape[0] < 2:
            continue
        inputs = problem(case, dtype, source, residual=True)
        signs, found = forward_and_backward(inputs, activation, with_signs=True)
        _, expected = forward_and_backward(inputs, activation, with_signs=False)
        x = inputs[0]
        stretch = x.shape[1] if cpu.is_channels_last(torch.empty_like(x)) else x[0, 0].numel()
        assert bool(signs) == (stretch % 8 == 0)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def layer_and_inputs(activation="relu", layout="channels_last", spatial=8):
    torch.manual_seed(0)
    layer = leannorm.BatchNorm2d(16, activation=activation)
    x, residual, dy = (torch.randn(4, 16, spatial, spatial).to(memory_format=LAYOUTS[layout]) for _ in range(3))
    return layer, x.requires_grad_(), residual.requires_grad_(), dy


@pytest.mark.parametrize(("spatial", "kept"), [(8, torch.uint8), (7, torch.float32)], ids=["whole bytes", "ragged"])
def test_a_layer_keeps_one_bit_an_element(spatial, kept):
    layer, x, residual, _ = layer_and_inputs(layout="contiguous", spatial=spatial)
    dtypes = []
    with saved_tensors_hooks(lambda t: (dtypes.append((t.dtype, t.numel())), t)[1], lambda t: t):
        layer(x, residual)
    large = [entry for entry in dtypes if entry[1] >= x.numel() // 8]
    assert len(large) == 2
    assert large[1][0] == kept


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_hook_that_changes_the_memory_order_changes_no_gradient(activation):
    layer, x, residual, dy = layer_and_inputs(activation)
    inputs = [x, residual, *layer.parameters()]
    expected = torch.autograd.grad(layer(x, residual), inputs, dy)
    with saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
        y = layer(x, residual)
    for found, wanted in zip(torch.autograd.grad(y, inputs, dy), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_has_the_gradient_of_the_definition(activation, layout):
    layer, x, residual, dy = layer_and_inputs(activation, layout)

    def second(y):
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, layer.weight])

    found = second(layer(x, residual))
    z = torch.nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True) + residual
    expected = second(definition.activate(z, activation.kind, activation.parameters))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_the_default_device_is_not_the_inputs(residual):
    layer, x, extra, dy = layer_and_inputs()
    extra = extra if residual else None
    expected = layer(x, extra)
    with torch.device("meta"):
        found = layer(x, extra)
        gradients = torch.autograd.grad(found, [x, *layer.parameters()], dy)
        with saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t):
            reordered = layer(x, extra)
        others = torch.autograd.grad(reordered, [x, *layer.parameters()], dy)
    assert torch.equal(found, expected)
    for a, b in zip(gradients, others, strict=True):
        assert a.device == x.device
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nan_passes_as_in_torch():
    _, x, residual, _ = layer_and_inputs()
    with torch.no_grad():
        residual[0, 0, 0, 0] = float("nan")
    y, _, _ = batch_norm(x, None, None, residual=residual, activation="relu")
    (found,) = torch.autograd.grad(y.nan_to_num().sum() + y[0, 0, 0, 0], residual)
    z = (torch.nn.functional.batch_norm(x, None, None, training=True) + residual).relu()
    (expected,) = torch.autograd.grad(z.nan_to_num().sum() + z[0, 0, 0, 0], residual)
    assert torch.equal(found, expected)
