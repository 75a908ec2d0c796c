"""Find in a traced graph the steps after a batch norm layer's call that its operator can compute; rewrite them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn

from leannorm.activation import Activation, activation_of, as_activation
from leannorm.nn.fused import activation_step, chain, is_identity, join, preactivation

_ADD, _ADD_INTO = {operator.add, torch.add, "add"}, {operator.iadd, "add_"}
_PLAIN = {
    "relu": {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"},
    "relu6": {F.relu6},
    "silu": {F.silu},
    "hardswish": {F.hardswish},
}
_CONCATENATE = {torch.cat, torch.concat, torch.concatenate}
_GELU, _LEAKY_RELU, _HARDTANH = {F.gelu}, {F.leaky_relu, F.leaky_relu_}, {F.hardtanh, F.hardtanh_}
_CLAMP = {torch.clamp, torch.clamp_, torch.clip, torch.clip_, "clamp", "clamp_", "clip", "clip_"}


@dataclass(frozen=True)
class Match:
    """A layer's call and the steps after it that the layer can compute.

    Args:
        call: the node that calls the layer.
        steps: a node to be added, the name of a module to be called, or an activation.
        nodes: the nodes of the steps, in their order; the last gives the value.
        action: what is fused, in words.
        before: the node before the layer that is computed in the same call, if there is one: it calls a convolution, or
            concatenates along channels.
    """

    call: fx.Node
    steps: tuple[fx.Node | str | Activation, ...] = ()
    nodes: tuple[fx.Node, ...] = ()
    action: str = ""
    before: fx.Node | None = None

    @property
    def last(self) -> fx.Node:
        """The node that gives the value."""
        return self.nodes[-1] if self.nodes else self.call


def convolution_before(
    found: Match, modules: Mapping[str, nn.Module], refusal: Callable[[nn.Module | None], str | None]
) -> fx.Node | str:
    """Find the convolution whose output a layer's call normalizes, or the reason why the call cannot compute it."""
    value = next(iter(found.call.args), None)
    module = modules[str(value.target)] if isinstance(value, fx.Node) and value.op == "call_module" else None
    reason = refusal(module)
    if reason is not None:
        return reason
    assert isinstance(value, fx.Node)
    if len(value.users) != 1:
        return f"the convolution's output is used {len(value.users)} times"
    if len(value.args) != 1 or value.kwargs or not isinstance(value.args[0], fx.Node):
        return "the convolution is called with further arguments"
    if not _reads_late(value, found.nodes):
        return "its convolution's input is used until the layer's last step"
    return value


def concatenation_before(found: Match) -> fx.Node | None:
    """Find the concatenation along channels that a layer's call normalizes, if the call can compute it."""
    value = next(iter(found.call.args), None)
    return value if _is_concatenation(value) and _reads_late(value, found.nodes) else None


