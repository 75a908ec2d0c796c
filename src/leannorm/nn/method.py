"""What the layers of the methods (`leannorm.methods`) share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leannorm import functional
from leannorm.activation import Activation
from leannorm.methods import Method
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.recompute import recomputing
from leannorm.statistics import Statistics


class MethodNorm(SampledBatchNorm):
    """A layer that normalizes by a method; `leannorm.convert` makes BN layers such.

    It takes inputs of shape (N, C, *spatial), adds a residual and activates as leannorm's BN layers do, and keeps their
    parameters and running statistics. Where nothing else is said, eval mode is BN's, so that it folds as BN does.

    Args:
        num_features: C, the number of channels.
        method: the method, of the class that the layer computes.
        options: as of `leannorm.BatchNorm2d`, but for ``statistics``.

    Raises:
        TypeError: for a method of another class.
        ValueError: for options with which the method cannot be had.
    """

    takes: ClassVar[type[Method]]
    needs_running_statistics: ClassVar[bool] = True
    reads_state: ClassVar[bool] = False  # what it computes in training depends on what earlier batches left
    why_not_recalibrated: ClassVar[str | None] = None
    why_not_folded: ClassVar[str | None] = None

    method: Any  # of the class that `takes` says
    running_mean: Any  # a tensor where `needs_running_statistics`, as the next two
    running_var: Any
    num_batches_tracked: Any
    exact: bool = False  # while true, training mode is that of exact BN
    plain_class: type[_BatchNorm] | None = None  # the class that the layer had before `convert`

    def __init__(self, num_features: int, method: Method, **options: Any) -> None:
        super().__init__(num_features, **options)
        reason = self.why_not(self, method)
        if reason is not None:
            raise ValueError(f"{type(self).__name__}: {reason}")
        self.enter(method)

    @classmethod
    def why_not(cls, layer: nn.Module, method: Method) -> str | None:
        """Say why a BN layer, or what a method made of one, cannot become one of this class, or None."""
        if type(method) is not cls.takes:
            raise TypeError(f"{cls.__name__} takes {cls.takes.__name__}, got {method!r}")
        state = vars(layer).get("batch_norm_state")
        tracks = state["tracks"] if state else layer.running_mean is not None
        if cls.needs_running_statistics and not tracks:
            return f"{method} needs running statistics, which the layer does not keep (track_running_stats=False)"
        return None

    def enter(self, method: Method) -> None:
        """Begin to normalize by a method: make the state that BN has not."""
        self.method = method

    def why_not_left(self) -> str | None:
        """Say why the layer's state has no counterpart in a BN layer, or None."""
        return self.why_not_folded

    def leave(self) -> None:
        """Take away the state that BN has not."""

    @property
    def target(self) -> Statistics | Method:
        """The method."""
        return self.method

    @property
    def is_plain(self) -> bool:
        """No method is what torch's layer computes."""
        return False

    def _check_input_dim(self, input: Tensor) -> None:
        if self.plain_class is not None:
            self.plain_class._check_input_dim(self, input)  # pyright: ignore[reportArgumentType]

    def _train_forward(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        if self.exact or input.numel() == 0:
            return self._exact_forward(input, residual, activation)
        if self.reads_state and recomputing():
            raise RuntimeError(
                f"a layer with {self.method} computes with what earlier batches left, and that has moved since the "
                "forward that is recomputed here: leave the layer out of activation checkpointing"
            )
        return self._normalize(input, residual, activation)

    _exact_forward = SampledBatchNorm._train_forward

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        raise NotImplementedError

    def _register(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        """Add a buffer of zeros beside the running statistics."""
        assert self.running_mean is not None
        dtype = dtype or self.running_mean.dtype
        self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=self.running_mean.device))


class MomentsNorm(MethodNorm):
    """A layer of a method that is BN with another mean and variance."""

    def _normalize(self, input: Tensor, residual: Tensor | None, activation: str | Activation | None) -> Tensor:
        mean, var = self._moments(input)
        return functional.normalize_by(
            input, mean, var, self.weight, self.bias, eps=self.eps, residual=residual, activation=activation
        )

    def _moments(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Give mean and variance with their gradients, (C,), and move the running statistics."""
        raise NotImplementedError


def count(input: Tensor) -> int:
    """Give the number of elements a channel, at least 2.

    Raises:
        ValueError: for a single one.
    """
    elements = input.numel() // input.shape[1]
    if elements < 2:
        raise functional.one_element(input.shape)
    return elements


def unbiased(var: Tensor, elements: int | Tensor) -> Tensor:
    """Give the unbiased variance of so many elements from the biased one."""
    return var * (elements / (elements - 1))
