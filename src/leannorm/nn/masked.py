"""BN of padded sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leannorm.methods import MaskedSequences
from leannorm.nn.concatenation import Concatenation
from leannorm.nn.entry import Entry
from leannorm.nn.folding import Fold
from leannorm.nn.method import MomentsNorm
from leannorm.nn.preactivation import PreactivatedFold
from leannorm.nn.tracing import is_traced, record
from leannorm.ops.contract import accumulation_dtype
from leannorm.ops.definition import per_channel


@dataclass
class LengthMark:
    """Shared by a converted model's entry and its layers: the valid share of each sample while a call lasts."""

    lengths: Tensor | None = None
    longest: int = 0


class LengthEntry(Entry):
    """Takes ``lengths=`` out of a converted model's call and shows it to the layers while the call lasts."""

    def __init__(self, mark: LengthMark) -> None:
        self.mark = mark

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Take the lengths."""
        self.mark.lengths = None
        if "lengths" not in kwargs:
            return None
        kwargs = dict(kwargs)
        lengths = kwargs.pop("lengths")
        sequences = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim == 3]
        if not sequences or not isinstance(lengths, Tensor) or lengths.shape != sequences[0].shape[:1]:
            raise ValueError(
                "lengths must be a tensor of one length for each sample of the model's (N, C, L) input, got "
                f"{tuple(lengths.shape) if isinstance(lengths, Tensor) else lengths!r} for inputs "
                f"{[tuple(t.shape) for t in sequences]}"
            )
        self.mark.lengths, self.mark.longest = lengths, sequences[0].shape[-1]
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forget the lengths; also called after an exception."""
        self.mark.lengths = None


class MaskedBatchNorm(MomentsNorm):
    r"""BN of (N, C, L) sequences whose statistics leave the padding out.

    .. math:: \mu = \sum_{n, l < len_n} x_{ncl} / \sum_n len_n, \quad
        \sigma^2 = \sum_{n, l < len_n} (x_{ncl} - \mu)^2 / \sum_n len_n

    Padding is normalized too, by the same map, and neither feeds the statistics nor gets their gradient. A converted
    model takes the lengths by keyword, ``model(x, lengths=lengths)``, as (N,) integers of positions of its own input;
    a layer whose maps have another length L' takes ceil(len L' / L) positions. In eval mode the lengths are not needed.

    Source: masked statistics are common practice in speech recognition; the formula is that of BN over valid positions.
    """

    takes = MaskedSequences
    needs_running_statistics = False
    reads_state = True
    why_not_recalibrated = "its statistics need the lengths of the sequences"
    method: MaskedSequences
    length_mark: LengthMark | None = None

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: Any = None,
        folded: Fold | Concatenation | PreactivatedFold | None = None,
        *,
        lengths: Any = None,
    ) -> Tensor:
        """Normalize ``input``; ``lengths`` are for a layer that is called by itself."""
        if is_traced(input):
            return record(self, input, residual, activation, folded, lengths=lengths)
        if lengths is None:
            return super().forward(input, residual, activation, folded)
        mark, self.length_mark = self.length_mark, LengthMark(lengths, input.shape[-1])
        try:
            return super().forward(input, residual, activation, folded)
        finally:
            self.length_mark = mark

    def _mask(self, input: Tensor) -> Tensor:
        mark = self.length_mark
        if mark is None or mark.lengths is None:
            raise ValueError(
                "masked statistics need the sequences' lengths in training: call the converted model as "
                "model(x, lengths=lengths), with one length for each sample"
            )
        if input.ndim != 3 or mark.lengths.shape[0] != input.shape[0]:
            raise ValueError(
                f"masked statistics need an (N, C, L) input with one of the {mark.lengths.shape[0]} lengths for each "
                f"sample, got {tuple(input.shape)}"
            )
        longest = input.shape[-1]
        lengths = mark.lengths if longest == mark.longest else -(-mark.lengths * longest // mark.longest)
        return torch.arange(longest, device=input.device) < lengths.to(input.device)[:, None, None]

    def _moments(self, input: Tensor) -> tuple[Tensor, Tensor]:
        mask = self._mask(input)
        x = torch.where(mask, input.to(accumulation_dtype(input.dtype)), 0.0)
        elements = mask.sum().clamp(min=1)
        mean = x.sum([0, 2]) / elements
        var = torch.where(mask, x - per_channel(mean, x), 0.0).square().sum([0, 2]) / elements
        if self._counts(input):
            self._track(mean.detach(), var.detach() * (elements / (elements - 1).clamp(min=1)))
        return mean, var
