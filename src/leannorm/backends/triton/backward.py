"""Device code of the backward pass: reduce, then apply (exact), or one pass and then correct (sampled)."""

# A constexpr parameter takes a plain value.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

from leannorm.backends.triton.activations import activate_backward
from leannorm.backends.triton.indexing import (
    PLACES,
    SIZES,
    index,
    offsets,
    per_channel,
    planes,
    program,
    region_offsets,
    region_origin,
)
from leannorm.backends.triton.partials import merge_sums


@triton.jit
def _rstd(var, i_c, m_c, eps, AGAIN: tl.constexpr = False):
    return 1.0 / tl.sqrt_rn(tl.load(var + i_c, mask=m_c, other=1.0, volatile=AGAIN) + eps)


@triton.jit
def _point(mean, var, weight, bias, i_c, m_c, eps):
    """Load a block of channels: mean, 1 / sigma, weight / sigma and bias."""
    b_mean = tl.load(mean + i_c, mask=m_c, other=0.0)
    rstd = _rstd(var, i_c, m_c, eps)
    return b_mean, rstd, rstd * per_channel(weight, i_c, m_c, 1.0), per_channel(bias, i_c, m_c, 0.0)


@triton.jit
def _load(dy, x, at, mean, o, m):
    """Load a tile of all that a gradient takes, before any of it is used: dy, x - mean, and y or the residual."""
    b_x = tl.load(x + o, mask=m, other=0.0)
    b_dy = tl.load(dy + o, mask=m, other=0.0)
    if at is None:
        b_at = b_dy
    else:
        b_at = tl.load(at + o, mask=m, other=0.0)
    return b_dy.to(tl.float32), b_x.to(tl.float32) - mean[None, :], b_at.to(tl.float32)


@triton.jit
def _gradient(b_dy, b_d, b_at, m, scale, bias, first, second, ACTIVATION: tl.constexpr, AT: tl.constexpr):
    """Give g = dy act'(z) of a tile, where b_d = x - mean."""
    if ACTIVATION == "":
        g = b_dy
    else:
        z = b_at
        if AT != "output":
            z = b_d * scale[None, :] + bias[None, :]
            if AT == "residual":
                z += b_at
        g = tl.where(m, activate_backward(b_dy, z, first, second, ACTIVATION), 0.0)
    return g


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    dy, x, at, mean, var, weight, bias, dx, dresidual, partials, channels, samples, spatial, eps, first, second,
    ACTIVATION: tl.constexpr, AT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Leave the sums of g xhat and of g for each split; write dx = weight g / sigma and dresidual = g where wanted."""
    split, splits, channels, spatial, i_c, m_c = program(channels, spatial, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
    b_mean, _, scale, b_bias = _point(mean, var, weight, bias, i_c, m_c, eps)
    rows, tiles, all_tiles = planes(samples, spatial, CHANNELS_LAST, BLOCK_R)
    sum_gd = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_g = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_tile in range(split, all_tiles, splits):
        i_row = (i_tile % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        o = offsets(i_tile // tiles, i_row, i_c, channels, spatial, CHANNELS_LAST, ALIGN)
        m = (i_row < rows)[:, None] & m_c[None, :]
        b_dy, b_d, b_at = _load(dy, x, at, b_mean, o, m)
        g = _gradient(b_dy, b_d, b_at, m, scale, b_bias, first, second, ACTIVATION, AT)
        sum_gd += g * b_d
        sum_g += g
        if dx is not None:
            tl.store(dx + o, (g * scale[None, :]).to(dx.dtype.element_ty), mask=m)
        if dresidual is not None:
            tl.store(dresidual + o, g.to(dresidual.dtype.element_ty), mask=m)
    rstd = _rstd(var, i_c, m_c, eps, AGAIN=True)  # here and not before the loop, which needs all registers
    p = partials + split * 2 * channels + i_c
    tl.store(p, tl.sum(sum_gd, 0) * rstd, mask=m_c)
    tl.store(p + channels, tl.sum(sum_g, 0), mask=m_c)


@triton.jit
def _sums(partials, sum_g_xhat, sum_g, i_c, m_c, channels, splits_total, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Give the sums of a block of channels: merged from partials, and then written once, or as they are given."""
    if partials is None:
        b_sum_g_xhat = tl.load(sum_g_xhat + i_c, mask=m_c, other=0.0)
        b_sum_g = tl.load(sum_g + i_c, mask=m_c, other=0.0)
    else:
        b_sum_g_xhat, b_sum_g = merge_sums(partials, i_c, m_c, channels, splits_total, BLOCK_R, BLOCK_C)
        if tl.program_id(1) == 0:
            tl.store(sum_g_xhat + i_c, b_sum_g_xhat, mask=m_c)
            tl.store(sum_g + i_c, b_sum_g, mask=m_c)
    return b_sum_g_xhat, b_sum_g


