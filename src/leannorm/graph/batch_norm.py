"""Batch normalization as a graph holds it: where it is, what it holds, what keeps every rule away."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from leannorm.graph.capture import arguments, aten_name, module_name, value_of
from leannorm.nn import METHOD_LAYERS
from leannorm.records import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.fx import Graph, Node

    from leannorm.graph.capture import Capture


_OTHERS = {
    "group_norm": "group normalization",
    "native_group_norm": "group normalization",
    "instance_norm": "instance normalization",
    "layer_norm": "layer normalization",
    "native_layer_norm": "layer normalization",
    "rms_norm": "RMS normalization",
    "_fused_rms_norm": "RMS normalization",
}


@dataclass(frozen=True)
class BatchNorm:
    """One call of batch normalization in a graph.

    ``training`` says that the call normalises by the statistics of its input.
    """

    module: str
    node: Node
    input: Node
    weight: Node | None
    bias: Node | None
    running_mean: Node | None
    running_var: Node | None
    eps: float
    training: bool

    def scale_and_shift(self, capture: Capture) -> tuple[Tensor, Tensor]:
        """The affine map per channel that this call is in eval mode; see :func:`scale_and_shift`."""
        weight, bias = (None if node is None else capture.constant(node) for node in (self.weight, self.bias))
        mean, var = capture.constant(self.running_mean), capture.constant(self.running_var)
        assert mean is not None
        assert var is not None
        return scale_and_shift(weight, bias, mean, var, self.eps)


def scale_and_shift(
    weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The affine map per channel that batch normalization is in eval mode, in float64.

    ``gamma (x - mean) / sqrt(var + eps) + beta  =  scale x + shift`` with ``scale = gamma / sqrt(var +
    eps)`` and ``shift = beta - scale mean``; a missing gamma is 1, a missing beta 0.

    Returns:
        ``(scale, shift)``, each of shape ``(C,)``.
    """
    scale = torch.rsqrt(running_var.double() + eps)
    if weight is not None:
        scale = scale * weight.double()
    shift = -scale * running_mean.double()
    return scale, shift if bias is None else shift + bias.double()


def find(graph: Graph) -> Iterator[BatchNorm]:
    """All calls of batch normalization in a graph, in its order: every form of ATen's, and leannorm's own.

    leannorm's layers call operators of their own only while training, several for one layer: the first
    stands for it.
    """
    seen: set[str] = set()
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = node.target._schema.name
        module = module_name(node)
        if name.startswith("leannorm::"):
            if module not in seen:
                seen.add(module)
                yield BatchNorm(module, node, node.all_input_nodes[0], None, None, None, None, 0.0, training=True)
        elif name.startswith("aten::") and "batch_norm" in name and "backward" not in name:
            bound = arguments(node)
            evaluates = "no_training" in name or "no_update" in name
            yield BatchNorm(
                module=module,
                node=node,
                input=bound["input"],
                weight=bound.get("weight"),
                bias=bound.get("bias"),
                running_mean=bound.get("running_mean"),
                running_var=bound.get("running_var"),
                eps=bound["eps"] if "eps" in bound else bound.get("epsilon", 0.0),
                training=bound.get("training", not evaluates),
            )


def never_folded(graph: Graph) -> Iterator[Refusal]:
    """The layers of methods that are more than an affine map per channel in eval mode, each with the reason."""
    reasons = {_class_name(layer): layer.why_not_folded for layer in METHOD_LAYERS.values() if layer.why_not_folded}
    seen: set[str] = set()
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        name = module_name(node)
        if stack and name not in seen and (reason := reasons.get(_class_name(stack[-1][1]))):
            seen.add(name)
            yield Refusal(name, reason)


def _class_name(layer: type | str) -> str:
    return layer if isinstance(layer, str) else f"{layer.__module__}.{layer.__qualname__}"


def find_others(graph: Graph) -> Iterator[tuple[str, str]]:
    """Modules that normalise by statistics of their own input in eval mode too, and what they are."""
    for node in graph.nodes:
        if kind := _OTHERS.get(aten_name(node)):
            yield module_name(node), kind


def with_one_result(capture: Capture, norm: BatchNorm) -> BatchNorm:
    """The same call as ``aten.batch_norm``, where it is a form that returns statistics beside its result."""
    value = value_of(norm.input)
    if value_of(norm.node) is not None or value is None:
        return norm
    held = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    with capture.graph.inserting_before(norm.node):
        node = capture.graph.call_function(
            torch.ops.aten.batch_norm.default, (norm.input, *held, False, 0.0, norm.eps, False)
        )
    node.meta = norm.node.meta | {"val": value}
    capture.replace(norm.node, node)
    return dataclasses.replace(norm, node=node)


def refusal(capture: Capture, norm: BatchNorm) -> str | None:
    """Why no rule can take this call at all, or None."""
    node = norm.node
    if norm.training and not str(node.target).startswith("leannorm") and norm.running_mean is None:
        return "it keeps no running statistics (track_running_stats=False): recalibrate or train it with them"
    if norm.training:
        return "it normalises by batch statistics (training mode): call model.eval() first"
    for field in ("running_mean", "running_var", "weight", "bias"):
        source = getattr(norm, field)
        if source is not None and capture.constant(source) is None:
            return f"its {field} is not constant: the graph computes it, receives it or writes to it"
    if any(user.target is operator.getitem and user.args[1] != 0 and user.users for user in node.users):
        return "its saved statistics are read elsewhere"
    if not all(torch.isfinite(constant).all() for constant in norm.scale_and_shift(capture)):
        return "its running statistics or parameters are not finite, or a running variance is below -eps"
    return None
