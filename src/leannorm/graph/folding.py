"""Fold batch normalization away: apply the rules to a captured graph, then check the result."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from leannorm.graph import batch_norm, compare
from leannorm.graph.capture import Capture, module_name, operator_name
from leannorm.graph.export import as_module, export
from leannorm.graph.rules import RULES
from leannorm.records import Change, Refusal, TransformReport

if TYPE_CHECKING:
    from leannorm.graph.batch_norm import BatchNorm


@overload
def fold(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...], *, dynamic_shapes: Any = None
) -> tuple[nn.Module, TransformReport]: ...
@overload
def fold(
    model: ExportedProgram, example_inputs: Tensor | tuple[Any, ...] | None = None
) -> tuple[ExportedProgram, TransformReport]: ...
def fold(
    model: nn.Module | ExportedProgram,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> tuple[nn.Module | ExportedProgram, TransformReport]:
    """Fold batch normalization into the convolutions and linear layers before it, in a copy of the model.

    In eval mode ``gamma (W x + b - mean) / sqrt(var + eps) + beta`` is again ``W' x + b'``; the new
    constants are computed in float64 and stored in the layer's own dtype, under the layer's own names.
    Afterwards the folded model is run against the original on the example inputs.

    Args:
        model: a module in eval mode, or a program from ``torch.export.export``. It is never changed.
        example_inputs: a tensor or the tuple of positional arguments; for a program, None takes those that
            it was exported with. Dimension 0 of each tensor is taken for the batch.
        dynamic_shapes: as for ``torch.export.export``; the default leaves the batch free (any size, also
            where the example holds one sample) and fixes all other sizes. A program keeps its own.

    Returns:
        ``(folded, report)``. A module gives a callable module without training mode, a program gives a
        program. Each batch normalization in the graph is either in ``report.changes`` or in
        ``report.refusals``, with the reason; a refusal for the module ``""`` says that the batch could not
        be left free, and why.

    Raises:
        ValueError: if example inputs are missing, or ``dynamic_shapes`` are given for a program.
        RuntimeError: if the folded model's outputs differ from the original's by more than rounding explains.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise ValueError("dynamic_shapes is for modules: an exported program keeps the shapes that it has")
        kwargs: dict[str, Any] = {}
        if inputs is None:
            if model.example_inputs is None:
                raise ValueError("the program carries no example inputs: pass example_inputs to check the result on")
            inputs, kwargs = model.example_inputs
        capture = Capture(model)
        report = fold_capture(capture)
        folded = capture.program()
        if report.changes:
            # Copies, because running a program may write to its buffers.
            original, copy = (as_module(Capture(program).program()) for program in (model, folded))
            compare.require_equal(original, copy, inputs, kwargs)
        return folded, report
    if inputs is None:
        raise ValueError(
            "fold needs example_inputs to capture a module: a tensor, or the tuple of positional arguments"
        )
    program, refusals = export(model, inputs, dynamic_shapes)
    capture = Capture(program)
    report = fold_capture(capture)
    folded = as_module(capture.program())
    if report.changes:
        state = {name: tensor.clone() for name, tensor in model.named_buffers()}
        original = functools.partial(torch.func.functional_call, model, state)
        compare.require_equal(lambda *args: original(args), folded, inputs, {})
    return folded, TransformReport(report.changes, refusals + report.refusals)


def fold_capture(capture: Capture) -> TransformReport:
    """Apply the rules to every batch normalization of a captured graph, in place."""
    changes: list[Change] = []
    refusals: list[Refusal] = []
    for norm in batch_norm.find(capture.graph):
        outcome = _apply(capture, norm)
        if isinstance(outcome, Change):
            changes.append(outcome)
        else:
            refusals.append(outcome)
    refusals += batch_norm.never_folded(capture.graph)
    capture.erase_dead()
    for graph in capture.inner_graphs:
        reason = "it runs in a region that the graph calls (torch.cond, no_grad), which the rules do not enter"
        refusals += [Refusal(norm.module, reason) for norm in batch_norm.find(graph)]
    return TransformReport(tuple(changes), tuple(refusals))


def _apply(capture: Capture, norm: BatchNorm) -> Change | Refusal:
    if reason := batch_norm.refusal(capture, norm):
        return Refusal(norm.module, reason)
    reasons = []
    for rule in RULES:
        found = rule.match(capture, norm)
        if found is None:
            continue
        reason = rule.check(capture, norm, found)
        if reason is None:
            return Change(norm.module, rule.rewrite(capture, norm, found))
        reasons.append(reason)
    if not reasons:
        before = norm.input
        reasons.append(f"it follows {operator_name(before)} ({module_name(before)}), which cannot absorb it")
    return Refusal(norm.module, "; ".join(reasons))
