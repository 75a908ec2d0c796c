"""The case list of convolutions that are computed together with the batch norm after them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cases import regions_of
from leannorm import Activation
from leannorm.ops import definition
from leannorm.ops.conv_batch_norm import convolution, output_shape

SOURCES = ("ns:1/4", "bs:1/4", "fs:1/8", "fs:1/8@step", "grid:1/8", "grid:1/8@step", "fs:1/8@step+vdn:1")
SOURCES += ("0.75*grid:1/4+0.25*bs:1/2",)
PIECEWISE = (None, Activation("relu"), Activation("clamp", (-0.5, 0.75)), Activation("leaky_relu", (0.2,)))
SMOOTH = (Activation("silu"), Activation("hardswish"), Activation("gelu"), Activation("gelu_tanh"))


@dataclass(frozen=True)
class ConvCase:
    """A convolution, or a linear layer where the input has no spatial dimension."""

    name: str
    shape: tuple[int, ...]
    out: int = 6
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    layout: str = "contiguous"
    offset: float = 0.0  # of the input, in its standard deviations

    @property
    def settings(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation, groups."""
        d = len(self.shape) - 2
        return [self.stride] * d, [self.padding] * d, [self.dilation] * d, self.groups

    @property
    def filters(self) -> tuple[int, ...]:
        """The weight's shape."""
        return (self.out, self.shape[1] // self.groups, *(self.kernel,) * (len(self.shape) - 2))

    @property
    def output(self) -> tuple[int, ...]:
        """The output's shape."""
        return output_shape(self.shape, self.filters, *self.settings[:3])


CONV_CASES = (
    ConvCase("1x1", (4, 4, 7, 6), kernel=1, padding=0),
    ConvCase("1x1 stride 2", (4, 4, 9, 8), kernel=1, stride=2, padding=0),
    ConvCase("1x1 channels last", (4, 5, 7, 6), kernel=1, padding=0, layout="channels_last"),
    ConvCase("1x1 stride 2 odd", (3, 17, 9, 11), out=35, kernel=1, stride=2, padding=0, layout="channels_last"),
    ConvCase("1x1 far mean", (4, 16, 8, 8), out=24, kernel=1, padding=0, layout="channels_last", offset=100.0),
    ConvCase("1x1 very far mean", (4, 16, 8, 8), out=24, kernel=1, padding=0, layout="channels_last", offset=1e4),
    ConvCase("1x1 padded", (4, 4, 5, 6), kernel=1, padding=2),
    ConvCase("1x1 padded by more than it is", (4, 4, 1, 1), kernel=1, padding=2),
    ConvCase("3x3", (4, 4, 8, 8)),
    ConvCase("3x3 channels last", (4, 4, 8, 8), layout="channels_last"),
    ConvCase("3x3 stride 2 odd", (3, 4, 9, 11), stride=2, layout="channels_last"),
    ConvCase("3x3 without padding", (4, 4, 8, 8), padding=0),
    ConvCase("even kernel", (4, 4, 8, 8), kernel=4, stride=2),
    ConvCase("dilated", (4, 4, 9, 9), padding=2, dilation=2),
    ConvCase("wide padding", (4, 4, 4, 4), padding=4),
    ConvCase("grouped", (4, 6, 8, 8), groups=3, layout="channels_last"),
    ConvCase("depth-wise", (4, 6, 8, 8), groups=6, layout="channels_last"),
    ConvCase("depth-wise stride 2 odd", (3, 17, 9, 11), out=17, stride=2, groups=17, layout="channels_last"),
    ConvCase(
        "depth-wise 5x5 dilated",
        (2, 5, 11, 9),
        out=5,
        kernel=5,
        padding=3,
        dilation=2,
        groups=5,
        layout="channels_last",
    ),
    ConvCase("depth-wise far mean", (4, 6, 8, 8), padding=0, groups=6, layout="channels_last", offset=100.0),
    ConvCase("depth-wise very far mean", (4, 6, 8, 8), padding=0, groups=6, layout="channels_last", offset=1e4),
    ConvCase("depth-wise, twice the channels", (4, 3, 8, 8), groups=3),
    ConvCase("stem", (2, 3, 16, 16), kernel=7, stride=2, padding=3),
    ConvCase("one sample", (1, 4, 9, 9)),
    ConvCase("strided memory", (4, 4, 8, 8), layout="strided"),
    ConvCase("part of memory", (4, 4, 8, 8), stride=2, layout="channels of a channels last tensor"),
    ConvCase("1d", (4, 4, 13), stride=2),
    ConvCase("3d", (2, 4, 5, 6, 5)),
    ConvCase("3d channels last", (2, 4, 5, 6, 5), stride=2, layout="channels_last"),
    ConvCase("linear", (24, 5)),
    ConvCase("far mean", (4, 4, 8, 8), padding=0, offset=100.0),
    ConvCase("very far mean", (4, 4, 8, 8), padding=0, offset=1e4),
)


@dataclass(frozen=True)
class Setup:
    """A case's tensors: (x, weight, conv_bias, gamma, beta, residual), and what the operator takes besides."""

    tensors: tuple[Tensor | None, ...]
    convolution: tuple[list[int], list[int], list[int], int]
    rest: tuple

    @property
    def arguments(self) -> tuple:
        """All arguments of the operator."""
        return (*self.tensors, *self.convolution, *self.rest)

    def to(self, dtype: torch.dtype) -> Setup:
        """Give the setup in another dtype, with gradients."""
        tensors = tuple(None if t is None else t.detach().to(dtype).requires_grad_() for t in self.tensors)
        return Setup(tensors, self.convolution, self.rest)

    def torchs(self) -> Tensor:
        """Compute each operation by itself, rounded as torch does."""
        x, weight, _, gamma, beta, residual = self.tensors
        *places, eps, kind, parameters = self.rest
        u = convolution(x, weight, None, *self.convolution)
        y, _, _ = definition.batch_norm(u, gamma, beta, None, *places, eps, "", ())
        return definition.activate(y if residual is None else y + residual, kind, parameters)

    def composition(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the convolution, then batch norm by its definition; mean and variance without the bias."""
        x, weight, _, gamma, beta, residual = self.tensors
        u = convolution(x, weight, None, *self.convolution)
        return definition.batch_norm(u, gamma, beta, residual, *self.rest)


def make(
    case: ConvCase, source: str, activation: Activation | None, dtype: torch.dtype, *, residual=False, seed=0
) -> Setup:
    """Make the tensors of a case; gamma has a zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(*case.shape) + case.offset
    match case.layout:
        case "channels_last":
            x = x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim])
        case "channels of a channels last tensor":
            x = torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : case.shape[1]]
        case "strided":
            x = torch.stack([x, x], -1)[..., 0]
    weight = draw(*case.filters)
    gamma = draw(case.out)
    gamma[0] = 0
    extra = draw(*case.output) if residual else None
    regions = regions_of(source, case.output)
    places = torch.randint(0, 2**62, (regions.draws,), generator=generator) if regions.draws else None
    kind, parameters = (activation.kind, list(activation.parameters)) if activation else ("", [])
    tensors = (x, weight, draw(case.out), gamma, draw(case.out), extra)
    rest = (places, list(regions.boxes), list(regions.weights), 1e-3, kind, parameters)
    return Setup(tensors, case.settings, rest).to(dtype)
