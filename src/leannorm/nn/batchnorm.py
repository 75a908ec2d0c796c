"""BatchNorm1d, 2d and 3d: torch's layers with a source of statistics, a residual and an activation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leannorm import functional
from leannorm.activation import Activation, as_activation
from leannorm.methods import Method
from leannorm.nn import calls
from leannorm.nn.concatenation import Concatenation
from leannorm.nn.folding import Fold
from leannorm.nn.preactivation import PreactivatedFold
from leannorm.nn.recompute import in_backward, recomputing
from leannorm.nn.tracing import Unscriptable, is_traced, record
from leannorm.nn.virtual import VirtualMark
from leannorm.ops import eager
from leannorm.statistics import FullBatch, Regions, Statistics


class _RefuseSyncConversion:
    """Stands at `qconfig`, which torch's SyncBatchNorm converter looks up on each layer that it is about to replace.

    The converter would drop the source of statistics and the activation in silence.
    """

    def __get__(self, layer: SampledBatchNorm | None, owner: type) -> Any:
        caller = sys._getframe(1).f_code.co_name
        if layer is not None and caller == "convert_sync_batchnorm" and not layer.is_plain:
            raise RuntimeError(
                f"torch.nn.SyncBatchNorm.convert_sync_batchnorm would drop the statistics ({layer.target}) and the "
                f"activation ({layer.activation}) of a leannorm layer; call leannorm.revert(model) first"
            )
        raise AttributeError("qconfig")


class SampledBatchNorm(Unscriptable, _BatchNorm):
    r"""Batch normalization whose statistics come from some of the batch's elements.

    .. math:: y = act(\gamma (x - \mu) / \sqrt{\sigma^2 + eps} + \beta + residual)

    In training, mean and variance are those of the elements that ``statistics`` tells, and move the running statistics
    by ``momentum`` (None: their cumulative average); the running variance takes the unbiased estimate. In eval mode,
    and when frozen, the running statistics are used: by PyTorch's plain operators, or where a residual or an activation
    follows and nothing exports, compiles or traces the layer, by one of the kernels. In the
    recomputation of a checkpointed forward (any forward inside a backward pass) the running statistics do not move.
    `torch.fx` records the layer's call, as of torch's own; `torch.jit.script` is refused, and so is `torch.jit.trace`
    of sampled statistics in training mode.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: share of the new statistics in the running ones, or None for the cumulative average.
        affine: learn gamma and beta.
        track_running_stats: keep running statistics; without them eval mode uses the batch's own.
        device: of parameters and buffers.
        dtype: of parameters and buffers; inputs of a lower precision are taken too.
        bias: learn beta (with ``affine``).
        statistics: the source of statistics.
        activation: applied after the residual: a name, a `leannorm.Activation`, or None.
        guard_nonfinite: keep NaN and infinity out of the running statistics, per channel.

    Raises:
        TypeError: for an input that is not floating.
        ValueError: for an input or residual of the wrong shape, or one element a channel in training.
        RuntimeError: for virtual samples outside of a converted model's own call.

    Source: Ioffe and Szegedy, arXiv 1502.03167; Chen et al., IEEE TNNLS 32(1), 2021.
    """

    statistics: Statistics = FullBatch()
    activation: Activation | None = None
    guard_nonfinite: bool = False
    frozen: bool = False
    folds_convolution: bool | Literal["natively"] = False  # in its call: wherever it fits, or by native kernels alone
    decomposes: bool = False
    place: int = 0
    virtual_mark: VirtualMark | None = None
    qconfig = _RefuseSyncConversion()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        statistics: Statistics = FullBatch(),
        activation: str | Activation | None = None,
        guard_nonfinite: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.bias = None
        if not isinstance(statistics, Statistics):
            raise TypeError(
                f"statistics must be a leannorm source such as FullBatch(), got {statistics!r}; "
                "leannorm.parse_statistics reads spellings; a method is for leannorm.convert"
            )
        self.statistics = statistics
        self.activation = as_activation(activation)
        self.guard_nonfinite = guard_nonfinite

    @property
    def target(self) -> Statistics | Method:
        """What `leannorm.convert` made the layer: its source of statistics, or its method."""
        return self.statistics

    @property
    def is_plain(self) -> bool:
        """Whether the layer computes what torch's own does."""
        return isinstance(self.statistics, FullBatch) and self.activation is None

    def train(self, mode: bool = True) -> SampledBatchNorm:
        """Set the mode; a frozen layer stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | Activation | None = None,
        folded: Fold | Concatenation | PreactivatedFold | None = None,
    ) -> Tensor:
        """Normalize ``input``, add ``residual`` (same shape and dtype), and activate.

        ``activation`` is one for this call, of a layer that has none of its own. A ``folded`` convolution or
        concatenation is computed in the same operator, and ``input`` is what it takes (its first input).
        """
        if is_traced(input):
            return record(self, input, residual, activation, folded)
        self._check_input_dim(input)
        if activation is None:
            activation = self.activation
        elif self.activation is not None:
            raise ValueError(f"a layer that applies {self.activation} was called with the activation {activation}")
        if not self.training:
            return self._eval_forward(input, residual, activation)
        if folded is None:
            return self._train_forward(input, residual, activation)
        self._check_mark(input)
        y, mean, var = folded.compute(self, input, residual, activation)
        self._take_in(y, mean, var, folded.regions)
        return y

    def _train_forward(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        self._check_mark(input)
        calls.record(None, self, input, residual, activation)
        regions = self.statistics.regions_of(input, self.place)
        y, mean, var = functional.batch_norm(
            input,
            self.weight,
            self.bias,
            statistics=regions,
            eps=self.eps,
            residual=residual,
            activation=activation,
            decomposed=self.decomposes,
        )
        self._take_in(input, mean, var, regions)
        return y

    def _eval_forward(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        return functional.normalize(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            eps=self.eps,
            residual=residual,
            activation=activation,
        )

    def _check_mark(self, input: Tensor) -> None:
        if not self.statistics.virtual or recomputing():  # the call that is computed again was checked
            return
        rows = None if self.virtual_mark is None else self.virtual_mark.rows
        if rows != input.shape[0]:
            raise RuntimeError(
                f"a layer with virtual samples got {input.shape[0]} samples where "
                + ("no marked call is under way" if rows is None else f"the marked call has {rows}")
                + "; the virtual samples are appended at the entry of the converted model: call that model itself "
                "(not a part of it, and with no reshaping of the batch in between), or convert the part"
            )

    def _take_in(self, input: Tensor, mean: Tensor, var: Tensor, regions: Regions) -> None:
        """Count a batch, and move the running statistics towards its own by the layer's momentum."""
        track, factor = eager.kernel("track", mean), self.momentum
        if track is not None and isinstance(factor, float) and input.numel() > 0:
            if not self.track_running_stats or in_backward():
                return
            batches = self._buffers.get("num_batches_tracked")
            if batches is not None and self._track_natively(track, mean, var, regions.unbiased, factor, batches):
                return
        if self._counts(input):
            self._track(mean, var, unbiased=regions.unbiased)

    def _counts(self, input: Tensor) -> bool:
        """Count a batch, and say whether the running statistics take it in."""
        batches = self.num_batches_tracked
        if batches is None or not self.track_running_stats or recomputing():
            return False
        batches.add_(1)
        return input.numel() > 0

    def _track_natively(
        self,
        track: Callable[..., bool],
        mean: Tensor,
        var: Tensor,
        unbiased: float,
        factor: float,
        batches: Tensor | None = None,
    ) -> bool:
        running_mean, running_var = map(self._buffers.get, ("running_mean", "running_var"))
        if running_mean is None or running_var is None:
            return False
        options = self.statistics.between_steps, self.guard_nonfinite
        return track(running_mean, running_var, batches, mean, var, unbiased, factor, *options)

    def _track(self, mean: Tensor, var: Tensor, factor: Tensor | float | None = None, *, unbiased: float = 1.0) -> None:
        """Move the running statistics towards ``mean`` and ``var`` (times ``unbiased``).

        They move by ``factor``; None is the layer's momentum.
        """
        batches, running_mean, running_var = self.num_batches_tracked, self.running_mean, self.running_var
        if batches is None or running_mean is None or running_var is None:
            return
        dtype = running_mean.dtype
        if factor is None:
            factor = self.momentum
        if factor is None:
            factor = 1 / batches
        if isinstance(factor, Tensor):
            factor = factor.to(dtype)
        elif (track := eager.kernel("track", mean)) and self._track_natively(track, mean, var, unbiased, factor):
            return
        mean, var = mean.detach().to(dtype), var.detach().to(dtype) * unbiased
        if self.statistics.between_steps:
            var = var + (1 - factor) * (mean - running_mean) ** 2
        if self.guard_nonfinite:
            finite = mean.isfinite() & var.isfinite()
            mean, var = torch.where(finite, mean, running_mean), torch.where(finite, var, running_var)
        running_mean.lerp_(mean, factor)
        running_var.lerp_(var, factor)

    def extra_repr(self) -> str:
        """Add what torch's layer has not."""
        parts = [super().extra_repr(), f"statistics={self.target}"]
        if self.activation:
            parts.append(f"activation={self.activation}")
        parts += [
            name for name in ("guard_nonfinite", "frozen", "folds_convolution", "decomposes") if getattr(self, name)
        ]
        return ", ".join(parts)


