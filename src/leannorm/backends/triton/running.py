"""Device code of the running statistics."""

# A constexpr parameter takes a plain value.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["channels"])
def track_kernel(
    running_mean, running_var, batches, mean, var, channels, unbiased, factor,
    BETWEEN_STEPS: tl.constexpr, GUARDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the running statistics towards ``mean`` and ``unbiased`` times ``var`` by ``factor``; count a batch."""
    i_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_c = i_c < channels
    before = tl.load(running_mean + i_c, mask=m_c, other=0.0)
    b_mean = tl.load(mean + i_c, mask=m_c, other=0.0)
    b_var = tl.load(var + i_c, mask=m_c, other=0.0) * unbiased
    if BETWEEN_STEPS:
        b_shift = b_mean - before
        b_var += (1 - factor) * (b_shift * b_shift)
    m = m_c
    if GUARDED:
        m = m_c & _is_finite(b_mean) & _is_finite(b_var)
    tl.store(running_mean + i_c, _lerp(before, b_mean, factor), mask=m)
    tl.store(running_var + i_c, _lerp(tl.load(running_var + i_c, mask=m_c, other=0.0), b_var, factor), mask=m)
    if batches is not None:
        tl.store(batches, tl.load(batches) + 1, mask=tl.program_id(0) == 0)


@triton.jit
def _lerp(start, end, factor):
    """As torch computes it: exact at both ends."""
    return tl.where(factor < 0.5, start + factor * (end - start), end - (end - start) * (1 - factor))


@triton.jit
def _is_finite(v):
    return tl.abs(v) < float("inf")