def concatenation_at_end(graph: fx.Graph) -> fx.Node | None:
    """Find the concatenation along channels that is a graph's output."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    (value,) = output.args
    return value if _is_concatenation(value) and _reads_late(value, (output,)) else None


def _is_concatenation(value: Any) -> TypeGuard[fx.Node]:
    """Whether a value is a concatenation along channels that is used once."""
    if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in _CONCATENATE:
        return False
    given = dict(zip(("tensors", "dim"), value.args, strict=False)) | value.kwargs
    plain = given.keys() == {"tensors", "dim"} and given["dim"] == 1
    return bool(plain) and len(value.args) > 0 and len(value.users) == 1


def _reads_late(before: fx.Node, steps: tuple[fx.Node, ...]) -> bool:
    """Whether a node computed with the last step still finds its inputs: nothing may change them in between."""
    node = before.next
    while steps and node is not steps[-1]:
        shares = not set(before.all_input_nodes).isdisjoint(node.all_input_nodes)
        if shares and node not in steps and not _only_reads(node):
            return False
        node = node.next
    return True


def _only_reads(node: fx.Node) -> bool:
    """Whether a node surely leaves its arguments as they are; a module or a function of others may not."""
    if node.op == "call_method":
        return not str(node.target).endswith("_")
    if node.op != "call_function" or not isinstance(node.target, BuiltinFunctionType) or "out" in node.kwargs:
        return False
    name = node.target.__name__
    return not (name.endswith("_") or (name.startswith("i") and hasattr(operator, name[1:])))


def match(call: fx.Node, modules: Mapping[str, nn.Module], taken: Set[fx.Node]) -> Match | str:
    """Find the addition and the activation after a layer's call; none of them is a match too.

    Args:
        call: the node that calls the layer.
        modules: the block's modules by their qualified names.
        taken: additions that another layer computes.

    Returns:
        The match, or the reason why what follows cannot be the layer's.
    """
    steps: list[fx.Node | str | Activation] = []
    nodes: list[fx.Node] = []
    words: list[str] = []
    useful = 0
    value, added = call, None
    while True:
        if len(value.users) > 1 and not useful:
            return f"its output is used {len(value.users)} times"
        if len(value.users) != 1:
            break
        (user,) = value.users
        module = _called(user, value, modules)
        residual = _residual(user, value) if added is None and user not in taken else None
        activation = _activation(user, value) if module is None else activation_step(module)
        if module is not None and activation is None and activation_of(module) is not None:
            return f"{user.target}, the activation after it, has hooks"
        if activation is not None and added is not None and not _uninterrupted(added, user, nodes):
            break
        if activation is None and residual is None and not is_identity(module):
            break
        nodes.append(user)
        steps.append(residual or (str(user.target) if module is not None else activation) or "")
        value = user
        if residual is not None:
            added = user
            words.append("add")
        elif activation is not None:
            words.append(str(activation))
        if residual is not None or activation is not None:
            useful = len(steps)
        if activation is not None:
            break
    return Match(call, tuple(steps[:useful]), tuple(nodes[:useful]), " + ".join(["batch norm", *words]))


def give_parts(graph: fx.Graph, concatenation: fx.Node) -> None:
    """Let a graph whose output is a concatenation give the parts instead where its last argument is true."""
    apart = _further_argument(graph, "parts_stay_apart")
    with graph.inserting_before(concatenation):
        joined = graph.call_function(join, (concatenation.args[0], apart))
    concatenation.replace_all_uses_with(joined)
    graph.erase_node(concatenation)


def rewrite(graph: fx.Graph, matches: list[Match], tail: fx.Node | None, constants: list[Activation]) -> None:
    """Replace each match by one call of `leannorm.nn.fused.chain`.

    Args:
        graph: is changed.
        matches: with steps, with a node before the layer, or of a layer before a convolution.
        tail: the layer's call that gives the output, which is to take the steps after the block's own call; or None.
        constants: activations without a module; new ones are appended.
    """
    replaced: dict[fx.Node, fx.Node] = {}
    for found in matches:
        if found.call is tail:
            continue
        with graph.inserting_before(found.last):
            steps = [_step(graph, step, constants) for step in found.steps]
            fused = _chain(graph, found.call, tuple(replaced.get(step, step) for step in steps), found.before)
        found.last.replace_all_uses_with(fused)
        replaced[found.last] = fused
        for node in (*reversed(found.nodes), found.call, found.before):
            if node is not None:
                graph.erase_node(node)
    if tail is not None:
        before = next((found.before for found in matches if found.call is tail), None)
        steps = _further_argument(graph, "steps_after_the_block")
        with graph.inserting_before(tail):
            fused = _chain(graph, tail, steps, before)
        tail.replace_all_uses_with(fused)
        graph.erase_node(tail)
        if before is not None:
            graph.erase_node(before)
    for node in graph.nodes:
        if node.target is chain and len(node.args) == 4 and _is_preactivation(node.args[1], node):
            node.args[1].target = preactivation


def _further_argument(graph: fx.Graph, name: str) -> fx.Node:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]):
        return graph.placeholder(name)


def _is_preactivation(value: Any, user: fx.Node) -> bool:
    """Whether a node is a layer with at most its activation, which may as well be computed with the node's user."""
    if not isinstance(value, fx.Node) or value.target is not chain or len(value.args) != 3 or len(value.users) != 1:
        return False
    steps: Any = value.args[2]
    if not isinstance(steps, tuple) or any(step.op != "get_attr" for step in steps):
        return False
    node = value.next
    while node is not user:
        if not set(value.all_input_nodes).isdisjoint(node.all_input_nodes) and not _only_reads(node):
            return False
        node = node.next
    return True


