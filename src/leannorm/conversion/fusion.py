"""fuse: batch norm, the addition and the activation after it become one operator, in place; the model keeps its class.

A block keeps its children, parameters and names, and takes a subclass of its class whose training forward, generated
from a trace, calls each BN layer together with the steps that follow it (`leannorm.nn.fused`). In eval mode, and for
calls that the trace does not hold for, it computes by its own forward.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leannorm.conversion.fusion_check import difference, training_outputs
from leannorm.conversion.fusion_plan import Plan, has_own_forward, is_sequential
from leannorm.conversion.swap import abandon, adopt, unfuse
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.folding import NATIVELY
from leannorm.nn.fused import fused_class
from leannorm.records import Change, Refusal, TransformReport

M = TypeVar("M", bound=nn.Module)


def fuse(
    model: M, example_inputs: Tensor | tuple[Any, ...] | None = None, *, convolution: bool | None = None
) -> tuple[M, TransformReport]:
    """Compute each BN layer with the addition and the activation after it in one operator; in place.

    Found are modules, functions, methods and in-place forms of addition, ReLU, ReLU6, Hardtanh, clamp, leaky ReLU,
    SiLU, hardswish and GELU. Outputs and gradients stay, up to rounding; so do parameters, buffers, state-dict names,
    hooks and `isinstance`. Of a block, only the training forward changes; it is traced with `torch.fx`, so numbers and
    flags that the block's own forward reads become constants (where one is set later, the block is no longer fused).
    `revert` undoes it, and it may come before or after `convert`.

    A concatenation along channels right before a layer (a DenseNet's) is neither written nor kept for backward where
    `leannorm.functional.concatenated_batch_norm` can; its parts are, and must not be changed in place before backward.
    The layer may also begin what follows in a Sequential on the block whose output the concatenation is.

    The convolution or linear layer before a BN layer can be computed in the same operator, so that its own output is
    neither written nor kept for backward: unless told otherwise where native kernels are faster so, which they are for
    depthwise and pointwise (1x1) ones. That needs sampled statistics: the few sampled outputs come first, and give the
    scale of the filters and the shift (`leannorm.functional.conv_batch_norm`). Where a call does not fit (eval mode,
    frozen, exact statistics, hooks on the convolution) it computes as without. With ``convolution=True`` a pointwise
    convolution between two layers (a DenseNet's bottleneck) is computed with both of them, where
    `leannorm.functional.preactivated_conv_batch_norm` can: nothing between them is written or kept.

    Args:
        model: any module.
        example_inputs: the arguments of a call, a tensor or a tuple. With them the model's training outputs before and
            after are compared, and if they differ nothing is fused.
        convolution: compute the convolution before a BN layer in its operator too: True wherever it can be, None only
            depthwise and pointwise 2d ones, and those only in calls for which native kernels are known to be faster (on
            a CPU, in channels-last memory, not compiled; pointwise ones in float32 and with filters that are small
            beside the maps), False none.

    Returns:
        The model, and a report of every BN layer: what its operator computes, or why it is left alone; with
        ``convolution=True`` also why a layer's convolution stays apart.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> fuse(model)[1].changes
    (Change(module='1', action='batch norm + relu'),)
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    unfuse(model)
    expected = [] if inputs is None else training_outputs(model, inputs)
    adopted, reasons = _adopt_all(model)
    plan = Plan.of(model, convolution=convolution)
    for module, rewrite in plan.classes.items():
        module.__class__ = fused_class(type(module), rewrite)
    failure = None if inputs is None else _failure(model, inputs, expected)
    if plan.convolutions and failure is None:
        expected = [] if inputs is None else training_outputs(model, inputs, exact=False)
        for layer in plan.convolutions:
            layer.folds_convolution = True if convolution else NATIVELY
        failure = None if inputs is None else _failure(model, inputs, expected, exact=False)
    if failure is not None:
        unfuse(model)
        plan = Plan(
            reasons=dict.fromkeys(model.modules(), f"fusing this model changed its training outputs: {failure}")
        )
    changes, refusals = [], []
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        reason = reasons.get(module) or _reason(model, name, module, plan)
        if reason is None or (module in plan.convolutions and module not in plan.apart):
            changes.append(Change(name, _action(module, plan)))
            if convolution and module in plan.apart:
                refusals.append(Refusal(name, f"its convolution stays apart: {plan.apart[module]}"))
        else:
            refusals.append(Refusal(name, reason))
            if module in adopted:
                abandon(adopted[module])
    return model, TransformReport(tuple(changes), tuple(refusals))


def _action(layer: nn.Module, plan: Plan) -> str:
    action = plan.actions.get(layer, "batch norm")
    folded = layer in plan.convolutions and layer not in plan.apart
    return f"convolution + {action}" if folded else action


def _adopt_all(model: nn.Module) -> tuple[dict[nn.Module, SampledBatchNorm], dict[nn.Module, str]]:
    adopted, reasons = {}, {}
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SampledBatchNorm):
            layer = adopt(module)
            if isinstance(layer, str):
                reasons[module] = layer
            else:
                adopted[module] = layer
    return adopted, reasons


def _failure(model: nn.Module, inputs: tuple[Any, ...], expected: list[Any], *, exact: bool = True) -> str | None:
    try:
        return difference(training_outputs(model, inputs, exact=exact), expected)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _reason(model: nn.Module, name: str, layer: nn.Module, plan: Plan) -> str | None:
    """Say why a layer is left alone, or None."""
    if layer in plan.actions:
        return None
    if layer in plan.reasons:
        return plan.reasons[layer]
    while name:  # up to the module whose forward calls it
        name = name.rpartition(".")[0]
        owner = model.get_submodule(name)
        if has_own_forward(owner) and not is_sequential(owner):
            reason = plan.untraceable.get(owner)
            return reason and f"{type(owner).__name__}: {reason}"
    return None
