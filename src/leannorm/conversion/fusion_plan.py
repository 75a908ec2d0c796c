"""Decide for each module of a model whether and how it is fused; nothing is changed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeGuard

from torch import fx, nn
from torch.fx.graph_module import _format_import_block  # fx writes its own pickles with it
from torch.nn.modules.batchnorm import _BatchNorm
from torch.package.importer import sys_importer

from leannorm.activation import Activation, activation_of
from leannorm.conversion.fusion_rules import (
    Match,
    concatenation_at_end,
    concatenation_before,
    convolution_before,
    give_parts,
    match,
    rewrite,
)
from leannorm.conversion.fusion_trace import UntraceableError, positional_parameters, trace
from leannorm.nn import folding
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.fused import activation_step, end_of_steps, fused_class, is_free, is_observed, layers_of
from leannorm.nn.rewrite import Rewrite, children_of_containers


@dataclass
class Plan:
    """What is to be fused.

    Args:
        classes: modules that take a fused class, with their rewrite (None for a Sequential).
        actions: what the call of a layer computes, in words.
        reasons: why a layer is left alone.
        untraceable: modules without a graph, and why.
        convolution: as of `leannorm.fuse`.
        convolutions: layers whose call computes the convolution before it too.
        apart: why a layer's convolution is not computed in its call.
        joined: layers with a concatenation before them.
    """

    convolution: bool | None = None
    classes: dict[nn.Module, Rewrite | None] = field(default_factory=dict)
    actions: dict[nn.Module, str] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)
    untraceable: dict[nn.Module, str] = field(default_factory=dict)
    convolutions: set[SampledBatchNorm] = field(default_factory=set)
    apart: dict[nn.Module, str] = field(default_factory=dict)
    joined: set[SampledBatchNorm] = field(default_factory=set)
    _tails: dict[nn.Module, Rewrite] = field(default_factory=dict)
    _before_layers: set[nn.Module] = field(default_factory=set)  # modules that a Sequential calls right before one

    @classmethod
    def of(cls, model: nn.Module, *, convolution: bool | None = None) -> Plan:
        """Plan the fusing of a model whose BN layers are leannorm's where they can be."""
        plan = cls(convolution)
        for module in filter(is_sequential, model.modules()):
            plan._before_layers.update(one for one, other in _pairs(module) if _first_layer(other) is not None)
        for module in reversed(list(model.modules())):  # parts before what they are part of
            if isinstance(module, SampledBatchNorm):
                plan._add_layer(module)
            elif is_sequential(module):
                plan._add_sequential(module)
            elif has_own_forward(module) and any(isinstance(part, _BatchNorm) for part in module.modules()):
                try:
                    plan._add_block(module)
                except UntraceableError as error:
                    plan.untraceable[module] = str(error)
        for layer in plan.joined:  # exact statistics read it twice: it is written for them
            if folding.refusal_of_statistics(layer.statistics) is None:
                plan.actions[layer] = f"concatenation + {plan.actions.get(layer, 'batch norm')}"
        return plan

    def _add_layer(self, layer: SampledBatchNorm) -> None:
        if is_observed(layer):
            self.reasons[layer] = "it has hooks, which see its output"
        elif layer.activation is not None:
            self.actions[layer] = f"batch norm + {layer.activation}"

    def _add_sequential(self, module: nn.Module) -> None:
        for before, after in _pairs(module):
            planned, layer = self.classes.get(before), _first_layer(after)
            if layer is not None and planned is not None and planned.gives_parts:
                self.joined.add(layer)
                self.classes[module] = None
                while after is not layer:  # Sequentials that begin with it
                    self.classes[after] = None
                    after = layers_of(after)[0]
        layers = layers_of(module)
        for at, layer in enumerate(layers):
            if self._may_fold(layer):
                reason = self._refusal(layers[at - 1] if at else None)
                self._fold(layer, reason)
                if reason is None:
                    self.classes[module] = None
            if self._tail(layer) is None:
                continue
            end = end_of_steps(layers, at + 1)
            if end > at + 1 and (activation := activation_step(layers[end - 1])) is not None:
                self._use(layer, f"batch norm + {activation}")
                self.classes[module] = None
            elif (
                isinstance(layer, SampledBatchNorm)
                and at + 1 < len(layers)
                and activation_of(layers[at + 1]) is not None
            ):
                self.reasons[layer] = "the activation after it has hooks"

    def _add_block(self, block: nn.Module) -> None:
        if block not in self._before_layers and not any(map(self._is_callable, _callable_parts(block))):
            return
        modules = dict(block.named_modules(remove_duplicate=False))
        graphs = _graphs(block)
        matches, used, alone, apart = {}, {}, {}, {}
        for kinds, graph in graphs.items():
            matches[kinds] = self._matches(graph, modules, alone, apart)
            used |= {modules[str(found.call.target)]: found.action for found in matches[kinds] if found.steps}
        last = {kinds: self._output(graph, modules) for kinds, graph in graphs.items()}
        tails = {str(call.target) if call is not None else None for call in last.values()}
        tail = tails.pop() if len(tails) == 1 else None
        constants: list[Activation] = []
        for kinds, graph in graphs.items():
            rewrite(graph, matches[kinds], last[kinds] if tail is not None else None, constants)
        ends = [concatenation_at_end(graph) for graph in graphs.values()]
        gives = block in self._before_layers and not is_observed(block) and None not in ends
        for graph, end in zip(graphs.values(), ends, strict=True):
            if gives and end is not None:
                give_parts(graph, end)
        planned = Rewrite(
            tuple((kinds, _source(graph)) for kinds, graph in graphs.items()),
            *positional_parameters(type(block).forward),
            tuple(constants),
            tail,
            gives,
            children_of_containers(block),
        )
        try:
            fused_class(type(block), planned)
        except Exception as error:
            raise UntraceableError(f"its fused forward cannot be made: {error}") from error
        if tail is not None:
            self._tails[block] = planned
        if gives or any(matches.values()):
            self.classes[block] = planned
        for layer, reason in alone.items():
            self.actions.pop(layer, None)
            if reason is not None:
                self.reasons[layer] = reason
        for layer, action in used.items():
            self._use(layer, action)
        for layer, reason in apart.items():
            self._fold(layer, reason)

    def _matches(
        self,
        graph: fx.Graph,
        modules: dict[str, nn.Module],
        alone: dict[nn.Module, str | None],
        apart: dict[SampledBatchNorm, str | None],
    ) -> list[Match]:
        """Find the matches of a graph, layers before modules that end in one, the last call first.

        ``alone`` gets the layers that the graph calls without steps, with the reason if something hinders; ``apart``
        those whose call may compute the convolution before it, with the reason if none of their calls does.
        """
        calls = [node for node in graph.nodes if node.op == "call_module"]
        calls = [node for node in reversed(calls) if self._is_callable(modules[str(node.target)])]
        calls.sort(key=lambda node: not isinstance(modules[str(node.target)], SampledBatchNorm))
        matches, taken, convolved = [], set(), set()
        for call in calls:
            layer, found = modules[str(call.target)], Match(call)
            if self._tail(layer) is not None:
                found = match(call, modules, taken)
                if isinstance(layer, SampledBatchNorm) and (isinstance(found, str) or not found.steps):
                    alone[layer] = found if isinstance(found, str) else None
            found = Match(call) if isinstance(found, str) else found
            if self._may_fold(layer):
                before = convolution_before(found, modules, self._refusal)
                if isinstance(before, fx.Node):
                    found, apart[layer] = dataclasses.replace(found, before=before), None
                    convolved.add(before.args[0])
                else:
                    apart.setdefault(layer, before)
            if is_free(layer) and (before := concatenation_before(found)) is not None:
                found = dataclasses.replace(found, before=before)
                self.joined.add(layer)
            if found.steps or found.before is not None or (call in convolved and is_free(layer)):
                matches.append(found)
                taken.update(found.nodes)
        return matches

    def _fold(self, layer: SampledBatchNorm, reason: str | None) -> None:
        """Note that a layer's call computes the convolution before it, or why not."""
        self.convolutions.discard(layer)
        self.apart.pop(layer, None)
        if reason is None:
            self.convolutions.add(layer)
            reason = folding.refusal_of_statistics(layer.statistics)
        if reason is not None:
            self.apart[layer] = reason

    def _is_callable(self, module: nn.Module) -> bool:
        """Whether the call of a module can take steps, or what comes before it."""
        return self._tail(module) is not None or is_free(module)

    def _may_fold(self, module: nn.Module) -> TypeGuard[SampledBatchNorm]:
        return self.convolution is not False and is_free(module)

    def _refusal(self, module: nn.Module | None) -> str | None:
        """Give the reason why the batch norm after a module does not compute it, or None."""
        if self.convolution is None and not folding.may_pay(module):
            return "it is neither depthwise nor pointwise; leannorm.fuse(model, convolution=True) asks for all"
        return folding.refusal(module)

    def _output(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> fx.Node | None:
        """Give the layer's call that is the output, if it is."""
        (value,) = next(node for node in reversed(graph.nodes) if node.op == "output").args
        if not isinstance(value, fx.Node) or value.op != "call_module" or len(value.users) != 1:
            return None
        if len(value.args) != 1 or value.kwargs or self._tail(modules[str(value.target)]) is None:
            return None
        return value

    def _tail(self, module: nn.Module | None) -> SampledBatchNorm | None:
        """Give the layer that can take the steps after a module's call."""
        if module is None or is_observed(module):
            return None
        if isinstance(module, SampledBatchNorm):
            return module if module.activation is None else None
        if is_sequential(module):
            return self._tail(next(reversed(module._modules.values()), None))
        if module in self._tails:
            return self._tail(module.get_submodule(self._tails[module].tail or ""))
        return None

    def _use(self, module: nn.Module, action: str) -> None:
        """Let a module take steps: it, and its last part down to the layer, become fused."""
        while not isinstance(module, SampledBatchNorm):
            if is_sequential(module):
                self.classes[module] = None
                module = next(reversed(list(module.children())))
            else:
                self.classes[module] = self._tails[module]
                module = module.get_submodule(self._tails[module].tail or "")
        self.actions[module] = action


def is_sequential(module: nn.Module) -> bool:
    """Whether a module computes what `torch.nn.Sequential` does."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _pairs(sequential: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Give what is called one after the other."""
    return pairwise(layers_of(sequential))


def _first_layer(module: nn.Module) -> SampledBatchNorm | None:
    """Give the layer that a module begins with, if nothing from outside sees what it is called with."""
    if is_sequential(module) and not is_observed(module):
        layers = layers_of(module)
        return _first_layer(layers[0]) if layers else None
    return module if is_free(module) else None


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is Python code of somebody's own."""
    return not type(module).__module__.startswith("torch.") and type(module).forward is not nn.Module.forward


def _callable_parts(block: nn.Module) -> Iterator[nn.Module]:
    """Give the modules that a block's forward may call itself: its children, and those in its containers."""
    for child in block.children():
        yield child
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or is_sequential(child):
            yield from _callable_parts(child)


def _graphs(block: nn.Module) -> dict[tuple[str, ...], fx.Graph]:
    """Trace a block for each number of tensors that its forward takes, and for one list."""
    if "forward" in block.__dict__:
        raise UntraceableError("its forward was set on the instance")
    names, required = positional_parameters(type(block).forward)
    calls = [("tensor",) * count for count in range(required, len(names) + 1)]
    if required == 1:
        calls.append(("list",))
    graphs, errors = {}, []
    for kinds in calls:
        try:
            graphs[kinds] = trace(block, kinds)
        except UntraceableError as error:
            errors.append(error)
    if not graphs:
        raise errors[0]
    for kinds, graph in graphs.items():
        if _source(graph) != _source(trace(block, kinds, children_train=False)):
            raise UntraceableError("its forward reads the training mode of its children")
    return graphs


def _source(graph: fx.Graph) -> str:
    code = graph.python_code("self")
    try:
        imports = _format_import_block(code.globals, sys_importer)
    except Exception as error:
        raise UntraceableError(f"its forward calls a function that cannot be imported: {error}") from error
    return f"{imports}\n{code.src}"
