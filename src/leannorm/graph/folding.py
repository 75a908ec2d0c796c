"""Fold batch normalization away: apply the rules to a captured graph, then check the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn
from torch.export import ExportedProgram

from leannorm.graph import activated_tables, batch_norm, compare
from leannorm.graph.absorption import Folding, Table
from leannorm.graph.capture import Capture
from leannorm.graph.export import as_module, export_as
from leannorm.graph.rules import ABSORBING, parallel, table
from leannorm.records import Change, Refusal, TransformReport

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


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
    """Take batch normalization out of a copy of the model: into its neighbours, or into constants per channel.

    In eval mode batch normalization is ``scale x + shift`` per channel, with ``scale = gamma / sqrt(var + eps)`` and
    ``shift = beta - scale mean``. Convolutions and linear layers before it take that up, else those after it, also
    through pooling, reshapes, concatenations and additions, as far as that is exact; parallel convolutions of one
    input, as RepVGG has them, become one. What nothing takes up becomes a multiply-add with precomputed constants; in
    a folded module that is one operator with the addition and the activation behind it.
    Constants are computed in float64 and stored in the layer's own dtype, under the layer's own names. Afterwards the
    folded model is run against the original on the example inputs.

    Args:
        model: a module in eval mode (a ``torch.fx.GraphModule`` is one), or a program from ``torch.export.export``. It
            is never changed.
        example_inputs: a tensor or the tuple of positional arguments; for a program, None takes those that
            it was exported with. Dimension 0 of each tensor is taken for the batch.
        dynamic_shapes: as for ``torch.export.export``; the default leaves the batch free (any size, also
            where the example holds one sample) and fixes all other sizes. A program keeps its own.

    Returns:
        ``(folded, report)``. A module gives a callable module without training mode, a program gives a
        program. Each batch normalization in the graph is either in ``report.changes`` or in
        ``report.refusals``, with the reason; group, instance and layer normalization are refusals; a refusal for the
        module ``""`` says that the batch could not be left free, and why.

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
            compare.require_equal(as_module(model), as_module(folded), inputs, kwargs)
        return folded, report
    if inputs is None:
        raise ValueError(
            "fold needs example_inputs to capture a module: a tensor, or the tuple of positional arguments"
        )
    (folded, report), refusals = export_as(_folded, model, inputs, dynamic_shapes)
    if report.changes:
        compare.require_equal(model, folded, inputs, {})
    return folded, TransformReport(report.changes, refusals + report.refusals)


def _folded(program: ExportedProgram) -> tuple[GraphModule, TransformReport]:
    capture = Capture(program)
    report = fold_capture(capture)
    module = as_module(capture.program())
    activated_tables.fuse(module)
    return module, report


def fold_capture(capture: Capture) -> TransformReport:
    """Apply the rules to every normalization of a captured graph, in place."""
    folding = Folding(capture, {})
    outcomes: dict[Node, Change | Refusal] = {}  # of each batch normalization, in the order of the graph
    reasons: dict[Node, str] = {}
    for norm in batch_norm.find(capture.graph):
        reason = batch_norm.refusal(capture, norm)
        if reason is None:
            norm = batch_norm.with_one_result(capture, norm)
            folding.tables[norm.node] = Table(norm, *norm.scale_and_shift(capture))
        outcomes[norm.node] = Refusal(norm.module, reason or "")
    for node in list(folding.tables):
        module = folding.tables[node].module
        action, reasons[node] = _absorb(folding, node)
        if action is not None:
            outcomes[node] = Change(module, action)
    merged = []
    for node in list(capture.graph.nodes):
        found = parallel.match(folding, node)
        if found is None or parallel.check(folding, found):
            continue
        change = Change(found.merged.module, parallel.rewrite(folding, node, found))
        if isinstance(found.merged, Table):
            outcomes[found.merged.node] = change
        else:
            merged.append(change)
    for node, left in list(folding.tables.items()):
        if reason := table.check(folding, left):
            outcomes[node] = Refusal(left.module, f"{reason}; {reasons[node]}")
        else:
            outcomes[node] = Change(left.module, f"{table.rewrite(folding, node, left)}: {reasons[node]}")
    capture.erase_dead()
    changes = [outcome for outcome in outcomes.values() if isinstance(outcome, Change)]
    refusals = [outcome for outcome in outcomes.values() if isinstance(outcome, Refusal)]
    refusals += batch_norm.never_folded(capture.graph)
    for module, kind in batch_norm.find_others(capture.graph):
        refusals.append(Refusal(module, f"it is {kind}, by statistics of each input: no constants can stand for them"))
    for graph in capture.inner_graphs:
        reason = "it runs in a region that the graph calls (torch.cond, no_grad), which the rules do not enter"
        refusals += [Refusal(norm.module, reason) for norm in batch_norm.find(graph)]
    return TransformReport((*changes, *merged), tuple(refusals))


def _absorb(folding: Folding, node: Node) -> tuple[str | None, str]:
    """What the first rule without an objection did, or None; and the objections."""
    reasons = []
    for rule in ABSORBING:
        found = rule.match(folding, node)
        if found is None:
            continue
        reason = rule.check(folding, found)
        if reason is None:
            return rule.rewrite(folding, node, found), ""
        reasons.append(reason)
    return None, "; ".join(reasons)
