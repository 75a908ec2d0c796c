"""sparsity: how much of what comes out of the ReLUs behind batch normalization is zero."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from leannorm.graph import batch_norm
from leannorm.graph.capture import Capture, aten_name
from leannorm.graph.channel_flow import called, is_pointwise
from leannorm.graph.channel_groups import ChannelGroups
from leannorm.graph.export import as_module, export
from leannorm.records import LayerSparsity, Sparsity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from leannorm.graph.batch_norm import BatchNorm


def sparsity(model: nn.Module, batches: Iterable[Any], *, k: float = 3.0) -> Sparsity:
    r"""Measure the share of zeros behind batch normalization and ReLU, and count channels that are always zero.

    ReLU is any activation that makes 0 of all below 0 (ReLU, ReLU6, clamps at 0), right behind batch normalization or
    behind an addition to its result. By its parameters alone a channel with :math:`\gamma = 0, \beta \leq 0` is always
    zero, which `prune` can remove exactly; one with :math:`\beta + k |\gamma| \leq 0` is nearly always, if what
    batch normalization normalizes is near to normally distributed: with k = 3 in all but 0.14% of the elements.

    Args:
        model: any module that ``torch.export`` captures; it is looked at in eval mode and never changed.
        batches: inputs, or ``(inputs, labels)``; inputs are a tensor, or the tuple of positional arguments.
        k: standard deviations, of `LayerSparsity.nearly_zero`.

    Returns:
        A record with a line for each such layer, in the order of the graph.

    Raises:
        ValueError: if there are no batches, or ``k`` is negative.

    >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())
    >>> with torch.no_grad():
    ...     _ = model[0].weight[0].zero_()
    >>> (layer,) = sparsity(model, [torch.tensor([[3.0, -1.0], [4.0, 1.0]])]).layers
    >>> layer.zeros, layer.silent, layer.always_zero
    (0.75, 1, 1)
    """
    if not (k >= 0 and math.isfinite(k)):
        raise ValueError(f"k must be a finite number of standard deviations >= 0, got {k}")
    examined = copy.deepcopy(model).eval()
    counter, samples, layers = None, 0, {}
    with torch.no_grad():
        for batch in batches:
            inputs = _inputs(batch)
            if counter is None:
                program, _ = export(examined, inputs)
                layers = dict(_by_parameters(examined, Capture(program), k))
                counter = _Counter(as_module(program), list(layers))
            counter.run(*inputs)
            samples += len(inputs[0])
    if counter is None:
        raise ValueError("sparsity got no batches to measure on: give an iterable with at least one, not one used up")
    return Sparsity(samples, tuple(counter.measured(name, layer) for name, layer in layers.items()))


def _inputs(batch: Any) -> tuple[Any, ...]:
    """The positional arguments in a batch, without its labels."""
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


class _Counter(Interpreter):
    """Runs a graph, and counts the zeros of some of its values by channel.

    Args:
        module: the graph.
        names: of the nodes.
    """

    def __init__(self, module: GraphModule, names: list[str]) -> None:
        super().__init__(module)
        self.zeros: dict[str, Tensor] = {}
        self.elements = dict.fromkeys(names, 0)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.name in self.elements:
            zeros = (result == 0).transpose(0, 1).flatten(1).sum(1).cpu()
            self.zeros[n.name] = zeros + self.zeros.get(n.name, 0)
            self.elements[n.name] += result.numel()
        return result

    def measured(self, name: str, layer: LayerSparsity) -> LayerSparsity:
        """A layer's record with what was counted."""
        zeros, elements = self.zeros[name], self.elements[name]
        silent = int((zeros == elements // len(zeros)).sum()) if elements else 0
        return dataclasses.replace(layer, zeros=int(zeros.sum()) / max(elements, 1), silent=silent)


def _by_parameters(model: nn.Module, capture: Capture, k: float) -> Iterator[tuple[str, LayerSparsity]]:
    """For each ReLU behind batch normalization its node's name, and what the parameters tell."""
    values = ChannelGroups(model, capture).values
    for norm in batch_norm.find(capture.graph):
        for node, direct in _rectified(norm.node):
            constants = values[node].constants if node in values else torch.tensor([])
            yield (
                node.name,
                LayerSparsity(
                    layer=norm.module,
                    activation=called(node),
                    channels=len(constants),
                    zeros=0.0,
                    silent=0,
                    always_zero=int((constants == 0).sum()),
                    constant=int((constants.isfinite() & (constants != 0)).sum()),
                    nearly_zero=_nearly_zero(capture, norm, k) if direct else None,
                ),
            )


def _rectified(node: Node) -> Iterator[tuple[Node, bool]]:
    """The ReLUs that read a value, and whether they read it alone or added to another."""
    for user in node.users:
        if _is_rectifier(user):
            yield user, True
        elif aten_name(user) in ("add", "add_"):
            yield from ((reader, False) for reader in user.users if _is_rectifier(reader))


def _is_rectifier(node: Node) -> bool:
    """Whether a call makes 0 of every negative number, each by itself."""
    if not is_pointwise(node) or len(node.all_input_nodes) != 1 or node.args[0] is not node.all_input_nodes[0]:
        return False
    assert callable(node.target)
    negative = torch.tensor([-1e30, -1.0, -1e-30])
    result = node.target(negative.clone(), *node.args[1:], **node.kwargs)
    return isinstance(result, Tensor) and result.is_floating_point() and not result.any()


def _nearly_zero(capture: Capture, norm: BatchNorm, k: float) -> int | None:
    gamma, beta = capture.constant(norm.weight), capture.constant(norm.bias)
    if gamma is None or beta is None:  # 1 and 0: half of the elements are positive
        return 0
    return int((beta.double() + k * gamma.double().abs() <= 0).sum())