def _chain(graph: fx.Graph, call: fx.Node, steps: Any, before: fx.Node | None) -> fx.Node:
    layer = graph.create_node("get_attr", str(call.target))
    if before is None:
        return graph.call_function(chain, (layer, call.args[0], steps))
    if before.op == "call_function":
        return graph.call_function(chain, (layer, before.args[0], steps))
    convolution = graph.create_node("get_attr", str(before.target))
    return graph.call_function(chain, (layer, before.args[0], steps, convolution))


def _step(graph: fx.Graph, step: fx.Node | str | Activation, constants: list[Activation]) -> fx.Node:
    if isinstance(step, fx.Node):
        return step
    if isinstance(step, str):
        return graph.create_node("get_attr", step)
    if step not in constants:
        constants.append(step)
    return graph.create_node("get_attr", f"_fused_activation_{constants.index(step)}")


def _called(user: fx.Node, value: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """Give the module that a node calls with the value alone."""
    if user.op != "call_module" or user.args != (value,) or user.kwargs:
        return None
    return modules[str(user.target)]


def _uninterrupted(first: fx.Node, last: fx.Node, own: list[fx.Node]) -> bool:
    """Whether nothing else, which could change the residual in place, is computed between two nodes."""
    node = first.next
    while node is not last:
        if node not in own and node.op != "get_attr":
            return False
        node = node.next
    return True


def _residual(user: fx.Node, value: fx.Node) -> fx.Node | None:
    """Give the node that is added to a value; not where the sum is written into that node's tensor.

    A parameter or buffer is not taken: it has no entry for each sample, and is broadcast.
    """
    if user.op == "call_module" or len(user.args) != 2 or user.kwargs not in ({}, {"alpha": 1}):
        return None
    first, second = user.args
    if user.target in _ADD and second is value:
        first, second = second, first
    if user.target not in _ADD | _ADD_INTO or first is not value or second is value:
        return None
    return second if isinstance(second, fx.Node) and second.op != "get_attr" else None


def _activation(user: fx.Node, value: fx.Node) -> Activation | None:
    """Give the activation that a function or method computes of a value."""
    if user.op not in ("call_function", "call_method"):
        return None
    for name, forms in _PLAIN.items():
        if user.target in forms and _arguments(user, value, inplace=False) is not None:
            return as_activation(name)
    if user.target in _GELU and (given := _arguments(user, value, approximate="none")) is not None:
        return as_activation("gelu_tanh" if given["approximate"] == "tanh" else "gelu")
    if user.target in _LEAKY_RELU and (given := _arguments(user, value, negative_slope=0.01, inplace=False)):
        return _valid("leaky_relu", given["negative_slope"])
    if user.target in _HARDTANH and (given := _arguments(user, value, min_val=-1.0, max_val=1.0, inplace=False)):
        return _valid("clamp", given["min_val"], given["max_val"])
    if user.target in _CLAMP and (given := _arguments(user, value, min=None, max=None)):
        return _valid("clamp", given["min"], given["max"])
    return None


def _arguments(user: fx.Node, value: fx.Node, **defaults: Any) -> dict[str, Any] | None:
    """Give the arguments after the value by their names; None for any that is unknown or computed."""
    first, *rest = user.args or (None,)
    given = dict(zip(defaults, rest, strict=False)) | user.kwargs
    if first is not value or len(rest) > len(defaults) or given.keys() - defaults.keys():
        return None
    if any(isinstance(argument, fx.Node) for argument in given.values()):
        return None
    return defaults | given


def _valid(kind: str, *parameters: Any) -> Activation | None:
    try:
        return Activation(kind, parameters)
    except (TypeError, ValueError):  # clamp with one bound, a slope that is not positive
        return None
