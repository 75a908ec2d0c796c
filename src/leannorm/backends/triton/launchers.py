"""Host code of the Triton kernels: each function computes the operator of its name. Legend: `leannorm.ops.contract`.

Nothing here waits for the device or reads what is on it, and nothing is kept between calls, so that CUDA graphs can be
captured and replayed. The functions do not ask which device it is; which inputs they take, `why_not` says.
"""

# A kernel has a call of its own, kernel[grid](...), and a constexpr parameter takes a plain value.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from leannorm.backends.memory import are_plain_statistics, in_order_of, is_channels_last
from leannorm.backends.triton import geometry
from leannorm.backends.triton.backward import apply_kernel, correct_kernel, gradient_kernel
from leannorm.backends.triton.forward import moments_kernel, normalize_kernel
from leannorm.backends.triton.geometry import Region, Tiles
from leannorm.backends.triton.partials import finish_kernel
from leannorm.backends.triton.running import track_kernel

_WHOLE = (0, 1, 1, *(0, 1, 1, 1) * 4)  # a place that is not read
_TRACKED = 256  # channels of a program
_MASKS = ("relu", "clamp")  # g is dy or 0, so that it can be stored in any dtype without rounding


def batch_norm(x, weight, bias, residual, draw, boxes, weights, eps, activation, parameters):
    """Two launches: moments; then y, for which each program merges the moments of its channels."""
    x, tiles = _prepared(x)
    y = torch.empty_like(x)
    mean = _per_channel(x)
    var = torch.empty_like(mean)
    partials, splits = _partial_moments(x, mean, tiles, draw, boxes, weights)
    _normalize(x, y, tiles, partials, splits, mean, var, weight, bias, residual, eps, activation, parameters)
    return y, mean, var


def moments(x, draw, boxes, weights):
    """Two launches: moments of the splits, and of all."""
    x, tiles = _prepared(x)
    mean = _per_channel(x)
    var = torch.empty_like(mean)
    partials, splits = _partial_moments(x, mean, tiles, draw, boxes, weights)
    _finish(partials, splits, mean, var, tiles, moments=True)
    return mean, var


def normalize(x, mean, var, weight, bias, residual, eps, activation, parameters):
    """One launch."""
    x, tiles = _prepared(x)
    y = torch.empty_like(x)
    mean, var = mean.contiguous(), var.contiguous()
    _normalize(x, y, tiles, None, 0, mean, var, weight, bias, residual, eps, activation, parameters)
    return y


def batch_norm_backward(
    dy,
    x,
    mean,
    var,
    weight,
    bias,
    residual,
    y,
    eps,
    activation,
    parameters,
    draw,
    boxes,
    weights,
    residual_gradient,
):
    """Sampled: dx and the sums in one launch, then one a region that corrects it. Exact: sums, then dx."""
    point = _Point(x, mean, var, weight, bias, residual, y, eps, activation, parameters)
    sums = torch.empty_like(point.mean), torch.empty_like(point.mean)
    dx = torch.empty_like(point.x)
    dresidual = torch.empty_like(point.x) if residual_gradient else None
    dy = in_order_of(dx, dy)
    if boxes:
        partials = point.reduce(dy, dx, dresidual)
        _correct(dx, point, partials, sums, draw, boxes, weights)
    elif dresidual is not None and activation in _MASKS:
        partials = point.reduce(dy, None, dresidual)  # g is written first, since it takes one read where dy takes two
        point.apply(dresidual, partials, sums, None, dx, None, activation="")
    else:
        partials = point.reduce(dy, None, None)
        point.apply(dy, partials, sums, None, dx, dresidual)
    return dx, *sums, _or_empty(x, dresidual)


def backward_reduce(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters):
    """Two launches: sums of the splits, and of all."""
    point = _Point(x, mean, var, weight, bias, residual, y, eps, activation, parameters)
    return point.finished(point.reduce(in_order_of(point.x, dy), None, None))


