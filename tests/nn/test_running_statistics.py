"""The native kernel that moves running statistics: what the layer's own formula gives, and only where it may."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leannorm import BatchNorm1d, FullBatch
from leannorm.backends import cpu
from leannorm.ops import eager

pytestmark = pytest.mark.skipif(not cpu.available, reason="the native kernels are not built")


@dataclasses.dataclass(frozen=True)
class BetweenSteps(FullBatch):
    between_steps: bool = True


def layer_of(momentum=0.1, *, between=False, guard=False, channels=4, dtype=torch.float32):
    source = BetweenSteps() if between else FullBatch()
    layer = BatchNorm1d(channels, momentum=momentum, statistics=source, guard_nonfinite=guard, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    layer.running_mean.normal_(generator=generator)
    layer.running_var.uniform_(0.5, 2.0, generator=generator)
    return layer


def moved(mean, var, *, native, factor=None, unbiased=1.0, **options):
    layer = layer_of(**options)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.delitem(eager._kernels, ("track", "cpu"))
        layer._track(mean, var, factor, unbiased=unbiased)
    return layer.running_mean, layer.running_var


values = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)


@given(
    mean=values,
    var=values,
    factor=st.floats(0, 1),
    unbiased=st.floats(1, 4),
    between=st.booleans(),
    guard=st.booleans(),
    broken=st.sampled_from([None, float("nan"), float("inf"), -float("inf")]),
)
def test_the_kernel_computes_the_layers_formula(mean, var, factor, unbiased, between, guard, broken):
    mean, var = torch.tensor(mean), torch.tensor(var).abs()
    if broken is not None:
        mean[1], var[2] = broken, broken
    options = {"factor": factor, "unbiased": unbiased, "between": between, "guard": guard}
    for native, plain in zip(
        moved(mean, var, native=True, **options), moved(mean, var, native=False, **options), strict=True
    ):
        largest = plain[plain.isfinite()].abs().max().clamp(min=1.0)
        torch.testing.assert_close(native, plain, rtol=1e-5, atol=1e-6 * largest, equal_nan=True)


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 0.0, 1.0, None])
def test_a_layer_moves_as_torchs(momentum):
    layer, torchs = layer_of(momentum), torch.nn.BatchNorm1d(4, momentum=momentum)
    torchs.load_state_dict(layer.state_dict())
    for seed in range(3):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
        layer(x), torchs(x)
    torch.testing.assert_close(layer.running_mean, torchs.running_mean)
    torch.testing.assert_close(layer.running_var, torchs.running_var)
    assert layer.num_batches_tracked == 3


def test_a_saved_statistic_that_moves_is_an_error_in_backward_as_in_torch():
    layer = layer_of()
    scale = torch.ones(4, requires_grad=True)
    product = scale * layer.running_mean
    layer(torch.randn(8, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("change", ["dtype", "strides", "subclass", "factor"])
def test_what_the_kernel_does_not_take_is_computed_without_it(change, monkeypatch):
    expected = layer_of(0.25)
    expected._track(torch.ones(4), torch.full((4,), 2.0))
    layer, factor = layer_of(0.25), None
    if change == "dtype":
        layer.double()
    elif change == "strides":
        layer.running_mean = torch.stack([layer.running_mean] * 2, dim=1)[:, 0]
    elif change == "subclass":
        layer.running_mean = layer.running_mean.as_subclass(type("Own", (torch.Tensor,), {}))
    else:
        factor = torch.tensor(0.25)
    monkeypatch.setattr(cpu._kernels, "track", None)  # a call is an error
    layer._track(torch.ones(4), torch.full((4,), 2.0), factor)
    torch.testing.assert_close(layer.running_mean.as_subclass(torch.Tensor).float(), expected.running_mean)
    torch.testing.assert_close(layer.running_var.float(), expected.running_var)
