"""BN whose moments are accumulated over micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from leannorm import functional
from leannorm.methods import AccumulatedBatch, Method
from leannorm.nn.method import MomentsNorm, count, unbiased
from leannorm.ops.contract import accumulation_dtype
from leannorm.ops.definition import reduced_dimensions


class AccumulatedBatchNorm(MomentsNorm):
    r"""BN for gradient accumulation: each micro-batch is normalized with all that its optimiser step has seen so far.

    .. math:: \mu = \sum_{j \le i} n_j \mu_j / n, \quad
        \sigma^2 = \sum_{j \le i} n_j (\sigma^2_j + (\mu_j - \mu)^2) / n, \quad n = \sum_{j \le i} n_j

    over the micro-batches j of the step, of n_j elements a channel each. The weights do not change between them, so
    the earlier moments are exact; the gradient flows through those of the micro-batch itself. With the last micro-batch
    the moments are those of the whole batch, and the running statistics take them in, once a step.

    Every ``steps`` forwards in training mode begin a new step: leave no micro-batch out, and call the layer once in
    each.

    Source: pooling after Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances (1979); the aim, statistics of several small batches, is that of arXiv 2002.05712.
    """

    takes = AccumulatedBatch
    reads_state = True
    method: AccumulatedBatch
    accumulated_mean: Tensor
    accumulated_var: Tensor
    accumulated_count: Tensor
    micro_batch: Tensor

    def enter(self, method: Method) -> None:
        """Make the buffers of the step under way."""
        super().enter(method)
        for name in ("accumulated_mean", "accumulated_var"):
            self._register(name, self.num_features)
        for name in ("accumulated_count", "micro_batch"):
            self._register(name, dtype=torch.int64)

    def leave(self) -> None:
        """Take the buffers away."""
        for name in ("accumulated_mean", "accumulated_var", "accumulated_count", "micro_batch"):
            delattr(self, name)

    def _moments(self, input: Tensor) -> tuple[Tensor, Tensor]:
        elements, dtype = count(input), accumulation_dtype(input.dtype)
        var, mean = torch.var_mean(input.to(dtype), reduced_dimensions(input), correction=0)
        first = self.micro_batch == 0
        earlier = [
            functional.snapshot(torch.where(first, 0.0, buffer)).to(dtype)
            for buffer in (self.accumulated_mean, self.accumulated_var)
        ]
        total = torch.where(first, 0, self.accumulated_count) + elements
        share = functional.snapshot(elements / total.to(dtype))
        delta = mean - earlier[0]
        mean = torch.lerp(earlier[0], mean, share)
        var = torch.lerp(earlier[1], var, share) + share * (1 - share) * delta**2
        with torch.no_grad():
            self.accumulated_mean.copy_(mean)
            self.accumulated_var.copy_(var)
            self.accumulated_count.copy_(total)
            self.micro_batch.copy_((self.micro_batch + 1) % self.method.steps)
            last = self.micro_batch == 0
            self.num_batches_tracked.add_(last)
            factor = 1 / self.num_batches_tracked.clamp(min=1) if self.momentum is None else self.momentum
            self._track(mean, unbiased(var, total), torch.where(last, factor, 0.0))
        return mean, var