def backward_fused(dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, residual_gradient):
    """Two launches: dx with the sums of the splits, and the sums of all."""
    point = _Point(x, mean, var, weight, bias, residual, y, eps, activation, parameters)
    dx = torch.empty_like(point.x)
    dresidual = torch.empty_like(point.x) if residual_gradient else None
    partials = point.reduce(in_order_of(dx, dy), dx, dresidual)
    return dx, *point.finished(partials), _or_empty(x, dresidual)


def backward_apply(
    dy, x, mean, var, weight, bias, residual, y, eps, activation, parameters, sum_g_xhat, sum_g, count, wanted
):
    """One launch; ``count`` is read on the device."""
    point = _Point(x, mean, var, weight, bias, residual, y, eps, activation, parameters)
    dx = torch.empty_like(point.x)
    dresidual = torch.empty_like(point.x) if wanted else None
    sums = sum_g_xhat.contiguous(), sum_g.contiguous()
    point.apply(in_order_of(dx, dy), None, sums, count, dx, dresidual)
    return dx, _or_empty(x, dresidual)


def correct(dx, x, mean, var, weight, sum_g_xhat, sum_g, eps, draw, boxes, weights):
    """One launch a region on a copy of dx, one after the other, so that what overlaps adds up."""
    point = _Point(x, mean, var, weight, None, None, None, eps, "", ())
    corrected = torch.empty_like(point.x).copy_(dx)
    sums = sum_g_xhat.contiguous(), sum_g.contiguous()
    _correct(corrected, point, None, sums, draw, boxes, weights)
    return corrected


def track(running_mean, running_var, batches, mean, var, unbiased, factor, between_steps, guarded) -> bool:
    """One launch that moves running statistics and counts a batch; False, and nothing done, where it cannot."""
    on = mean.device
    if not are_plain_statistics((mean, var, running_mean, running_var), batches, lambda t: t.device == on):
        return False
    channels = mean.numel()
    track_kernel[(triton.cdiv(channels, _TRACKED),)](
        running_mean, running_var, batches, mean, var, channels, float(unbiased), float(factor),
        BETWEEN_STEPS=between_steps, GUARDED=guarded, BLOCK=_TRACKED, num_warps=4,
    )  # fmt: skip
    increment_version([t for t in (running_mean, running_var, batches) if t is not None])
    return True


class _Point:
    """Where the gradient is taken: x with its cut, its statistics, and what tells act'."""

    def __init__(self, x, mean, var, weight, bias, residual, y, eps, activation, parameters):
        self.x, self.tiles = _prepared(x)
        self.mean, self.var = mean.contiguous(), var.contiguous()
        self.weight, self.bias = _contiguous(weight), _contiguous(bias)
        self.eps, self.activation, self.parameters = eps, activation, _pair(parameters)
        at, self.kind = (y, "output") if y is not None else (residual, "residual" if residual is not None else "")
        self.at = None if at is None or not activation else in_order_of(self.x, at)

    def reduce(self, dy: Tensor, dx: Tensor | None, dresidual: Tensor | None) -> Tensor:
        """Sum; write dx and dresidual where they are given."""
        tiles = self.tiles
        partials = self.mean.new_empty(tiles.splits * 2 * tiles.sizes[0])
        gradient_kernel[tiles.grid](
            dy, self.x, self.at, self.mean, self.var, self.weight, self.bias, dx, dresidual, partials, *tiles.sizes,
            self.eps, *self.parameters, ACTIVATION=self.activation, AT=self.kind, **tiles.options,
        )  # fmt: skip
        return partials

    def apply(self, dy, partials, sums, count, dx, dresidual, activation: str | None = None) -> None:
        """Write dx with exact statistics, and dresidual where it is given."""
        tiles = self.tiles
        activation = self.activation if activation is None else activation
        apply_kernel[tiles.grid](
            dy, self.x, self.at if activation else None, self.mean, self.var, self.weight, self.bias, partials, *sums,
            count, dx, dresidual, *tiles.sizes, tiles.splits, self.eps, *self.parameters,
            ACTIVATION=activation, AT=self.kind, **tiles.options,
        )  # fmt: skip

    def finished(self, partials: Tensor) -> tuple[Tensor, Tensor]:
        """Merge partial sums."""
        sums = torch.empty_like(self.mean), torch.empty_like(self.mean)
        _finish(partials, self.tiles.splits, *sums, self.tiles, moments=False)
        return sums


