"""Virtual samples: appended at a model's entry, marked while its call lasts, stripped from what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from leannorm.nn.entry import Entry
from leannorm.statistics import VirtualDataset, refuse_jit_trace


@dataclass
class VirtualMark:
    """Shared by a converted model's entry and its layers: the batch size with virtual samples while a call lasts."""

    rows: int | None = None


class VirtualEntry(Entry):
    """Appends virtual samples to a converted model's input and strips them from its output.

    Only in training mode. Every floating tensor among the arguments that has the batch's leading size is extended;
    every tensor in the output must have the extended leading size.
    """

    def __init__(self, source: VirtualDataset, mark: VirtualMark) -> None:
        self.source = source
        self.mark = mark

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Extend the batch."""
        self.mark.rows = None
        if not module.training:
            return None
        refuse_jit_trace(self.source)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
        batch = next((t.shape[0] for t in tensors if t.is_floating_point() and t.ndim > 1), None)
        if batch is None:
            raise ValueError(
                "virtual samples need a floating (N, C, ...) tensor among the model's arguments, "
                f"got {[tuple(t.shape) for t in tensors]}"
            )
        if batch == 0:  # there is nothing to normalize
            self.mark.rows = 0
            return None
        for t in tensors:
            if t.shape[0] == batch and not (t.is_floating_point() and t.ndim > 1):
                raise ValueError(
                    f"virtual samples cannot extend the argument of shape {tuple(t.shape)} and dtype {t.dtype}, which "
                    "has one entry a sample; compute with it outside of the model, or choose sampled statistics"
                )

        def extend(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.shape[0] == batch:
                return torch.cat([leaf, self._draw(leaf)])
            return leaf

        extended = pytree.tree_map(extend, (args, kwargs))
        self.mark.rows = batch + self.source.samples
        return extended

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Take the virtual samples out of the output; also called, without one, after an exception."""
        rows, self.mark.rows = self.mark.rows, None
        if not rows or output is None:
            return None

        def strip_leaf(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                if leaf.ndim == 0 or leaf.shape[0] != rows:
                    raise ValueError(
                        f"virtual samples cannot be stripped from an output of shape {tuple(leaf.shape)}: its leading "
                        f"size is not the extended batch, {rows}; return one entry a sample, reduce outside"
                    )
                return leaf[: rows - self.source.samples]
            if leaf is None or isinstance(leaf, bool | int | float | str):
                return leaf
            raise TypeError(
                f"virtual samples cannot be stripped from an output of type {type(leaf).__name__}; return tensors in "
                "tuples, lists, dicts or types registered with torch.utils.pytree"
            )

        return pytree.tree_map(strip_leaf, output)

    def _draw(self, x: Tensor) -> Tensor:
        drawn = x.new_empty(self.source.samples, *x.shape[1:])
        match self.source.distribution:
            case "uniform":
                drawn.uniform_(-(3**0.5), 3**0.5)
            case "normal":
                drawn.normal_()
            case "matched":
                var, mean = torch.var_mean(x.detach(), [0, *range(2, x.ndim)], correction=0, keepdim=True)
                drawn = drawn.normal_() * var.sqrt() + mean
        if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            drawn = drawn.contiguous(memory_format=torch.channels_last)
        return drawn
