"""The rules' algebra over configurations, against batch normalization itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leannorm.graph import fold
from leannorm.graph.algebra import embed, identity_kernel, scale_inputs, scale_outputs
from leannorm.graph.batch_norm import scale_and_shift
from leannorm.graph.rules.parallel import sum_of_kernels

CONVOLUTIONS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def batch_norm_parameters(channels, affine=True):
    weight, bias = (torch.randn(channels).double() for _ in range(2)) if affine else (None, None)
    return weight, bias, torch.randn(channels).double(), torch.rand(channels).double() + 0.1


@st.composite
def convolution_blocks(draw):
    """A convolution -> batch normalization of any configuration, and an input that fits."""
    dims = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 4]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = draw(st.one_of(st.integers(0, 2), st.just("same"), st.just("valid")))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    modes = ["zeros", "replicate", "circular"] + (["reflect"] if dims < 3 else [])
    mode = draw(st.sampled_from(modes))
    convolution, norm = CONVOLUTIONS[dims]
    size = draw(st.integers(5, 7))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    block = nn.Sequential(
        convolution(
            inputs,
            outputs,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            bias=draw(st.booleans()),
            padding_mode=mode,
        ),
        norm(outputs, eps=draw(st.sampled_from([1e-5, 1e-3, 0.1])), affine=draw(st.booleans())),
    )
    return block.double(), torch.randn(draw(st.integers(1, 3)), inputs, *[size] * dims, dtype=torch.float64)


@st.composite
def transposed_blocks(draw):
    """A transposed convolution -> batch normalization of any configuration, and an input that fits."""
    dims, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layer = TRANSPOSED[dims](
        inputs,
        outputs,
        draw(st.integers(1, 3)),
        stride,
        padding=0,
        output_padding=draw(st.integers(0, max(stride, dilation) - 1)),
        groups=groups,
        bias=draw(st.booleans()),
        dilation=dilation,
    )
    norm = CONVOLUTIONS[dims][1](outputs, eps=draw(st.sampled_from([1e-5, 1e-3])), affine=draw(st.booleans()))
    return nn.Sequential(layer, norm).double(), torch.randn(draw(st.integers(1, 3)), inputs, *[4] * dims).double()


def randomize(norm):
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.one_of(convolution_blocks(), transposed_blocks()))
def test_convolutions_of_any_configuration_fold(block):
    model, x = block
    randomize(model[1])
    model.eval()
    folded, report = fold(model, x)
    assert [change.module for change in report.changes] == ["1"]
    assert report.changes[0].action.startswith("folded into the conv")
    assert report.refusals == ()
    x = torch.cat([x, -x, x + 1])
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolution_blocks())
def test_batch_norm_before_convolutions_folds_or_is_refused_for_its_border(block):
    layer, x = block
    norm = CONVOLUTIONS[x.ndim - 2][1](x.shape[1]).double()
    randomize(norm)
    model = nn.Sequential(norm, nn.Sequential(layer[0])).eval()
    folded, report = fold(model, x)
    (change,) = report.changes
    padding = layer[0].padding
    zeros = layer[0].padding_mode == "zeros" and padding != "valid" and (padding == "same" or any(padding))
    assert change.action.startswith("replaced by" if zeros else "folded into the conv")
    assert "would get no shift" in change.action or not zeros
    x = torch.cat([x, -x, x + 1])
    torch.testing.assert_close(folded(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 2)])
def test_scale_and_shift_are_batch_normalization_in_eval_mode(affine, shape):
    weight, bias, mean, var = batch_norm_parameters(3, affine)
    x = torch.randn(shape).double()
    scale, shift = scale_and_shift(weight, bias, mean, var, 1e-3)
    expected = F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-3)
    per_channel = (1, -1, *[1] * (x.ndim - 2))
    torch.testing.assert_close(x * scale.reshape(per_channel) + shift.reshape(per_channel), expected)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_scales_of_outputs_and_inputs_are_the_composition(transposed, groups, with_bias):
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(4, 6, 3, groups=groups, bias=with_bias).double()
    x = torch.randn(2, 4, 7, 7).double()
    options = {"groups": groups, "inputs_first": transposed}

    def run(weight, bias, x):
        return (F.conv_transpose2d if transposed else F.conv2d)(x, weight, bias, groups=groups)

    scale, shift = torch.randn(6).double(), torch.randn(6).double()
    expected = scale[:, None, None] * layer(x) + shift[:, None, None]
    got = run(*scale_outputs(layer.weight, layer.bias, scale, shift, **options), x)
    torch.testing.assert_close(got, expected)

    scale, shift = torch.randn(4).double(), torch.randn(4).double()
    expected, got = (
        layer(scale[:, None, None] * x + shift[:, None, None]),
        scale_inputs(layer.weight, layer.bias, scale, shift, **options),
    )
    got = run(*got, x)
    inside = (..., slice(2, -2), slice(2, -2)) if transposed else ...  # there each output has its whole kernel
    torch.testing.assert_close(got[inside], expected[inside])


@pytest.mark.parametrize("output_dim", [0, 1])
def test_scales_of_linear_layers_are_the_composition(output_dim):
    x, weight, bias = torch.randn(5, 4).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    stored = weight if output_dim == 0 else weight.T

    def run(weight, bias, x):
        return F.linear(x, weight if output_dim == 0 else weight.T, bias)

    scale, shift = torch.randn(3).double(), torch.randn(3).double()
    got = scale_outputs(stored, bias, scale, shift, inputs_first=output_dim == 1)
    torch.testing.assert_close(run(*got, x), scale * F.linear(x, weight, bias) + shift)
    scale, shift = torch.randn(4).double(), torch.randn(4).double()
    got = scale_inputs(stored, bias, scale, shift, inputs_first=output_dim == 1)
    torch.testing.assert_close(run(*got, x), F.linear(scale * x + shift, weight, bias))


def test_scales_compute_in_float64_and_forget_nothing_of_float32():
    weight, bias, scale, shift = (torch.randn(shape) for shape in ((6, 2, 3, 3), (6,), (6,), (6,)))
    folded, offset = scale_outputs(weight, bias, scale, shift)
    assert folded.dtype == offset.dtype == torch.float64
    assert torch.equal(folded, weight.double() * scale.double()[:, None, None, None])
    assert torch.equal(offset, bias.double() * scale.double() + shift.double())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_identity_kernel_hands_every_channel_on(groups):
    x = torch.randn(2, 4, 5, 6).double()
    weight = identity_kernel(4, groups, (3, 5), (1, 2))
    assert torch.equal(F.conv2d(x, weight, padding=(1, 2), groups=groups), x)


@pytest.mark.parametrize("begin", [(0, 0), (1, 1), (2, 1)])
def test_a_kernel_laid_into_a_larger_one_reads_the_same_places(begin):
    x, small = torch.randn(2, 3, 8, 8).double(), torch.randn(4, 3, 1, 2).double()
    larger = embed(small, (3, 3), begin)
    got = F.conv2d(F.pad(x, (begin[1], 2 - begin[1], begin[0], 2 - begin[0])), larger)
    torch.testing.assert_close(got[..., : 8 - 1], F.conv2d(x, small)[..., : 8 - 1])


def test_a_sum_of_kernels_is_the_sum_of_the_convolutions():
    x, weight, other = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4, 3, 1, 1)
    bias = torch.randn(4)
    merged, offset = sum_of_kernels(weight, None, other, bias, (1, 1))
    expected = F.conv2d(x.double(), weight.double(), padding=1) + F.conv2d(x.double(), other.double(), bias.double())
    torch.testing.assert_close(F.conv2d(x.double(), merged, offset, padding=1), expected)


class Product(nn.Module):
    """A linear layer written as a matrix product whose weight is stored (in, out)."""

    def __init__(self, bias: bool):
        super().__init__()
        self.weight, self.bn = nn.Parameter(torch.randn(4, 3)), nn.BatchNorm1d(3)
        self.bias = nn.Parameter(torch.randn(3)) if bias else None

    def forward(self, x):
        return self.bn(torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_matrix_products_fold(randomized, bias, eps):
    model = randomized(Product(bias))
    model.bn.eps = eps
    x = torch.randn(5, 4)
    folded, report = fold(model, x)
    assert [change.module for change in report.changes] == ["bn"]
    torch.testing.assert_close(folded(x), model(x))
