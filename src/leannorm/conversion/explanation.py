"""explain: which code computes each normalization layer of a model, and why no faster one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from leannorm import backends
from leannorm.activation import Activation
from leannorm.conversion import methods
from leannorm.conversion.fusion import fuse
from leannorm.conversion.swap import refusal
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.fused import Fused
from leannorm.nn.method import MethodNorm
from leannorm.ops.conv_batch_norm import output_shape, sampled_elements
from leannorm.records import Explanation, LayerExplanation
from leannorm.statistics import Statistics, WeightedSum, sampled_dimensions

_NORMALIZATION = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_PYTORCH, _CONVOLUTIONS = "PyTorch", "PyTorch's convolutions"
_CONCATENATION = "concatenation + "
_ALONE = "with given statistics and nothing after it, batch norm is one pass of PyTorch's own operator, too"
_EVAL = "it is in eval mode: leannorm.fold leaves no normalization in a model that is shipped"
_DECOMPOSED = "under torch.compile by PyTorch's operators, fused by the compiler, which leannorm.tune has found faster"
_UNREACHED = "these example inputs do not reach it"


def explain(model: nn.Module | Tensor, example_inputs: Tensor | tuple[Any, ...] | None = None) -> Explanation:
    """Say for each normalization layer whose code computes it, and why no faster one.

    Kernels are chosen call by call: by device, dtype, shape and memory order of the layer's input. With example inputs
    a copy of the model is called once, in the mode that the model has, and the calls that its layers make are told;
    without them it is what an ordinary input of the parameters' dtype and device would get.

    Args:
        model: any module, which stays as it is; or a tensor, to learn what would normalize that.
        example_inputs: the arguments of a call, a tensor or a tuple.

    Returns:
        For each normalization layer a line for each form of its calls; as text (``print``) a table. What it says:
        the source of statistics, with how many elements a channel they come from; what is computed in one operator;
        whose code computes it; and why not our kernels, why not fused, or why torch's own layer is still there.

    Raises:
        TypeError: if ``model`` is neither a module nor a tensor.
        ValueError: for example inputs of a tensor.

    >>> layer = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    >>> print(explain(layer))
    module  layer        statistics  computes    by
    0       BatchNorm2d  full        batch norm  PyTorch  [1]
    [1] it is torch's own: leannorm.convert or leannorm.fuse (batch norm + relu) takes it over
    """
    if isinstance(model, Tensor):
        if example_inputs is not None:
            raise ValueError("example_inputs are for a module; explain(tensor) takes that tensor alone")
        return Explanation((_of_tensor(model),))
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes a module or a tensor, got {type(model).__name__}")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    calls = None if inputs is None else _calls(copy.deepcopy(model), inputs)
    fusing = _Fusing(model)
    layers: list[LayerExplanation] = []
    for name, module in model.named_modules():
        if not isinstance(module, _NORMALIZATION):
            continue
        if calls is None:
            layers.append(_explained(name, module, _expected(name, module, fusing), fusing))
        elif name in calls:
            layers += dict.fromkeys(_explained(name, module, call, fusing) for call in calls[name])
        else:
            layers.append(LayerExplanation(name, type(module).__name__, _target(module), "", "", (_UNREACHED,)))
    return Explanation(tuple(layers))


@dataclass(frozen=True)
class _Call:
    """What a layer's call computed, by the operators of ours that it called (none: by PyTorch's).

    Args:
        takes_parts: the kernels compute what came in from its parts, if it is a concatenation; not while it is watched.
    """

    training: bool
    operator: str = "batch norm"
    served_by: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    sampled: str = ""
    takes_parts: bool = False


class _Fusing:
    """What `leannorm.fuse` would do to a copy of a model, and whether it was called."""

    def __init__(self, model: nn.Module) -> None:
        copied = copy.deepcopy(model)
        self.done = any(isinstance(module, Fused) for module in copied.modules())
        folds = any(getattr(module, "folds_convolution", False) is True for module in copied.modules())
        report = fuse(copied, convolution=folds or None)[1]
        self.actions = {change.module: change.action for change in report.changes}
        self.refusals = {refusal.module: refusal.reason for refusal in report.refusals}

    def action(self, name: str, layer: SampledBatchNorm) -> str:
        """What fuse lets a layer compute; without the convolution where `leannorm.tune` keeps that apart."""
        action = self.actions.get(name, "batch norm")
        return action if layer.folds_convolution else action.removeprefix("convolution + ")

    def why_not(self, name: str, layer: SampledBatchNorm, operator: str) -> str | None:
        """Say why a layer's call computes no more than this operator, or None where there is no more."""
        possible = self.action(name, layer)
        if name in self.refusals:
            return f"not fused: {self.refusals[name]}"
        if possible in (operator, "batch norm"):
            return None
        fits = ", which this call does not fit" if self.done else ""
        return f"leannorm.fuse computes {possible} in one operator{fits}"


