"""One captured graph under rewriting: what the rules read from it, and the ways in which they change it.

The rules of ``leannorm.graph.rules`` see a graph only through this file, so that they do not depend on how
it was captured.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

_HELD = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of an operator call by their names in its schema, with defaults; empty for other nodes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    schema = node.target._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    bound |= {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    return bound | node.kwargs


def set_arguments(node: Node, **changes: Any) -> None:
    """Change arguments of an operator call by their names in its schema."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound = arguments(node) | changes
    node.args = tuple(bound[a.name] for a in node.target._schema.arguments if not a.kwarg_only)
    node.kwargs = {a.name: bound[a.name] for a in node.target._schema.arguments if a.kwarg_only}


def operator_name(node: Node) -> str:
    """What a node calls: ``conv2d``, ``relu``, ``cat``; ``input`` for an input of the graph."""
    if node.op == "placeholder":
        return "input"
    if isinstance(node.target, torch._ops.OpOverload):
        if arguments(node).get("transposed") is True:
            return "transposed convolution"
        return node.target._schema.name.rpartition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def aten_name(node: Node) -> str:
    """Name of the ATen operator that a node calls, without its overload; empty for all other nodes."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.name.startswith("aten::"):
        return ""
    return node.target._schema.name.removeprefix("aten::")


def call_path(node: Node) -> str:
    """Qualified name of the module that called this node, with ``@k`` for its k-th further call; "" for the model."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    key, (path, _) = list(stack.items())[-1]  # the number of a further call is in the key, or in the path
    call = key.rpartition("@")[2] if "@" in key and "@" not in path else ""
    return f"{path}@{call}" if path and call else path


def module_name(node: Node) -> str:
    """Qualified name of the module that called this node; the node's own name where that is the model."""
    return call_path(node).partition("@")[0] or node.name


def layer_of(node: Node) -> str | None:
    """The call (as `call_path`) in the original whose result is this node's value, or None where rewrites changed it.

    The mark is where ``torch.export.save`` keeps it.
    """
    return node.meta.get("custom", {}).get("leannorm_layer", call_path(node)) or None


def mark_layer(node: Node, layer: str | None) -> None:
    """Say which call's result in the original a node's value is now; None for a value that the original never has."""
    node.meta["custom"] = node.meta.get("custom", {}) | {"leannorm_layer": layer or ""}


