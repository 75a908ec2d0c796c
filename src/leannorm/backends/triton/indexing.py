"""Device code that tells which elements a tile holds.

A tensor (N, C, *spatial) is read as rows of channels, in tiles (BLOCK_R, BLOCK_C). Channels-last memory is one plane of
N * spatial rows, contiguous memory N planes of `spatial` rows.

Variables of all kernels
    i_ index   o_ offset of elements   m_ mask   b_ block of values
    box        start, span, count, step for N, depth, height, width; see `leannorm.statistics`
    ALIGN      a power of two that divides C (channels-last) or the plane (contiguous), for wide loads
    WIDE       whether indices need 64 bits
"""

# A constexpr parameter takes a plain value.
# pyright: reportArgumentType=false, reportOperatorIssue=false

import triton
import triton.language as tl

# Sizes and places change from call to call; a kernel compiled for one value would be compiled again for the next.
SIZES = ["channels", "samples", "spatial", "splits_total"]
PLACES = ["i_draw", "first_split", "height", "width"]
PLACES += [f"{name}_{d}" for d in "ndhw" for name in ("start", "span", "count", "step")]


UNROLL = tl.constexpr(2)  # tiles of which a program asks for the values before it uses the first


@triton.jit
def index(i, WIDE: tl.constexpr):
    """Give an index in 64 bits, or in 32 where they suffice."""
    return i.to(tl.int64) if WIDE else i.to(tl.int32)


@triton.jit
def size(n, DIVISOR: tl.constexpr, WIDE: tl.constexpr):
    """Give n, and tell the compiler that DIVISOR divides it."""
    return n.to(tl.int64 if WIDE else tl.int32) // DIVISOR * DIVISOR


@triton.jit
def program(
    channels, spatial, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Give what every program asks first: its split, the splits, the sizes, its channels and which of them are there.

    Program (j, i) has the j-th block of channels and every splits-th tile from the i-th on, so that few channels fill
    the device too.
    """
    channels = size(channels, ALIGN if CHANNELS_LAST else 1, WIDE)
    spatial = size(spatial, 1 if CHANNELS_LAST else ALIGN, WIDE)
    i_c = index(tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), WIDE)
    return index(tl.program_id(1), WIDE), tl.num_programs(1), channels, spatial, i_c, i_c < channels


@triton.jit
def per_channel(v, i_c, m_c, DEFAULT: tl.constexpr):
    """Load a block of a (C,) tensor, or of the value that stands for None."""
    if v is None:
        b_v = tl.where(m_c, DEFAULT, DEFAULT)
    else:
        b_v = tl.load(v + i_c, mask=m_c, other=DEFAULT).to(tl.float32)
    return b_v


@triton.jit
def planes(samples, spatial, CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr):
    """Give the rows of a plane, its tiles, and the tiles of all planes."""
    if CHANNELS_LAST:
        rows = samples * spatial
        tiles = tl.cdiv(rows, BLOCK_R)
        all_tiles = tiles
    else:
        rows = spatial
        tiles = tl.cdiv(rows, BLOCK_R)
        all_tiles = tiles * samples
    return rows, tiles, all_tiles


@triton.jit
def offsets(i_plane, i_row, i_c, channels, spatial, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """Give the (R, C) offsets of rows of the whole tensor."""
    if CHANNELS_LAST:
        o = tl.multiple_of(i_row * channels, ALIGN)[:, None] + i_c[None, :]
    else:
        o = (i_plane * channels * spatial + i_row)[:, None] + (i_c * spatial)[None, :]
    return o


@triton.jit
def _start(draw, i, start, span, WIDE: tl.constexpr):
    if draw is None:
        place = index(start, WIDE)
    else:
        place = index(start, WIDE) + index(tl.load(draw + i) % span, WIDE)
    return place


@triton.jit
def region_origin(
    draw, i_draw, channels, spatial, height, width,
    start_n, span_n, start_d, span_d, start_h, span_h, start_w, span_w,
    CHANNELS_LAST: tl.constexpr, DIMENSIONS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Give the offset of a region's first element; the draws are read here, and here alone."""
    origin = _start(draw, i_draw, start_n, span_n, WIDE) * spatial
    if not CHANNELS_LAST:
        origin *= channels
    o_row = tl.zeros_like(origin)
    if DIMENSIONS > 1:
        o_row += _start(draw, i_draw + DIMENSIONS - 1, start_w, span_w, WIDE)
    if DIMENSIONS > 2:
        o_row += _start(draw, i_draw + DIMENSIONS - 2, start_h, span_h, WIDE) * width
    if DIMENSIONS > 3:
        o_row += _start(draw, i_draw + 1, start_d, span_d, WIDE) * (height * width)
    origin += o_row
    if CHANNELS_LAST:
        origin *= channels
    return origin


@triton.jit
def region_offsets(
    origin, i_row, i_c, channels, spatial, height, width, step_n, count_d, step_d, count_h, step_h, count_w, step_w,
    CHANNELS_LAST: tl.constexpr, DIMENSIONS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Give the (R, C) offsets of the elements of a region, counted along the width first."""
    o_row = tl.zeros_like(i_row)
    if DIMENSIONS > 1:
        o_row += i_row % count_w * step_w
        i_row = i_row // count_w
    if DIMENSIONS > 2:
        o_row += i_row % count_h * step_h * width
        i_row = i_row // count_h
    if DIMENSIONS > 3:
        o_row += i_row % count_d * step_d * (height * width)
        i_row = i_row // count_d
    if CHANNELS_LAST:
        o_row = (i_row * step_n * spatial + o_row) * channels
        o = tl.multiple_of(origin + o_row, ALIGN)[:, None] + i_c[None, :]
    else:
        o = (origin + i_row * step_n * channels * spatial + o_row)[:, None] + (i_c * spatial)[None, :]
    return o
