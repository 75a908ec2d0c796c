"""Both directions of a few small layers on the GPU, to be run by compute-sanitizer."""

import os

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # each tensor an allocation, so that its ends are known

import torch

from leannorm import parse_statistics
from leannorm.functional import batch_norm

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # what is allocated is filled with NaN
    for source in ("full", "grid:1/8@step", "0.75*grid:1/4+0.25*bs:1/2"):
        for shape in ((5, 17, 9, 7), (8, 64, 28, 28)):
            for channels_last in (True, False):
                x, residual = torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)
                if channels_last:
                    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
                x.requires_grad_()
                y, mean, var = batch_norm(
                    x, statistics=parse_statistics(source), residual=residual.requires_grad_(), activation="relu"
                )
                found = (y, mean, var, *torch.autograd.grad(y, (x, residual), torch.randn_like(y)))
                torch.cuda.synchronize()
                assert all(t.isfinite().all() for t in found)
