"""Device code that merges what the programs of a pass left, one partial result a split.

Every program of the next pass merges the partial results of its channels by itself, in a fixed order: no atomics, no
launch in between, and the same result each time.

    of moments    (splits, 2, C) mean and spread (weight times variance), then (splits,) weights
    of gradients  (splits, 2, C) sum of g xhat and sum of g
"""

# A constexpr parameter takes a plain value.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from leannorm.backends.triton.indexing import SIZES, index, size

MERGED_AT_ONCE = tl.constexpr(4)  # blocks of partial results that a program asks for before it needs the first


@triton.jit
def over_rows(weight, mean, spread):
    """Merge (R,) weights, (R, C) means and (R, C) spreads into one of each a channel: Chan et al., about a pivot."""
    total = tl.sum(weight, 0)
    pivot = tl.sum(weight[:, None] * mean, 0) / total
    b_d = mean - pivot[None, :]
    b_wd = weight[:, None] * b_d
    shift = tl.sum(b_wd, 0) / total
    return total, pivot + shift, tl.sum(spread + b_wd * b_d, 0) - total * shift * shift


@triton.jit
def merge_moments(partials, i_c, m_c, channels, splits_total, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Give mean and variance of all splits together."""
    BLOCK_P: tl.constexpr = (BLOCK_R + 3) // 4  # few registers, so that they do not limit the pass that follows
    weight = tl.zeros([BLOCK_P], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    spread = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in tl.range(0, splits_total, BLOCK_P, loop_unroll_factor=MERGED_AT_ONCE):
        i_p = first + tl.arange(0, BLOCK_P)
        m_p = i_p < splits_total
        m = m_p[:, None] & m_c[None, :]
        p = partials + i_p[:, None] * (2 * channels) + i_c[None, :]
        b_weight = tl.load(partials + 2 * splits_total * channels + i_p, mask=m_p, other=0.0)
        b_d = tl.load(p, mask=m, other=0.0) - mean
        b_spread = tl.load(p + channels, mask=m, other=0.0)
        both = weight + b_weight
        share = b_weight / tl.where(both == 0.0, 1.0, both)
        mean += b_d * share[:, None]
        spread += b_spread + b_d * b_d * (weight * share)[:, None]
        weight = both
    total, mean, spread = over_rows(weight, mean, spread)
    return mean, spread / total


@triton.jit
def merge_sums(partials, i_c, m_c, channels, splits_total, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Give the sums of g xhat and of g over all splits."""
    BLOCK_P: tl.constexpr = (BLOCK_R + 3) // 4
    sum_g_xhat = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    sum_g = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in tl.range(0, splits_total, BLOCK_P, loop_unroll_factor=MERGED_AT_ONCE):
        i_p = first + tl.arange(0, BLOCK_P)
        m = (i_p < splits_total)[:, None] & m_c[None, :]
        p = partials + i_p[:, None] * (2 * channels) + i_c[None, :]
        sum_g_xhat += tl.load(p, mask=m, other=0.0)
        sum_g += tl.load(p + channels, mask=m, other=0.0)
    return tl.sum(sum_g_xhat, 0), tl.sum(sum_g, 0)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    partials, first_output, second_output, channels, splits_total,
    MOMENTS: tl.constexpr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge partials where no pass comes next: into mean and variance, or into the sums of g xhat and of g."""
    channels = size(channels, 1, WIDE)
    i_c = index(tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), WIDE)
    m_c = i_c < channels
    if MOMENTS:
        b_first, b_second = merge_moments(partials, i_c, m_c, channels, splits_total, BLOCK_R, BLOCK_C)
    else:
        b_first, b_second = merge_sums(partials, i_c, m_c, channels, splits_total, BLOCK_R, BLOCK_C)
    tl.store(first_output + i_c, b_first, mask=m_c)
    tl.store(second_output + i_c, b_second, mask=m_c)
