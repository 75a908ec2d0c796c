"""The rules' algebra over configurations, against batch normalization itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leannorm.graph import fold
from leannorm.graph.batch_norm import scale_and_shift
from leannorm.graph.rules.conv_batch_norm import fold_convolution
from leannorm.graph.rules.linear_batch_norm import fold_linear

CONVOLUTIONS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}


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


@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolution_blocks())
def test_convolutions_of_any_configuration_fold(block):
    model, x = block
    norm = model[1]
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        if norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    model.eval()
    folded, report = fold(model, x)
    assert [change.module for change in report.changes] == ["1"]
    assert report.refusals == ()
    x = torch.cat([x, -x, x + 1])
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)


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
def test_fold_convolution_computes_in_float64_and_keeps_the_dtype(with_bias):
    weight, bias = torch.randn(6, 2, 3, 3), torch.randn(6) if with_bias else None
    scale, shift = scale_and_shift(*batch_norm_parameters(6), 1e-5)
    folded, offset = fold_convolution(weight, bias, scale, shift)
    assert folded.dtype == offset.dtype == torch.float32
    exact = weight.double() * scale[:, None, None, None]
    assert torch.equal(folded, exact.float())
    assert torch.equal(offset, (shift if bias is None else scale * bias.double() + shift).float())


@pytest.mark.parametrize("output_dim", [0, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fold_linear_is_the_composition(output_dim, with_bias):
    x, weight, bias = torch.randn(5, 4).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    norm_weight, norm_bias, mean, var = batch_norm_parameters(3)
    bias = bias if with_bias else None
    expected = F.batch_norm(F.linear(x, weight, bias), mean, var, norm_weight, norm_bias, training=False)
    stored = weight if output_dim == 0 else weight.T
    folded, offset = fold_linear(
        stored, bias, *scale_and_shift(norm_weight, norm_bias, mean, var, 1e-5), output_dim=output_dim
    )
    torch.testing.assert_close(F.linear(x, folded if output_dim == 0 else folded.T, offset), expected)


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
