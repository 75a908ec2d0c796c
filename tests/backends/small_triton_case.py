"""Both directions of a few small layers on the GPU, to be run by compute-sanitizer.

Each meets every dtype; with weight and bias and without; in training, and with given statistics as in eval mode.
"""

import os

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor an allocation, so that its ends are known

from itertools import cycle, product

import torch

from leannorm import parse_statistics
from leannorm.functional import batch_norm, normalize

SOURCES = ("full", "grid:1/8@step", "0.75*grid:1/4+0.25*bs:1/2")
SHAPES = ((5, 17, 9, 7), (8, 64, 28, 28))
LAYOUTS = (torch.channels_last, torch.contiguous_format)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(device: str) -> None:
    """Compute every case, and look for what is not a number."""
    affine = cycle((True, False, False, True))  # both for each source, shape and layout
    for (source, shape, layout), dtype, has_weight in zip(
        product(SOURCES, SHAPES, LAYOUTS), cycle(DTYPES), affine, strict=False
    ):
        x, residual, dy = torch.randn(3, *shape, device=device).to(dtype)
        x, residual, dy = (t.contiguous(memory_format=layout) for t in (x, residual, dy))
        parameters = torch.rand(2, shape[1], device=device).unbind() if has_weight else ()
        inputs = [t.detach().requires_grad_() for t in (x, residual, *parameters)]
        x, residual, *parameters = inputs
        y, mean, var = batch_norm(
            x, *parameters, statistics=parse_statistics(source), residual=residual, activation="relu"
        )
        found = [y, mean, var, *torch.autograd.grad(y, inputs, dy)]
        y = normalize(x, mean, var, *parameters, residual=residual, activation="silu")
        found += [y, *torch.autograd.grad(y, inputs, dy)]
        for tensor in found:
            assert tensor.isfinite().all(), f"{source}, {shape}, {layout}, {dtype}"


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # what is allocated is filled with NaN
    run("cuda")
