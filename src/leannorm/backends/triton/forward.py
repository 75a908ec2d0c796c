"""Device code of the forward pass: moments of the whole tensor or of regions, then the normalization."""

# A constexpr parameter takes a plain value.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from leannorm.backends.triton.activations import activate
from leannorm.backends.triton.indexing import (
    PLACES,
    SIZES,
    UNROLL,
    index,
    offsets,
    per_channel,
    planes,
    program,
    region_offsets,
    region_origin,
)
from leannorm.backends.triton.partials import merge_moments, over_rows


@triton.jit(do_not_specialize=[*SIZES, *PLACES])
def moments_kernel(
    x, draw, partials, channels, samples, spatial, splits_total, first_split, share, i_draw, height, width,
    start_n, span_n, count_n, step_n, start_d, span_d, count_d, step_d,
    start_h, span_h, count_h, step_h, start_w, span_w, count_w, step_w,
    WHOLE: tl.constexpr, DIMENSIONS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Leave the weighted mean and spread of the whole tensor, or of a region, for each split.

    Values are summed about a pivot, the first that a lane meets, so that |mean| >> sigma costs no accuracy.
    """
    split, splits, channels, spatial, i_c, m_c = program(channels, spatial, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
    if WHOLE:
        rows, tiles, all_tiles = planes(samples, spatial, CHANNELS_LAST, BLOCK_R)
    else:
        rows = index(count_n, WIDE) * count_d * count_h * count_w
        origin = region_origin(
            draw, i_draw, channels, spatial, height, width,
            start_n, span_n, start_d, span_d, start_h, span_h, start_w, span_w, CHANNELS_LAST, DIMENSIONS, WIDE,
        )  # fmt: skip
        tiles = tl.cdiv(rows, BLOCK_R)
        all_tiles = tiles
    count = tl.zeros([BLOCK_R], tl.float32)
    pivot = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_d = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_dd = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_tile in tl.range(split, all_tiles, splits, loop_unroll_factor=UNROLL):
        i_row = (i_tile % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        if WHOLE:
            o = offsets(i_tile // tiles, i_row, i_c, channels, spatial, CHANNELS_LAST, ALIGN)
        else:
            o = region_offsets(
                origin, i_row, i_c, channels, spatial, height, width,
                step_n, count_d, step_d, count_h, step_h, count_w, step_w, CHANNELS_LAST, DIMENSIONS, ALIGN,
            )  # fmt: skip
        m_r = i_row < rows
        m = m_r[:, None] & m_c[None, :]
        b_x = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
        pivot = tl.where((count == 0.0)[:, None], b_x, pivot)
        b_d = tl.where(m, b_x - pivot, 0.0)
        sum_d += b_d
        sum_dd += b_d * b_d
        count += tl.where(m_r, 1.0, 0.0)
    mean_d = sum_d / tl.where(count == 0.0, 1.0, count)[:, None]
    common = tl.sum(tl.where(tl.arange(0, BLOCK_R)[:, None] == 0, pivot, 0.0), 0)
    total, shift, spread = over_rows(count, pivot - common[None, :] + mean_d, sum_dd - sum_d * mean_d)
    i_split = first_split + split
    p = partials + i_split * 2 * channels + i_c
    tl.store(p, common + shift, mask=m_c)
    tl.store(p + channels, share * tl.where(spread < 0.0, 0.0, spread), mask=m_c)
    if tl.program_id(0) == 0:
        tl.store(partials + index(splits_total, WIDE) * 2 * channels + i_split, share * total)


@triton.jit(do_not_specialize=SIZES)
def normalize_kernel(
    x, residual, y, partials, mean, var, weight, bias, channels, samples, spatial, splits_total, eps, first, second,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute y = act(weight (x - mean) / sigma + bias + residual).

    With partials, mean and variance are merged from them and written; without, they are given.
    """
    split, splits, channels, spatial, i_c, m_c = program(channels, spatial, CHANNELS_LAST, ALIGN, WIDE, BLOCK_C)
    if partials is None:
        b_mean = tl.load(mean + i_c, mask=m_c, other=0.0)
        b_var = tl.load(var + i_c, mask=m_c, other=1.0)
    else:
        # Channels of unknown divisors take an address each, and so twice the registers.
        MERGED_R: tl.constexpr = BLOCK_R if CHANNELS_LAST else (BLOCK_R + 1) // 2
        b_mean, b_var = merge_moments(partials, i_c, m_c, channels, splits_total, MERGED_R, BLOCK_C)
        if tl.program_id(1) == 0:
            tl.store(mean + i_c, b_mean, mask=m_c)
            tl.store(var + i_c, b_var, mask=m_c)
    scale = per_channel(weight, i_c, m_c, 1.0) / tl.sqrt_rn(b_var + eps)
    b_bias = per_channel(bias, i_c, m_c, 0.0)
    rows, tiles, all_tiles = planes(samples, spatial, CHANNELS_LAST, BLOCK_R)
    last = split + (all_tiles - 1 - split) // splits * splits
    for i_step in range(split, all_tiles, splits):
        i_tile = last + split - i_step  # backwards: what the pass before read last is still in the cache
        i_row = (i_tile % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
        o = offsets(i_tile // tiles, i_row, i_c, channels, spatial, CHANNELS_LAST, ALIGN)
        m = (i_row < rows)[:, None] & m_c[None, :]
        b_x = tl.load(x + o, mask=m, other=0.0)
        if residual is None:
            b_shift = b_bias[None, :]
        else:
            b_shift = b_bias[None, :] + tl.load(residual + o, mask=m, other=0.0).to(tl.float32)
        z = (b_x.to(tl.float32) - b_mean[None, :]) * scale[None, :] + b_shift
        tl.store(y + o, activate(z, first, second, ACTIVATION).to(y.dtype.element_ty), mask=m)