def _explained(name: str, module: nn.Module, call: _Call, fusing: _Fusing) -> LayerExplanation:
    kind, target = type(module).__name__, _target(module)
    if not isinstance(module, SampledBatchNorm):
        return LayerExplanation(name, kind, target, _operator(module), _PYTORCH, (_why_torch(name, module, fusing),))
    if not call.training:
        source = "full" if module.running_mean is None else "running"
        reasons = call.reasons if module.frozen else (*call.reasons, _EVAL)
        fused = fusing.done and call.served_by != (_PYTORCH,)
        operator = call.operator
        if fused:
            operator = fusing.action(name, module).removeprefix("convolution + ").removeprefix(_CONCATENATION)
        served_by = ", ".join(call.served_by)
        if operator == "batch norm" and served_by != _PYTORCH:
            served_by, reasons = _PYTORCH, (_ALONE, *reasons)
        return LayerExplanation(name, kind, source, operator, served_by, reasons)
    reasons = list(call.reasons)
    if isinstance(module, MethodNorm):
        if not call.served_by:
            reasons.append(f"{module.method} is composed of PyTorch's operators: the kernels compute batch norm alone")
        served_by = ", ".join((*call.served_by, _PYTORCH))
        return LayerExplanation(name, kind, target, "its method", served_by, tuple(reasons))
    operator = call.operator
    if fusing.done and call.takes_parts and fusing.action(name, module) == _CONCATENATION + operator:
        operator = _CONCATENATION + operator
    more = fusing.why_not(name, module, operator)
    reasons += [] if more is None else [more]
    reasons += [_DECOMPOSED] if module.decomposes else []
    served_by = ", ".join(call.served_by)
    return LayerExplanation(name, kind, target + call.sampled, operator, served_by, tuple(reasons))


def _of_tensor(x: Tensor) -> LayerExplanation:
    name, reason = backends.serving(x)
    kind = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"
    return LayerExplanation("", kind, "", "batch norm", name, () if reason is None else (reason,))


def _target(module: nn.Module) -> str:
    """Spell a layer's source of statistics or method."""
    if isinstance(module, SampledBatchNorm):
        return str(module.target)
    if methods.has_method(module):
        return str(module.method)
    return "full" if isinstance(module, _BatchNorm) else "each sample's"


def _operator(module: nn.Module) -> str:
    return "batch norm" if isinstance(module, _BatchNorm) else "its own"


def _why_torch(name: str, module: nn.Module, fusing: _Fusing) -> str:
    if methods.has_method(module):
        return f"{module.method} is torch's own layer: the kernels compute batch norm alone"
    if not isinstance(module, _BatchNorm):
        return f"{type(module).__name__} is no batch normalization, which the kernels compute alone"
    reason = refusal(module)
    if reason is not None:
        return f"left as it is: {reason}"
    action = fusing.actions.get(name)
    return (
        "it is torch's own: leannorm.convert or leannorm.fuse" + (f" ({action})" if action else "") + " takes it over"
    )


def _eval_call(layer: nn.Module, x: Tensor) -> _Call:
    """What a layer's call on x computes in eval mode: the native operator is not called where a mode watches."""
    operator, name, reason = "batch norm", _PYTORCH, None
    if isinstance(layer, SampledBatchNorm) and type(layer)._eval_forward is SampledBatchNorm._eval_forward:
        if layer.running_mean is None:
            reason = "it keeps no running statistics: PyTorch's own operators take the batch's"
        else:
            name, reason = backends.serving(x, "normalize")
        if reason is not None:
            name = _PYTORCH
        elif layer.activation is not None:
            operator += f" + {layer.activation}"
    return _Call(False, operator, (name,), () if reason is None else (reason,))


