"""Range batch normalization."""

from __future__ import annotations

import math

from torch import Tensor

from leannorm.methods import RangeDeviation
from leannorm.nn.method import MomentsNorm, count
from leannorm.ops.contract import accumulation_dtype
from leannorm.statistics import refuse_jit_trace


class RangeBatchNorm(MomentsNorm):
    r"""BN with the range of the values, which suits low precision: it needs no sum of squares.

    .. math:: \sigma = mean_k[\max_k x - \min_k x] / \sqrt{2 \ln n_k}, \quad \hat x = (x - \mu) / \sqrt{\sigma^2 + eps}

    over chunks k of n_k elements a channel, adjacent in the order (N, *spatial). For normal values sigma is about twice
    the standard deviation, which gamma takes up. The running variance is the average of sigma^2.

    Source: Banner, Hubara, Hoffer, Soudry, Scalable Methods for 8-bit Training of Neural Networks (NeurIPS 2018,
    arXiv 1805.11046), section 3.
    """

    takes = RangeDeviation
    needs_running_statistics = False
    why_not_recalibrated = "its deviation is a range, which recalibrate does not pool"
    method: RangeDeviation

    def _moments(self, input: Tensor) -> tuple[Tensor, Tensor]:
        refuse_jit_trace(self.method)
        elements = count(input)
        chunks = math.gcd(self.method.chunks, elements)
        if chunks == elements:
            chunks = 1
        x = input.to(accumulation_dtype(input.dtype)).transpose(0, 1).reshape(input.shape[1], chunks, -1)
        ranges = (x.amax(-1) - x.amin(-1)).mean(-1)
        mean, var = x.mean([1, 2]), ranges**2 / (2 * math.log(elements // chunks))
        if self._counts(input):
            self._track(mean.detach(), var.detach())
        return mean, var
