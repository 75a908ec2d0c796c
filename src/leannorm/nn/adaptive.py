"""BN with a momentum that the input tells."""

from __future__ import annotations

import torch
from torch import Tensor

from leannorm import functional
from leannorm.activation import Activation
from leannorm.methods import AdaptiveMomentum, Method
from leannorm.nn.method import MethodNorm, count, unbiased

_BUFFERS = ("estimator_weight", "last_mean", "last_move")


class AdaptiveBatchNorm(MethodNorm):
    r"""BN whose running statistics move by a momentum that the batch's content tells.

    .. math:: m = 0.1 + 0.9\, sigmoid(w \cdot \mu_B + b)

    with mu_B the mean of x over batch and positions, (C,). The output in training is BN's. ``momentum`` of the BN layer
    is not used.

    The running statistics carry no gradient, so that the loss cannot train w and b (they are buffers, zero at first).
    What trains them is how well the running mean M, moved by the last m, foretells this batch:

    .. math:: D = mean_c[(\mu_B - M)^2 / (\sigma^2 + eps)], \quad
        w \leftarrow w - \eta\, (\partial D / \partial m)\, (\partial m / \partial w)

    one step of gradient descent a batch with the method's learning rate eta, 0 for none. Nothing waits for the device.

    Source: the momentum's formula is a proposal for adaptive BN of that name, there without a batch dimension and with
    nothing that trains it; the training is ours.
    """

    takes = AdaptiveMomentum
    method: AdaptiveMomentum
    estimator_weight: Tensor
    estimator_bias: Tensor
    last_mean: Tensor
    last_move: Tensor
    last_slope: Tensor

    def enter(self, method: Method) -> None:
        """Make the estimator."""
        super().enter(method)
        for name in _BUFFERS:
            self._register(name, self.num_features)
        for name in ("estimator_bias", "last_slope"):
            self._register(name)

    def leave(self) -> None:
        """Take the estimator away."""
        for name in (*_BUFFERS, "estimator_bias", "last_slope"):
            delattr(self, name)

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        elements = count(input)
        y, mean, var = functional.batch_norm(
            input, self.weight, self.bias, eps=self.eps, residual=residual, activation=activation
        )
        if self._counts(input):
            self._track(mean, unbiased(var, elements), self._momentum_of(mean))
        return y

    @torch.no_grad()
    def _momentum_of(self, mean: Tensor) -> Tensor:
        """Train the estimator on this batch's mean, and estimate this batch's momentum."""
        mean = mean.to(self.running_mean.dtype)
        error = (mean - self.running_mean) / (self.running_var + self.eps)
        slope = (-2 * error * self.last_move).mean() * self.last_slope * self.method.learning_rate
        finite = slope.isfinite()
        self.estimator_weight.sub_(torch.where(finite, slope * self.last_mean, 0.0))
        self.estimator_bias.sub_(torch.where(finite, slope, 0.0))
        gate = torch.sigmoid((self.estimator_weight * mean).sum() + self.estimator_bias)
        if self.guard_nonfinite:
            gate = gate.nan_to_num(0.0)
        self.last_mean.copy_(mean)
        self.last_move.copy_(mean - self.running_mean)
        self.last_slope.copy_(0.9 * gate * (1 - gate))
        return 0.1 + 0.9 * gate