def _expected(name: str, module: nn.Module, fusing: _Fusing) -> _Call:
    """What a layer's call on an ordinary input of its parameters' dtype and device would compute."""
    if not isinstance(module, SampledBatchNorm) or (isinstance(module, MethodNorm) and module.training):
        return _Call(module.training)
    like = next((t for t in (module.weight, module.running_mean) if t is not None), torch.empty(0))
    x = like.detach().new_empty(2, module.num_features)
    if not module.training:
        return _eval_call(module, x)
    served_by, reason = backends.serving(x)
    operator = "batch norm" if module.activation is None else f"batch norm + {module.activation}"
    if fusing.done:
        operator = fusing.action(name, module)
    if operator.startswith("convolution"):
        served_by, reason = _CONVOLUTIONS, None
    return _Call(True, operator, (served_by,), () if reason is None else (reason,))


def _calls(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, list[_Call]]:
    """Call a model, which may change, and give the calls of its normalization layers by name."""
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, _NORMALIZATION)
    }
    devices = {t.device for t in model.parameters() if t.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cpu"
    found: dict[str, list[_Call]] = {}
    with torch.random.fork_rng(list(devices), device_type=kind), torch.no_grad(), _Watch() as watch:

        def before(module: nn.Module, args: tuple) -> None:
            watch.operators.clear()

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            if module in names:
                call = _call(module, watch.operators) if module.training else _eval_call(module, (*args, output)[0])
                found.setdefault(names[module], []).append(call)

        hooks = (register_module_forward_pre_hook(before), register_module_forward_hook(after))
        try:
            model(*pytree.tree_map_only(Tensor, torch.clone, inputs))  # a model may work in place
        finally:
            for hook in hooks:
                hook.remove()
    return found


class _Operator(NamedTuple):
    """A call of one of leannorm's operators: its name, arguments by name, and as of `backends.serving`."""

    name: str
    given: dict[str, Any]
    served_by: str
    reason: str | None


class _Watch(TorchDispatchMode):
    """Notes the calls of leannorm's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[_Operator] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name.removeprefix("leannorm::")
        if name != func._schema.name and name != "snapshot":
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            served = (_CONVOLUTIONS, None)
            if name != "conv_batch_norm":
                served = backends.serving(args[0], name)
            self.operators.append(_Operator(name, given, *served))
        return func(*args, **(kwargs or {}))


def _call(module: nn.Module, operators: list[_Operator]) -> _Call:
    if not operators:
        return _Call(module.training)
    served_by = tuple(dict.fromkeys(operator.served_by for operator in operators))
    reasons = tuple(dict.fromkeys(operator.reason for operator in operators if operator.reason is not None))
    name, given, *_ = operators[0]
    parts = ["convolution"] * (name == "conv_batch_norm") + ["batch norm"]
    parts += ["add"] * (given.get("residual") is not None)
    if given.get("activation"):
        parts.append(str(Activation(given["activation"], tuple(given["parameters"]))))
    shape, boxes = given["x"].shape, given.get("boxes")
    if name == "conv_batch_norm":
        shape = output_shape(shape, given["weight"].shape, given["stride"], given["padding"], given["dilation"])
    elements = math.prod(sampled_dimensions(shape))
    taken = sum(sampled_elements(boxes, len(shape) - 1)) if boxes else elements
    if isinstance(module, SampledBatchNorm):
        reasons += tuple(
            _raised(module.statistics, elements // max(1, shape[0]) * (shape[0] - module.statistics.virtual))
        )
    takes_parts = name == "batch_norm" and bool(boxes) and backends.takes_concatenation([given["x"]])
    return _Call(module.training, " + ".join(parts), served_by, reasons, f" ({taken} of {elements})", takes_parts)


def _raised(source: Statistics, elements: int) -> Iterator[str]:
    """Say which sources take more of so many elements a channel than their fraction, since that would be too few."""
    for one in source.sources if isinstance(source, WeightedSum) else (source,):
        fraction, minimum = getattr(one, "fraction", 1.0), getattr(one, "minimum", 0)
        if 0 < fraction * elements < minimum and fraction < 1:
            yield f"{one} aims at {minimum} elements a channel or more, which is more than its share of so small a map"
