"""Diminishing batch normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from leannorm import functional
from leannorm.methods import DiminishingAverage
from leannorm.nn.method import MomentsNorm, count
from leannorm.ops.contract import accumulation_dtype
from leannorm.ops.definition import reduced_dimensions


class DiminishingBatchNorm(MomentsNorm):
    r"""BN with statistics that are a moving average, of diminishing weight a_t for the batch of step t.

    .. math:: \mu_t = a_t \mu_B + (1 - a_t) \mu_{t-1}, \quad \sigma^2_t = a_t \sigma^2_B + (1 - a_t) \sigma^2_{t-1},
        \quad a_t = t^{-exponent}

    The running statistics are mu_t and sigma^2_t themselves (biased), so that eval mode computes with what training
    had come to. The gradient is exact: it flows through this batch's share. Exponent 0 is BN; with 1 the statistics are
    the mean of those of all batches so far. ``momentum`` of the BN layer is not used.

    Source: Ma and Klabjan, Diminishing Batch Normalization, arXiv 1705.08011, which averages so and takes the
    statistics for parameters that the gradient does not reach.
    """

    takes = DiminishingAverage
    reads_state = True
    why_not_recalibrated = "its running statistics are those that training normalized with"
    method: DiminishingAverage

    def _moments(self, input: Tensor) -> tuple[Tensor, Tensor]:
        count(input)
        dtype = accumulation_dtype(input.dtype)
        var, mean = torch.var_mean(input.to(dtype), reduced_dimensions(input), correction=0)
        share = functional.snapshot((self.num_batches_tracked + 1).to(dtype) ** -self.method.exponent)
        mean = torch.lerp(functional.snapshot(self.running_mean).to(dtype), mean, share)
        var = torch.lerp(functional.snapshot(self.running_var).to(dtype), var, share)
        if self._counts(input):
            self._track(mean.detach(), var.detach(), 1.0)
        return mean, var