@triton.jit(do_not_specialize=SIZES)
def apply_kernel(
    dy, x, at, mean, var, weight, bias, partials, sum_g_xhat, sum_g, count, dx, dresidual,
    channels, samples, spatial, splits_total, eps, first, second,
    ACTIVATION: tl.constexpr, AT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Exact statistics: dx = weight / sigma (g - (sum_g + xhat sum_g_xhat) / count), and dresidual = g where wanted."""
    split, splits, channels, spatial, i_c, m_c = program(channels, spatial, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
    b_sum_g_xhat, b_sum_g = _sums(partials, sum_g_xhat, sum_g, i_c, m_c, channels, splits_total, BLOCK_R, BLOCK_C)
    b_mean, rstd, scale, b_bias = _point(mean, var, weight, bias, i_c, m_c, eps)
    if count is None:
        inverse = 1.0 / (samples * spatial).to(tl.float32)
    else:
        inverse = 1.0 / tl.load(count).to(tl.float32)
    constant, slope = b_sum_g * inverse, b_sum_g_xhat * inverse * rstd
    rows, tiles, all_tiles = planes(samples, spatial, CHANNELS_LAST, BLOCK_R)
    last = split + (all_tiles - 1 - split) // splits * splits
    for i_step in range(split, all_tiles, splits):
        i_tile = last + split - i_step
        i_row = (i_tile % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        o = offsets(i_tile // tiles, i_row, i_c, channels, spatial, CHANNELS_LAST, ALIGN)
        m = (i_row < rows)[:, None] & m_c[None, :]
        b_dy, b_d, b_at = _load(dy, x, at, b_mean, o, m)
        g = _gradient(b_dy, b_d, b_at, m, scale, b_bias, first, second, ACTIVATION, AT)
        b_dx = scale[None, :] * (g - constant[None, :] - b_d * slope[None, :])
        tl.store(dx + o, b_dx.to(dx.dtype.element_ty), mask=m)
        if dresidual is not None:
            tl.store(dresidual + o, g.to(dresidual.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=[*SIZES, *PLACES])
def correct_kernel(
    dx, x, mean, var, weight, partials, sum_g_xhat, sum_g, draw, channels, samples, spatial, splits_total, eps, share,
    i_draw, height, width,
    start_n, span_n, count_n, step_n, start_d, span_d, count_d, step_d,
    start_h, span_h, count_h, step_h, start_w, span_w, count_w, step_w,
    DIMENSIONS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Subtract weight / sigma share (sum_g + xhat sum_g_xhat) from the elements of a region of dx, in place."""
    split, splits, channels, spatial, i_c, m_c = program(channels, spatial, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
    b_mean, rstd, scale, _ = _point(mean, var, weight, None, i_c, m_c, eps)
    b_sum_g_xhat, b_sum_g = _sums(partials, sum_g_xhat, sum_g, i_c, m_c, channels, splits_total, BLOCK_R, BLOCK_C)
    constant, slope = share * scale * b_sum_g, share * scale * b_sum_g_xhat * rstd
    rows = index(count_n, WIDE) * count_d * count_h * count_w
    origin = region_origin(
        draw, i_draw, channels, spatial, height, width,
        start_n, span_n, start_d, span_d, start_h, span_h, start_w, span_w, CHANNELS_LAST, DIMENSIONS, WIDE,
    )  # fmt: skip
    for i_tile in range(split, tl.cdiv(rows, BLOCK_R), splits):
        i_row = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
        o = region_offsets(
            origin, i_row, i_c, channels, spatial, height, width,
            step_n, count_d, step_d, count_h, step_h, count_w, step_w, CHANNELS_LAST, DIMENSIONS, ALIGN,
        )  # fmt: skip
        m = (i_row < rows)[:, None] & m_c[None, :]
        b_x = tl.load(x + o, mask=m, other=0.0)
        b_dx = tl.load(dx + o, mask=m, other=0.0)
        b_d = b_x.to(tl.float32) - b_mean[None, :]
        b_dx = b_dx.to(tl.float32) - (constant[None, :] + b_d * slope[None, :])
        tl.store(dx + o, b_dx.to(dx.dtype.element_ty), mask=m)
