"""Host code that cuts tensors into tiles and programs; every answer is cached, since layers ask in each step."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

TILE = 4096  # elements that a program has in flight
CHANNELS = 64  # at most in a tile: 128 bytes of a row are enough for whole memory transactions
PLANE = 256  # rows at most in a tile of a contiguous plane
SUMMING, POINTWISE = 16, 8  # warps of a program
THREADS = 1024  # for each multiprocessor, with
REGISTERS = 64  # each: all of the register file; more threads have more loads under way
HELD, HELD_ALONE = 8, 4  # elements of a thread, if neighbours share an address and if each has one of its own
WIDE = 2**30  # elements; from here on an index with what is added to it may not fit 32 bits


class Tiles(NamedTuple):
    """How a tensor is cut: (channels, samples, spatial), grids (channel blocks, splits) and compile-time values."""

    sizes: tuple[int, int, int]
    grid: tuple[int, int]
    options: dict[str, int | bool]
    pointwise_grid: tuple[int, int]
    pointwise_options: dict[str, int | bool]

    @property
    def splits(self) -> int:
        """Programs that sum over a block of channels."""
        return self.grid[1]


class Region(NamedTuple):
    """How a region is cut; ``place`` are the kernels' arguments from ``i_draw`` on, ``share`` an element's weight."""

    grid: tuple[int, int]
    first_split: int
    share: float
    place: tuple[int, ...]
    options: dict[str, int | bool]


@lru_cache(maxsize=4096)
def tiles(shape: torch.Size, channels_last: bool, device: torch.device) -> Tiles:
    """Cut a whole tensor."""
    samples, channels, *spatial = shape
    plane = math.prod(spatial)
    alone = not channels_last and plane % 4 != 0
    if channels_last:
        rows = samples * plane
        block_c = min(CHANNELS, _power(channels))
        block_r = min(TILE // block_c, _power(rows))
        count = _ceil(rows, block_r)
    else:
        block_r = _block_of_plane(plane)
        block_c = min((TILE // 2 if alone else TILE) // block_r, _power(channels))
        count = samples * _ceil(plane, block_r)
    grid, pointwise_grid = (_grid(channels, block_c, count, warps, device) for warps in (SUMMING, POINTWISE))
    options = _options(shape, channels_last, block_r, block_c, alone=alone)
    pointwise_options = options | {"num_warps": min(options["num_warps"], POINTWISE)}
    return Tiles((channels, samples, plane), grid, options, pointwise_grid, pointwise_options)


@lru_cache(maxsize=4096)
def regions(
    shape: torch.Size, channels_last: bool, device: torch.device, boxes: tuple[int, ...], weights: tuple[float, ...]
) -> tuple[Region, ...]:
    """Cut the regions of a tensor, one after the other."""
    return tuple(_regions(shape, channels_last, device, boxes, weights))


def _regions(
    shape: torch.Size, channels_last: bool, device: torch.device, boxes: tuple[int, ...], weights: tuple[float, ...]
) -> Iterator[Region]:
    channels, dimensions = shape[1], len(shape) - 1
    height, width = (*(1, 1), *shape[2:])[-2:]
    first_split = 0
    for r, weight in enumerate(weights):
        box = boxes[4 * dimensions * r : 4 * dimensions * (r + 1)]
        rows = math.prod(box[2::4])
        block_c = min(CHANNELS, _power(channels)) if channels_last else 1
        block_r = min(TILE // block_c, _power(rows), 1024)
        grid = _grid(channels, block_c, _ceil(rows, block_r), SUMMING, device)
        padded = (*box[:4], *(0, 1, 1, 1) * (4 - dimensions), *box[4:])
        options = _options(shape, channels_last, block_r, block_c, alone=not channels_last) | {"DIMENSIONS": dimensions}
        yield Region(grid, first_split, weight / rows, (r * dimensions, height, width, *padded), options)
        first_split += grid[1]


def _options(
    shape: torch.Size, channels_last: bool, block_r: int, block_c: int, *, alone: bool
) -> dict[str, int | bool]:
    contiguous = shape[1] if channels_last else math.prod(shape[2:])
    return {
        "CHANNELS_LAST": channels_last,
        "ALIGN": math.gcd(contiguous, 16),
        "WIDE": math.prod(shape) >= WIDE,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "num_warps": min(SUMMING, max(4, block_r * block_c // (32 * (HELD_ALONE if alone else HELD)))),
        "maxnreg": REGISTERS,
        "enable_fp_fusion": True,
    }


def _grid(channels: int, block_c: int, count: int, warps: int, device: torch.device) -> tuple[int, int]:
    blocks, programs = _ceil(channels, block_c), THREADS // (32 * warps) * _multiprocessors(device)
    return blocks, min(count, _ceil(programs, blocks))


def _block_of_plane(plane: int) -> int:
    """Give the block of which whole ones cover a plane with the fewest elements to spare, the largest such."""
    sizes = [2**k for k in range(5, PLANE.bit_length())]
    return min(_power(plane), min(sizes, key=lambda size: (_ceil(plane, size) * size, -size)))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power(n: int) -> int:
    """Give the least power of two that is no smaller."""
    return 1 << (n - 1).bit_length()
