"""Mixture normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from leannorm import functional
from leannorm.activation import Activation
from leannorm.methods import Method, MixtureNormalization
from leannorm.nn.method import MethodNorm, count, unbiased
from leannorm.ops.contract import accumulation_dtype


class MixtureBatchNorm(MethodNorm):
    r"""Each position, a vector x over the channels, is assigned softly to the components of a Gaussian mixture.

    .. math:: \hat x = \sum_k \frac{p(k|x)}{\sqrt{\lambda_k}} \frac{x - \mu_k}{\sqrt{\sigma_k^2 + eps}}, \quad
        p(k|x) \propto \lambda_k N(x; \mu_k, diag\,\sigma_k^2)

    with mu_k, sigma_k^2 the moments of the batch's positions weighted by p(k|x) / sum_j p(k|x_j), and lambda_k the mean
    of p(k|x). The components that assign are running ones, moved each step as BN's running statistics are: one step of
    expectation-maximisation a batch. At first they are spread along each channel's distribution. Gradients are exact,
    those through the assignment too. Eval mode computes with the running components. One component is BN.

    Source: Kalayeh and Shah, Training Faster by Separating Modes of Variation in Batch-normalized Models, arXiv
    1806.02892, section 3.3, which fits the mixture anew in each step, by k-means and expectation-maximisation.
    """

    takes = MixtureNormalization
    reads_state = True
    why_not_recalibrated = "its statistics are those of a mixture's components, which recalibrate does not pool"
    why_not_folded = "a mixture's scale and shift depend on the input, in eval mode too: no affine map per channel"
    method: MixtureNormalization
    component_mean: Tensor
    component_var: Tensor
    component_share: Tensor

    def enter(self, method: Method) -> None:
        """Spread the components along the running statistics."""
        super().enter(method)
        components = self.method.components
        for name in ("component_mean", "component_var"):
            self._register(name, components, self.num_features)
        self._register("component_share", components)
        self.component_mean.copy_(self._spread(self.running_mean, self.running_var))
        self.component_var.copy_(self.running_var.expand_as(self.component_var))
        self.component_share.fill_(1 / components)

    def leave(self) -> None:
        """Take the components away."""
        del self.component_mean, self.component_var, self.component_share

    def _spread(self, mean: Tensor, var: Tensor) -> Tensor:
        components = self.method.components
        at = torch.special.ndtri((torch.arange(components, device=mean.device, dtype=mean.dtype) + 0.5) / components)
        return mean + at[:, None] * var.sqrt()

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        elements, x = count(input), _positions(input)
        var, mean = torch.var_mean(x.detach(), 0, correction=0)
        first = self.num_batches_tracked == 0
        components = (
            torch.where(first, self._spread(mean, var), self.component_mean),
            torch.where(first, var.expand_as(self.component_var), self.component_var),
            self.component_share,
        )
        mean_k, var_k, share_k = map(functional.snapshot, components)
        p = _assign(x, mean_k, var_k, share_k, self.eps)
        share = p.mean(0)
        weights = (p / p.sum(0).clamp(min=torch.finfo(p.dtype).tiny)).T[:, :, None]  # (K, M, 1)
        means = (weights * x).sum(1)
        variances = (weights * (x - means[:, None]) ** 2).sum(1)
        if self._counts(input):
            self._move(first, means, variances, share)
            self._track(mean, unbiased(var, elements))
        return self._apply_components(input, x, p, (means, variances, share), residual, activation)

    def _eval_forward(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        x = _positions(input)
        components = self.component_mean, self.component_var, self.component_share
        p = _assign(x, *components, self.eps)
        return self._apply_components(input, x, p, components, residual, activation)

    def _apply_components(
        self,
        input: Tensor,
        x: Tensor,
        p: Tensor,
        components: tuple[Tensor, Tensor, Tensor],
        residual: Tensor | None,
        activation: str | Activation | None,
    ) -> Tensor:
        means, variances, share = (tensor.to(x.dtype)[:, None] for tensor in components)
        scaled = (p * torch.rsqrt(share.T + torch.finfo(x.dtype).tiny)).T[:, :, None]
        normalized = (scaled * (x - means) * torch.rsqrt(variances + self.eps)).sum(0)
        normalized = normalized.unflatten(0, (input.shape[0], *input.shape[2:])).movedim(-1, 1)
        return functional.transform(normalized, input, self.weight, self.bias, residual=residual, activation=activation)

    @torch.no_grad()
    def _move(self, first: Tensor, means: Tensor, variances: Tensor, share: Tensor) -> None:
        factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        factor = torch.where(first, 1.0, factor).to(self.component_mean.dtype)
        for buffer, new in (
            (self.component_mean, means),
            (self.component_var, variances),
            (self.component_share, share),
        ):
            new = new.to(buffer.dtype)
            if self.guard_nonfinite:
                new = torch.where(new.isfinite(), new, buffer)
            buffer.lerp_(new, factor)


def _positions(input: Tensor) -> Tensor:
    """View (N, C, *spatial) as (M, C) vectors over the channels, in the accumulation dtype."""
    return input.to(accumulation_dtype(input.dtype)).movedim(1, -1).flatten(0, -2)


def _assign(x: Tensor, mean: Tensor, var: Tensor, share: Tensor, eps: float) -> Tensor:
    """Give p(k|x), (M, K), from components (K, C), (K, C), (K,)."""
    mean, var, share = (tensor.to(x.dtype) for tensor in (mean, var, share))
    distance = ((x[:, None] - mean) ** 2 / (var + eps) + torch.log(var + eps)).sum(-1)
    return torch.softmax(torch.log(share) - distance / 2, -1)
