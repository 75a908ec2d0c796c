"""Capture a module with ``torch.export`` so that the graph takes any batch."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from leannorm.graph.capture import Capture, value_of
from leannorm.graph.compare import run
from leannorm.records import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import GraphModule

T = TypeVar("T")


def export(
    model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any = None
) -> tuple[ExportedProgram, tuple[Refusal, ...]]:
    """Export a module; unless ``dynamic_shapes`` are given, dimension 0 of each input tensor is left free.

    torch.export takes a size of 1 for a constant, so that an example of one sample is exported as two.

    Returns:
        The program, and a refusal for the module ``""`` where the batch had to be fixed to that of the
        example.
    """

    def build(program: ExportedProgram) -> tuple[GraphModule, ExportedProgram]:
        return as_module(Capture(program).program()), program  # a copy: running may write to buffers

    (_, program), refusals = export_as(build, model, inputs, dynamic_shapes)
    return program, refusals


def export_as(
    build: Callable[[ExportedProgram], tuple[GraphModule, T]],
    model: nn.Module,
    inputs: tuple[Any, ...],
    dynamic_shapes: Any = None,
) -> tuple[tuple[GraphModule, T], tuple[Refusal, ...]]:
    """What ``build`` makes of the program of `export`: a module and something else.

    The batch counts as free only if that module takes the example and three times its batch: guards do not show in
    sizes.
    """
    with torch.no_grad():  # else a no_grad block in the model becomes a graph of its own
        if dynamic_shapes is not None:
            return build(torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes)), ()
        program, reason = _with_free_batch(model, inputs)
        if program is not None:
            built = build(program)
            if any(module.training for module in model.modules()):  # such layers are refused anyway
                return built, ()
            try:
                _require_any_batch(built[0], inputs)
            except Exception as error:  # whatever the model raises
                reason = _first_line(error)
            else:
                return built, ()
        program = torch.export.export(model, inputs)
    sizes = ", ".join(sorted({str(size) for size in _batch_sizes(program).values() if isinstance(size, int)}))
    refusal = Refusal("", f"the batch stays {sizes}, as in the example: {reason}")
    return build(program), (refusal,)


def _with_free_batch(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[ExportedProgram | None, str]:
    """The program whose batch is free, or None and why there is none."""
    try:
        arguments = dict(inspect.signature(model.forward).bind(*inputs).arguments)
        shapes = pytree.tree_map(_batch, arguments)
        program = torch.export.export(model, pytree.tree_map(_double, inputs), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises whatever the model or its own tracing raises
        return None, _first_line(error)
    fixed = [name for name, size in _batch_sizes(program).items() if isinstance(size, int)]
    return (None, f"its code fixes the size of {', '.join(fixed)}") if fixed else (program, "")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _require_any_batch(module: GraphModule, inputs: tuple[Any, ...]) -> None:
    """Raise what the module raises for the example or for three times its batch.

    Shapes alone tell that in most modules. Those that fail without data (that they branch on, that a custom operator
    needs) are run.
    """
    larger = pytree.tree_map(lambda leaf: torch.cat([leaf] * 3) if _has_batch(leaf) else leaf, inputs)
    for batch in (inputs, larger):
        with torch.random.fork_rng():
            try:
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    run(module, pytree.tree_map_only(Tensor, mode.from_tensor, batch))
            except Exception:  # whatever the model, or fake tensors, raise
                run(module, batch)


def as_module(program: ExportedProgram) -> GraphModule:
    """The program as a callable module in eval mode; ``eval()`` is allowed and ``train()`` raises."""
    module = program.module()
    for child in module.modules():
        child.training = False
    module.eval = types.MethodType(_eval, module)
    module.train = types.MethodType(_train, module)
    return module


def _eval(module: nn.Module) -> nn.Module:
    return module


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode:
        raise NotImplementedError("a folded model has no training mode: train the model that it was made from")
    return module


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _double(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if _has_batch(leaf) and leaf.shape[0] == 1 else leaf


def _batch(leaf: Any) -> Any:
    return {0: Dim.AUTO} if _has_batch(leaf) else None


def _batch_sizes(program: ExportedProgram) -> dict[str, int | torch.SymInt]:
    names = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    values = {node.name: value_of(node) for node in program.graph.find_nodes(op="placeholder") if node.name in names}
    return {name: value.shape[0] for name, value in values.items() if value is not None and value.ndim > 0}