class BatchNorm1d(SampledBatchNorm, nn.BatchNorm1d):
    """Batch normalization of (N, C) or (N, C, L) tensors; a drop-in for `torch.nn.BatchNorm1d`.

    >>> layer = BatchNorm1d(3, statistics=FullBatch(), activation="relu")
    >>> layer(torch.randn(8, 3)).shape
    torch.Size([8, 3])
    """

    __doc__ = f"{__doc__}\n{SampledBatchNorm.__doc__}"


class BatchNorm2d(SampledBatchNorm, nn.BatchNorm2d):
    """Batch normalization of (N, C, H, W) tensors; a drop-in for `torch.nn.BatchNorm2d`.

    >>> layer = BatchNorm2d(3, activation="relu6")
    >>> x = torch.randn(8, 3, 6, 6)
    >>> layer(x, residual=x).shape
    torch.Size([8, 3, 6, 6])
    """

    __doc__ = f"{__doc__}\n{SampledBatchNorm.__doc__}"


class BatchNorm3d(SampledBatchNorm, nn.BatchNorm3d):
    """Batch normalization of (N, C, D, H, W) tensors; a drop-in for `torch.nn.BatchNorm3d`.

    >>> BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """

    __doc__ = f"{__doc__}\n{SampledBatchNorm.__doc__}"
