"""No normalization."""

from __future__ import annotations

from torch import Tensor

from leannorm import functional
from leannorm.activation import Activation
from leannorm.methods import NoNormalization
from leannorm.nn.method import MethodNorm


class NoNorm(MethodNorm):
    r"""What is left of BN without normalization, to compare with.

    .. math:: y = \gamma x + \beta

    Source: the networks without BN of Ioffe and Szegedy, arXiv 1502.03167, with gamma and beta kept.
    """

    takes = NoNormalization
    needs_running_statistics = False
    why_not_recalibrated = "it uses no statistics"
    why_not_folded = "it is a scale and shift alone, without normalization"
    method: NoNormalization

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        return functional.transform(input, input, self.weight, self.bias, residual=residual, activation=activation)

    _eval_forward = _exact_forward = _normalize
