"""Ghost batch normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from leannorm import functional
from leannorm.activation import Activation
from leannorm.methods import GhostBatch
from leannorm.nn.method import MethodNorm, count, unbiased
from leannorm.ops.contract import accumulation_dtype
from leannorm.statistics import refuse_jit_trace


class GhostBatchNorm(MethodNorm):
    r"""BN of each chunk of the batch by itself.

    .. math:: \hat x_i = (x_i - \mu_{k(i)}) / \sqrt{\sigma^2_{k(i)} + eps}

    The batch is cut into the fewest chunks of adjacent samples that hold at most ``samples``; their sizes differ by one
    at most, so that no chunk is a small remainder. All chunks of a size are computed together. The running statistics
    move towards those of the whole batch, which the chunks' give exactly:

    .. math:: \mu = E_k[\mu_k], \quad \sigma^2 = E_k[\sigma^2_k + (\mu_k - \mu)^2], \text{ chunks weighted by size}

    Source: Hoffer, Hubara, Soudry, Train longer, generalize better, arXiv 1705.08741, algorithm 1. There the running
    statistics take in the chunks one after the other.
    """

    takes = GhostBatch
    needs_running_statistics = False
    method: GhostBatch

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        refuse_jit_trace(self.method)
        chunks = -(-input.shape[0] // self.method.samples)
        size, larger = divmod(input.shape[0], chunks)
        x = input.to(accumulation_dtype(input.dtype))
        dimensions = [1, *range(3, input.ndim + 1)]
        normalized, moments = [], []
        for part, length in ((x[: larger * (size + 1)], size + 1), (x[larger * (size + 1) :], size)):
            if part.shape[0] == 0:
                continue
            if length * input[0, 0].numel() < 2:
                raise functional.one_element((1, *input.shape[1:]))
            chunked = part.unflatten(0, (-1, length))
            var, mean = torch.var_mean(chunked, dimensions, correction=0, keepdim=True)
            normalized.append(((chunked - mean) * torch.rsqrt(var + self.eps)).flatten(0, 1))
            moments.append((length / input.shape[0], mean.detach().flatten(1), var.detach().flatten(1)))
        if self._counts(input):
            whole = torch.stack([share * mean.sum(0) for share, mean, _ in moments]).sum(0)
            spread = [share * (var + (mean - whole) ** 2).sum(0) for share, mean, var in moments]
            self._track(whole, unbiased(torch.stack(spread).sum(0), count(input)))
        return functional.transform(
            torch.cat(normalized), input, self.weight, self.bias, residual=residual, activation=activation
        )
