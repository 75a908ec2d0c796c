"""Channels cut out of the layers of a model, and what they always were put into the biases of their readers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from leannorm.graph.channel_groups import channel_sums
from leannorm.records import PrunedLayer

if TYPE_CHECKING:
    from leannorm.graph.channel_groups import ChannelGroups, Reading


def remove(model: nn.Module, groups: ChannelGroups, gone: Tensor) -> tuple[PrunedLayer, ...]:
    """Cut channels out of a model's layers, in place.

    Args:
        model: a copy of the model whose channels are given; its layers get new parameters and sizes.
        groups: the channels.
        gone: for each number of a channel whether it goes.

    Returns:
        The layers that got smaller, in the order of the graph.
    """
    changed = []
    for reading in groups.readings:
        inputs = None if reading.inputs is None else ~gone[reading.inputs.members]
        outputs = ~gone[reading.outputs.members]
        if not outputs.all() or (inputs is not None and not inputs.all()):
            changed.append(_cut_affine(model, reading, inputs, outputs))
    for layer in groups.layers:
        kept = ~gone[layer.outputs.members]
        if not kept.all():
            changed.append(_cut_per_channel(model, layer.layer, kept))
    return tuple(changed)


def _cut_affine(model: nn.Module, reading: Reading, inputs: Tensor | None, outputs: Tensor) -> PrunedLayer:
    target = reading.target
    layer = model.get_submodule(reading.layer)
    assert isinstance(layer, _ConvNd | nn.Linear)
    weight = layer.weight
    if inputs is None:
        inputs = torch.ones(weight.shape[0 if target.inputs_first else 1] * target.groups, dtype=torch.bool)
    elif target.groups == 1:
        constants = torch.where(inputs, 0.0, reading.inputs.constants)  # pyright: ignore[reportOptionalMemberAccess]
        if constants.any():
            _add_to_bias(layer, channel_sums(target, weight) @ constants)
    first, second = (inputs, outputs) if target.inputs_first else (outputs, inputs)
    cut = weight.detach()[first.to(weight.device)]
    if target.groups == 1:
        cut = cut[:, second.to(weight.device)]
    layer.weight = _like(weight, cut)
    if layer.bias is not None:
        layer.bias = _like(layer.bias, layer.bias.detach()[outputs.to(layer.bias.device)])
    before, after = (len(inputs), len(outputs)), (int(inputs.sum()), int(outputs.sum()))
    if isinstance(layer, nn.Linear):
        layer.in_features, layer.out_features = after
    else:
        layer.in_channels, layer.out_channels = after
        layer.groups = target.groups * after[0] // before[0] if target.groups > 1 else 1
    return PrunedLayer(reading.layer, before[0], after[0], before[1], after[1])


def _add_to_bias(layer: _ConvNd | nn.Linear, offsets: Tensor) -> None:
    if not offsets.any():
        return
    if layer.bias is not None:
        offsets = offsets + layer.bias.detach().double().cpu()
    layer.bias = _like(layer.weight, offsets)


def _cut_per_channel(model: nn.Module, name: str, kept: Tensor) -> PrunedLayer:
    layer = model.get_submodule(name)
    for field, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        if tensor.ndim == 1:  # not the number of batches
            cut = tensor.detach()[kept.to(tensor.device)]
            setattr(layer, field, _like(tensor, cut) if isinstance(tensor, nn.Parameter) else cut)
    channels = int(kept.sum())
    if isinstance(layer, nn.PReLU):
        layer.num_parameters = channels
    else:
        assert isinstance(layer, _BatchNorm)
        layer.num_features = channels
    return PrunedLayer(name, len(kept), channels, len(kept), channels)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    """A parameter with the dtype, device, memory order and ``requires_grad`` of another."""
    nhwc = old.ndim == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if nhwc and new.ndim == 4 else torch.contiguous_format
    made = new.to(old.device, old.dtype, copy=True, memory_format=order)
    return nn.Parameter(made, requires_grad=old.requires_grad)