def _partial_moments(
    x: Tensor, mean: Tensor, tiles: Tiles, draw: Tensor | None, boxes: Sequence[int], weights: Sequence[float]
) -> tuple[Tensor, int]:
    """Give the partial moments, of mean's dtype, and how many splits they have."""
    channels = tiles.sizes[0]
    if not boxes:
        splits = tiles.splits
        partials = mean.new_empty((2 * channels + 1) * splits)
        share = 1.0 / (tiles.sizes[1] * tiles.sizes[2])
        moments_kernel[tiles.grid](
            x, None, partials, *tiles.sizes, splits, 0, share, *_WHOLE, WHOLE=True, DIMENSIONS=1, **tiles.options
        )
        return partials, splits
    regions = _regions(x, tiles, boxes, weights)
    splits = regions[-1].first_split + regions[-1].grid[1]
    partials = mean.new_empty((2 * channels + 1) * splits)
    for region in regions:
        moments_kernel[region.grid](
            x, draw, partials, *tiles.sizes, splits, region.first_split, region.share, *region.place,
            WHOLE=False, **region.options,
        )  # fmt: skip
    return partials, splits


def _normalize(x, y, tiles, partials, splits, mean, var, weight, bias, residual, eps, activation, parameters) -> None:
    residual = None if residual is None else in_order_of(y, residual)
    normalize_kernel[tiles.pointwise_grid](
        x, residual, y, partials, mean, var, _contiguous(weight), _contiguous(bias), *tiles.sizes, splits, eps,
        *_pair(parameters), ACTIVATION=activation, **tiles.pointwise_options,
    )  # fmt: skip


def _correct(dx, point: _Point, partials, sums, draw, boxes, weights) -> None:
    for region in _regions(point.x, point.tiles, boxes, weights):
        correct_kernel[region.grid](
            dx, point.x, point.mean, point.var, point.weight, partials, *sums, draw, *point.tiles.sizes,
            point.tiles.splits, point.eps, region.share, *region.place, **region.options,
        )  # fmt: skip
        partials = None  # merged by the first


def _finish(partials, splits: int, first: Tensor, second: Tensor, tiles: Tiles, *, moments: bool) -> None:
    options = {name: value for name, value in tiles.options.items() if name not in ("CHANNELS_LAST", "ALIGN")}
    finish_kernel[tiles.grid[:1]](partials, first, second, tiles.sizes[0], splits, MOMENTS=moments, **options)


def _prepared(x: Tensor) -> tuple[Tensor, Tiles]:
    """Give x as a dense tensor, and its cut."""
    channels_last = is_channels_last(x)
    if channels_last is None:
        x = torch.empty_like(x).copy_(x)
        channels_last = is_channels_last(x)
    return x, geometry.tiles(x.shape, bool(channels_last), x.device)


def _regions(x: Tensor, tiles: Tiles, boxes: Sequence[int], weights: Sequence[float]) -> tuple[Region, ...]:
    channels_last = bool(tiles.options["CHANNELS_LAST"])
    return geometry.regions(x.shape, channels_last, x.device, tuple(boxes), tuple(weights))


def _per_channel(x: Tensor) -> Tensor:
    return torch.empty(x.shape[1], dtype=torch.float32, device=x.device)


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _pair(parameters: Sequence[float]) -> tuple[float, float]:
    first, second = (*parameters, 0.0, 0.0)[:2]
    return first, second


def _or_empty(x: Tensor, dresidual: Tensor | None) -> Tensor:
    return x.new_empty(0) if dresidual is None else dresidual
