"""The case list that every back end is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leannorm import Activation, parse_statistics

SOURCES = ("full", "ns:1/4", "bs:1/4", "fs:1/8", "fs:1/8@step", "grid:1/8", "grid:1/8@step", "fs:1/8@step+vdn:1")
SOURCES += ("0.75*grid:1/4+0.25*bs:1/2",)
METHODS = (
    "gn:2",
    "in",
    "ln",
    "renorm:3@start=1,r_end=4,d_end=3",
    "mabn:2@warmup=2,r_start=3",
    "ghost:3",
    "accumulated:2",
)
METHODS += (
    "adaptive",
    "diminishing:1",
    "diminishing:0.5",
    "l1",
    "range:4",
    "bnet:3",
    "mixture:2",
    "wageubn:8",
    "masked",
    "none",
)
ACTIVATIONS = (
    None,
    Activation("relu"),
    Activation("clamp", (-0.5, 0.75)),
    Activation("leaky_relu", (0.2,)),
    Activation("silu"),
    Activation("hardswish"),
    Activation("gelu"),
    Activation("gelu_tanh"),
)


@dataclass(frozen=True)
class Case:
    """Shape, layout and offset of an input."""

    name: str
    shape: tuple[int, ...]
    layout: str = "contiguous"  # channels_last, strided, expanded
    offset: float = 0.0  # in standard deviations

    def tensor(self, dtype: torch.dtype, seed: int = 0) -> Tensor:
        """Make the input."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64) + self.offset
        x = x.to(dtype)
        match self.layout:
            case "channels_last":
                formats = {4: torch.channels_last, 5: torch.channels_last_3d}
                return x.contiguous(memory_format=formats[x.ndim])
            case "strided":
                return torch.stack([x, x], -1)[..., 0]
            case "transposed":
                return x.transpose(0, -1).contiguous().transpose(0, -1)
        return x


CASES = (
    Case("1d", (6, 3)),
    Case("1d length", (4, 3, 10)),
    Case("2d", (4, 3, 8, 8)),
    Case("2d channels last", (4, 3, 8, 8), "channels_last"),
    Case("3d", (2, 3, 4, 5, 6)),
    Case("3d channels last", (2, 3, 4, 5, 6), "channels_last"),
    Case("odd", (3, 17, 7, 5), "channels_last"),
    Case("one channel", (5, 1, 6, 7)),
    Case("one sample", (1, 5, 9, 9), "channels_last"),
    Case("strided", (4, 3, 8, 8), "strided"),
    Case("transposed", (4, 3, 8, 8), "transposed"),
    Case("far mean", (4, 3, 8, 8), offset=1e4),
    Case("empty batch", (0, 3, 8, 8)),
    Case("empty map", (2, 3, 0, 4)),
)


def regions_of(spelling: str, shape: tuple[int, ...], by_rows: bool = False):
    """Give the regions of a small minimum, so that small cases are sampled too."""
    text = "+".join(
        term if "vdn" in term or term == "full" else term + (",minimum=4" if "@" in term else "@minimum=4")
        for term in spelling.split("+")
    )
    return parse_statistics(text).regions(shape, place=7, by_rows=by_rows)