def value_of(node: Node) -> Tensor | None:
    """The fake tensor that tells a node's shape and dtype, or None where the node is not one tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


class Capture:
    """A rewritable copy of an exported program; the program given is never changed.

    Args:
        program: what ``torch.export.export`` returned, decomposed or not.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._source = program
        self._input_specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        constants = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
        self._lifted = set(constants)
        held = program.state_dict | constants
        self._values: dict[str, Tensor] = dict(held)
        self._changed: set[str] = set()
        self._written = set(program.graph_signature.buffers_to_mutate.values())
        self._written |= set(program.graph_signature.parameters_to_mutate.values())
        self.graph = Graph()
        copies: dict[Node, Node] = {}
        result = self.graph.graph_copy(program.graph, copies)
        self.graph.output(result).meta = program.graph.output_node().meta.copy()
        for source, copy in copies.items():
            copy.name = source.name  # a copy renames what is called like a builtin: ``input``

    @property
    def inner_graphs(self) -> tuple[Graph, ...]:
        """Graphs that this one calls: branches of ``torch.cond``, regions with another gradient mode."""
        modules = self._source.graph_module.modules()
        return tuple(m.graph for m in modules if isinstance(m, GraphModule) and m is not self._source.graph_module)

    def constant(self, node: Node | None) -> Tensor | None:
        """Value of a parameter, buffer or constant; None where the node is computed, given or written to."""
        if node is None or node.op != "placeholder":
            return None
        spec = self._input_specs[node.name]
        if spec.kind not in _HELD or spec.target in self._written or any(writes_to(user, node) for user in node.users):
            return None
        return self._values[str(spec.target)]

    def target(self, node: Node) -> str:
        """Qualified name under which a parameter, buffer or constant is kept."""
        return str(self._input_specs[node.name].target)

    def set_constant(self, node: Node, value: Tensor) -> None:
        """Give a parameter, buffer or constant another value of the same shape and dtype."""
        target = self.target(node)
        self._values[target] = _as(self._values[target], value)
        self._changed.add(target)

    def add_parameter(self, name: str, value: Tensor, like: Node) -> Node:
        """Add an input of the graph that holds a new value.

        Args:
            name: qualified name wanted for it; a number is appended where it is taken.
            value: the value.
            like: the parameter, buffer or constant beside which it is put; decides ``requires_grad`` and
                kind.
        """
        spec, target, number = self._input_specs[like.name], name, 0
        while target in self._values:
            number += 1
            target = f"{name}_{number}"
        self._values[target] = _as(self._values[self.target(like)], value)
        self._changed.add(target)
        if self.target(like) in self._lifted:
            self._lifted.add(target)
        with self.graph.inserting_after(like):
            node = self.graph.placeholder(f"{like.name.partition('_')[0]}_{target.replace('.', '_')}")
        node.target = node.name
        fake = value_of(like)
        assert fake is not None
        node.meta = like.meta | {"val": fake.new_empty(value.shape, dtype=value.dtype)}
        self._input_specs[node.name] = InputSpec(spec.kind, TensorArgument(node.name), target, spec.persistent)
        return node

    def replace(self, node: Node, replacement: Node) -> None:
        """Let all users of ``node`` (and of its first result, where it has several) read ``replacement``."""
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(replacement)
                self.graph.erase_node(user)
        node.replace_all_uses_with(replacement)
        self.graph.erase_node(node)

    def erase_dead(self) -> None:
        """Erase parameters and buffers that nothing in the graph reads."""
        for node in self.graph.find_nodes(op="placeholder"):
            spec = self._input_specs[node.name]
            if spec.kind in _HELD and not node.users and spec.target not in self._written:
                self.graph.erase_node(node)

    @staticmethod
    def written_after(node: Node, since: Node) -> Node | None:
        """A call behind ``since`` that writes in place to a tensor that may share its memory with ``node``."""
        shared, found = [node], {node}
        while shared:
            one = shared.pop()
            sources = [one.args[0]] if may_alias(one) and one.args else []
            near = [n for n in (*sources, *(u for u in one.users if may_alias(u, one))) if isinstance(n, Node)]
            shared += [n for n in near if n not in found]
            found.update(near)
        writers = {user for one in found for user in one.users if writes_to(user, one)}
        return next((writer for writer in writers if since < writer), None)

    def program(self) -> ExportedProgram:
        """The rewritten program: same inputs, outputs and dynamic shapes, no memory shared with the source."""
        source = self._source
        specs = [self._input_specs[node.name] for node in self.graph.find_nodes(op="placeholder")]
        results: Any = self.graph.output_node().args[0]
        outputs = [
            dataclasses.replace(spec, arg=TensorArgument(result.name)) if isinstance(spec.arg, TensorArgument) else spec
            for spec, result in zip(source.graph_signature.output_specs, results, strict=True)
        ]
        held = {spec.target for spec in specs}
        values = {
            name: value if name in self._changed else _as(value, value.clone())
            for name, value in self._values.items()
            if name in held
        }
        objects = {name: value for name, value in source.constants.items() if not isinstance(value, Tensor)}
        names = {node.name for node in self.graph.nodes}
        calls = [_call_entry(entry, names) for entry in source.module_call_graph]
        program = ExportedProgram(
            root=source.graph_module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(specs, outputs),
            state_dict={name: value for name, value in values.items() if name not in self._lifted},
            range_constraints=dict(source.range_constraints),
            module_call_graph=calls,
            example_inputs=source.example_inputs,
            constants=objects | {name: value for name, value in values.items() if name in self._lifted},
            verifiers=source.verifiers,
        )
        program.graph_module.meta.update(source.graph_module.meta)
        return program


def _call_entry(entry: ModuleCallEntry, names: set[str]) -> ModuleCallEntry:
    """A module's entry in the call graph, without a signature that names a node which a rule removed."""
    signature = entry.signature
    if signature is None or entry.fqn == "":
        return entry
    kept = all(arg.name in names for arg in (*signature.inputs, *signature.outputs) if isinstance(arg, TensorArgument))
    return entry if kept else dataclasses.replace(entry, signature=None)


def writes_to(user: Node, node: Node) -> bool:
    """Whether a call changes the tensor of ``node`` in place."""
    bound = arguments(user)
    if bound.get("training") is True:  # running statistics are written without a mark in the operator's schema
        return node in (bound.get("running_mean"), bound.get("running_var"))
    if not isinstance(user.target, torch._ops.OpOverload):
        return False
    written = (a.name for a in user.target._schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    return any(bound.get(name) is node for name in written)


def may_alias(node: Node, given: Node | None = None) -> bool:
    """Whether a call may return an argument, or a view of one: its first, or, where ``given`` is named, that."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema = node.target._schema
    if "dropout" not in schema.name and all(result.alias_info is None for result in schema.returns):
        return False
    bound = arguments(node)
    shared = [bound.get(argument.name) for argument in schema.arguments if argument.alias_info is not None]
    return given is None or not shared or any(given is s or (isinstance(s, list) and given in s) for s in shared)


def _as(old: Tensor, new: Tensor) -> Tensor:
    new = new.detach()
    return torch.nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
