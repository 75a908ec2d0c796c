"""Batch renormalization."""

from __future__ import annotations

import torch
from torch import Tensor

from leannorm import functional
from leannorm.activation import Activation
from leannorm.methods import BatchRenormalization
from leannorm.nn.method import MethodNorm, count, unbiased


class BatchRenorm(MethodNorm):
    r"""BN whose batch statistics are corrected towards the running ones.

    .. math:: \hat x = r (x - \mu_B) / \sigma_B + d, \quad
        r = clip(\sigma_B / \sigma, 1 / r_{max}, r_{max}), \quad d = clip((\mu_B - \mu) / \sigma, -d_{max}, d_{max})

    with sigma = sqrt(var + eps) of the batch and of the running statistics as they were before it; no gradient flows
    through r and d. Where the limits do not bind, training computes what eval mode will. The limits grow linearly from
    (1, 0), which is plain BN, in the steps that the method names, counted by ``num_batches_tracked``. Statistics take
    one more pass over the input than in BN.

    Source: Ioffe, Batch Renormalization, arXiv 1702.03275, algorithm 1 and section 4.1. There the deviation itself is
    averaged, here the variance, as eval mode takes it.
    """

    takes = BatchRenormalization
    reads_state = True
    method: BatchRenormalization

    def _limits(self) -> tuple[Tensor, Tensor]:
        """Give r_max and d_max of this step."""
        method, step = self.method, self.num_batches_tracked

        def grown(end: int) -> Tensor:
            share = ((step - method.start) / max(1, end - method.start)).clamp(0, 1)
            return torch.where(step >= end, 1.0, share)

        return 1 + (method.r_max - 1) * grown(method.r_end), method.d_max * grown(method.d_end)

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        elements = count(input)
        mean, var = functional.moments(input)
        r_max, d_max = (limit.to(mean.dtype) for limit in self._limits())
        sigma = torch.sqrt(self.running_var.to(mean.dtype) + self.eps)
        r = (torch.sqrt(var + self.eps) / sigma).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / sigma).clamp(-d_max, d_max)
        r, d = functional.snapshot(r), functional.snapshot(d)
        weight, bias = r, d
        if self.weight is not None:
            weight, bias = r * self.weight, d * self.weight
        if self.bias is not None:
            bias = bias + self.bias
        y, _, _ = functional.batch_norm(input, weight, bias, eps=self.eps, residual=residual, activation=activation)
        if self._counts(input):
            self._track(mean, unbiased(var, elements))
        return y
