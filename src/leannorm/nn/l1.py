"""L1-norm batch normalization."""

from __future__ import annotations

import math

from torch import Tensor

from leannorm.methods import L1Deviation
from leannorm.nn.method import MomentsNorm, count, unbiased
from leannorm.ops.contract import accumulation_dtype
from leannorm.ops.definition import per_channel, reduced_dimensions


class L1BatchNorm(MomentsNorm):
    r"""BN with the mean absolute deviation, which needs neither squares nor a root.

    .. math:: \sigma = \sqrt{\pi / 2}\; E|x - \mu|, \quad \hat x = (x - \mu) / \sqrt{\sigma^2 + eps}

    The factor makes sigma the standard deviation of normal values. The running variance is the average of sigma^2.

    Source: Wu et al., L1-Norm Batch Normalization for Efficient Training of Deep Neural Networks, arXiv 1802.09769,
    which adds eps to sigma; here it stands under the root, as in eval mode.
    """

    takes = L1Deviation
    needs_running_statistics = False
    why_not_recalibrated = "its deviation is a mean absolute one, which recalibrate does not pool"
    method: L1Deviation

    def _moments(self, input: Tensor) -> tuple[Tensor, Tensor]:
        elements = count(input)
        x, dimensions = input.to(accumulation_dtype(input.dtype)), reduced_dimensions(input)
        mean = x.mean(dimensions)
        var = math.pi / 2 * (x - per_channel(mean, x)).abs().mean(dimensions) ** 2
        if self._counts(input):
            self._track(mean.detach(), unbiased(var.detach(), elements))
        return mean, var
