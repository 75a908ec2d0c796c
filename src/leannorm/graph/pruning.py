"""Prune: channels that are always zero or constant leave the model, and by choice those of the smallest gamma."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leannorm.graph import compare
from leannorm.graph.capture import Capture
from leannorm.graph.channel_selection import select
from leannorm.graph.removal import remove
from leannorm.records import PruningReport

if TYPE_CHECKING:
    from collections.abc import Iterable

# What the sum of fewer zeros may round differently; a wrong removal gives far more.
EXACT = compare.MAX_ERROR | {torch.float32: 1e-5}
LOSSY = dict.fromkeys(compare.MAX_ERROR, math.inf)


def prune(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    ratio: float = 0.0,
    min_channels: int = 1,
    round_to: int = 1,
    batches: Iterable[tuple[Any, Tensor]] | None = None,
) -> tuple[nn.Module, PruningReport]:
    r"""Remove channels that batch normalization makes constant from a copy of the model, on both sides of the graph.

    With :math:`\gamma = 0` a channel is :math:`act(\beta)` whatever its input: 0 behind a ReLU if :math:`\beta \leq 0`.
    Such channels leave the layer that makes them, batch normalization and all that handles channels one by one, and the
    layers that read them, whose biases (added where there is none) take up a constant other than 0. Outputs stay as
    they are; where they would not, the channels are kept: at paddings with zeros, where a residual addition joins them
    with channels that are not constant, where code mixes, selects or counts channels.

    With a ``ratio`` (network slimming) those channels follow whose :math:`|\gamma|` is smallest over the whole network,
    as if their gamma were 0. Channels that can only go together, as along residual connections, go by their largest
    :math:`|\gamma|`. The report states what that costs.

    Args:
        model: any module that ``torch.export`` captures; it is looked at in eval mode and never changed.
        example_inputs: a tensor, or the tuple of positional arguments, to capture and to compare on.
        ratio: remove up to this share of all channels of batch normalization, in [0, 1); 0 removes what is exact only.
        min_channels: each layer keeps at least so many.
        round_to: each layer keeps a multiple of so many, or all it has: kernels work on 8 or 16 channels at a time, and
            odd counts can cost more than the channels that went.
        batches: pairs of inputs (a tensor, or the tuple of arguments) and labels (N,), to state accuracies on.

    Returns:
        ``(pruned, report)``: a module of the same classes with smaller layers, in the modes of the original. Each batch
        normalization that loses channels is in ``report.changes``; in ``report.refusals`` are those that keep constant
        channels (with a ``ratio``: any that cannot go), with the reason. ``report.layers`` has the sizes of all layers
        that changed.

    Raises:
        ValueError: if an argument is not what it should be.
        RuntimeError: if outputs differ by more than rounding explains (1e-5 in float32) after exact removal, or the
            pruned model does not run: its code counts channels in a way that does not show.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, arXiv 1708.06519.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    >>> with torch.no_grad():
    ...     _ = model[1].weight[:3].zero_()
    >>> pruned, report = prune(model, torch.randn(2, 3, 8, 8))
    >>> pruned[0].out_channels, pruned[1].num_features, pruned[3].in_channels, report.changes[0].action
    (5, 5, 5, '3 of 8 channels removed: 3 always zero')
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), a share of the channels, got {ratio}")
    if min_channels < 1:
        raise ValueError(f"min_channels must be at least 1, got {min_channels}: a layer without channels cannot run")
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}: give 8 or 16 for speed, 1 for all that can go")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    options = {"ratio": ratio, "min_channels": min_channels, "round_to": round_to}
    original = copy.deepcopy(model).eval()
    with torch.no_grad():
        capture = Capture(torch.export.export(original, inputs))
    try:
        pruned, report = _pruned(model, original, capture, inputs, options, trusted=True)
    except RuntimeError:  # sizes that looked computed are written in the code
        pruned, report = _pruned(model, original, capture, inputs, options, trusted=False)
    if batches is not None:
        before, after = _accuracies((original, pruned), batches)
        report = dataclasses.replace(report, accuracy_before=before, accuracy_after=after)
    for before, after in zip(model.modules(), pruned.modules(), strict=True):
        after.training = before.training
    return pruned, report


def _pruned(
    model: nn.Module,
    original: nn.Module,
    capture: Capture,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    *,
    trusted: bool,
) -> tuple[nn.Module, PruningReport]:
    """The pruned model in eval mode, compared with the original."""
    selected = select(original, capture, trusted=trusted, **options)
    pruned = copy.deepcopy(model).eval()
    layers = remove(pruned, selected.groups, selected.gone)
    try:
        error = compare.require_equal(original, pruned, inputs, {}, EXACT if selected.is_exact else LOSSY)
    except compare.DifferentError:
        raise
    except Exception as raised:  # whatever the model raises
        reason = str(raised).strip().partition("\n")[0]
        raise RuntimeError(
            f"the pruned model does not run ({type(raised).__name__}: {reason}): its code counts channels in a way "
            "that does not show in its graph; keep the original"
        ) from raised
    norms = selected.groups.norms
    return pruned, PruningReport(
        changes=selected.changes(),
        refusals=selected.refusals(whole=options["ratio"] > 0),
        layers=layers,
        channels_before=sum(len(layer.outputs.members) for layer in norms),
        channels_after=sum(int((~selected.gone[layer.outputs.members]).sum()) for layer in norms),
        parameters_before=sum(parameter.numel() for parameter in original.parameters()),
        parameters_after=sum(parameter.numel() for parameter in pruned.parameters()),
        relative_error=error,
    )


@torch.no_grad()
def _accuracies(models: tuple[nn.Module, ...], batches: Iterable[tuple[Any, Tensor]]) -> tuple[float, ...]:
    correct, samples = [0] * len(models), 0
    for inputs, labels in batches:
        samples += len(labels)
        for i, model in enumerate(models):
            logits = compare.run(model, (inputs,) if isinstance(inputs, Tensor) else tuple(inputs))
            correct[i] += int((logits.argmax(1) == labels).sum())
    if not samples:
        raise ValueError("batches hold no samples to state an accuracy on: give an iterable that is not used up")
    return tuple(count / samples for count in correct)
