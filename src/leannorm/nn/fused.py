"""Modules whose own call computes batch norm, addition and activation in one operator, as `leannorm.fuse` makes them.

What is fused is a call, not a layer: the generated forward of a block names the BN layer and the steps that follow it,
and `chain` looks at each call whether they fit one operator. So whatever is changed afterwards (a layer swapped, a hook
added, statistics converted, another path that calls the layer alone) computes what it would without fusing.
"""

from __future__ import annotations

import functools
import linecache
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from leannorm.activation import Activation, activation_of
from leannorm.nn import folding
from leannorm.nn.batchnorm import SampledBatchNorm
from leannorm.nn.concatenation import Concatenation, concatenation
from leannorm.nn.folding import is_observed
from leannorm.nn.preactivation import PreactivatedFold, Preactivation, preactivated
from leannorm.nn.rewrite import Rewrite, kinds_of
from leannorm.nn.tracing import is_traced
from leannorm.ops.definition import activate

Step = Tensor | Activation | nn.Module  # a tensor is added


def chain(
    layer: nn.Module,
    input: Tensor | list[Tensor] | tuple[Tensor, ...] | Preactivation,
    steps: tuple[Step, ...] = (),
    convolution: nn.Module | None = None,
) -> Tensor:
    """Apply a layer, then each step: add a tensor, activate, or call a module; in one operator where it can be.

    It can be where the layer is leannorm's (or a fused module that ends in one), a residual of the input's shape and
    dtype comes first, an activation last, and no hook wants to see what lies between. Several tensors, a list or a
    tuple, are concatenated along channels first, and a ``convolution`` comes before the layer; in the same operator
    where `leannorm.nn.concatenation` and `leannorm.nn.folding` can; with the layer before the convolution, which is the
    ``input`` then, where `leannorm.nn.preactivation` can. A Sequential that begins with such a layer passes them on.
    """
    if isinstance(input, Preactivation):
        both = preactivated(input, convolution, layer) if convolution is not None and is_free(layer) else None
        if both is None:
            return chain(layer, input.computed(), steps, convolution)
        return _with_what_is_before(layer, input.inputs[0], both, steps)
    if isinstance(input, list | tuple):
        if isinstance(layer, FusedSequential) and joins(layer):
            return layer(input, fused_steps=steps) if takes_steps(layer) else _follow(layer(input), steps)
        joined = concatenation(layer, input) if is_free(layer) else None
        if joined is None:
            return chain(layer, torch.cat(input, 1), steps)
        return _with_what_is_before(layer, input[0], joined, steps)
    if convolution is not None:
        folded = folding.fold(convolution, layer, input) if is_free(layer) else None
        if folded is None:
            return chain(layer, convolution(input), steps)
        return _with_what_is_before(layer, input, folded, steps)
    if takes_steps(layer):
        if not isinstance(layer, SampledBatchNorm):
            return layer(input, fused_steps=steps)
        operands = _operands(steps, input.shape, input.dtype, input)
        if operands is not None:
            return layer(input, *operands)
    return _follow(layer(input), steps)


def preactivation(
    layer: nn.Module, input: Tensor | list[Tensor] | tuple[Tensor, ...], steps: tuple[Step, ...] = ()
) -> Tensor | Preactivation:
    """Do as `chain`, or leave it to the call of the layer behind a convolution, which takes what this gives."""
    inputs = input if isinstance(input, list | tuple) else (input,)
    if is_free(layer) and inputs and not torch.compiler.is_compiling():
        operands = _operands(steps, (), inputs[0].dtype, inputs[0])
        if operands is not None and (takes_steps(layer) or operands == (None, None)):
            return Preactivation(layer, inputs, layer.activation or operands[1], partial(chain, layer, input, steps))
    return chain(layer, input, steps)


def _with_what_is_before(
    layer: nn.Module, input: Tensor, before: folding.Fold | Concatenation | PreactivatedFold, steps: tuple[Step, ...]
) -> Tensor:
    operands = _operands(steps, before.shape, before.dtype, input) if takes_steps(layer) else None
    if operands is not None:
        return layer(input, *operands, before)
    return _follow(layer(input, None, None, before), steps)


def _follow(value: Tensor, steps: tuple[Step, ...]) -> Tensor:
    for step in steps:
        if isinstance(step, nn.Module):
            value = step(value)
        elif isinstance(step, Activation):
            value = activate(value, step.kind, step.parameters)
        else:
            value = value + step
    return value


def is_free(module: nn.Module) -> TypeGuard[SampledBatchNorm]:
    """Whether a module is a layer of leannorm's whose call nothing from outside sees."""
    return isinstance(module, SampledBatchNorm) and not is_observed(module)


def takes_steps(layer: nn.Module | None) -> bool:
    """Whether a layer can compute the steps that follow it in its own call."""
    if layer is None or is_observed(layer):
        return False
    if isinstance(layer, SampledBatchNorm):
        return layer.activation is None
    return isinstance(layer, Fused) and takes_steps(tail(layer))


def is_identity(module: object) -> bool:
    """Whether a step does nothing."""
    return type(module) is nn.Identity and not is_observed(module)


def activation_step(step: object) -> Activation | None:
    """Give the activation that a step computes, or None where it is not one that a layer can apply."""
    if isinstance(step, Activation):
        return step
    return activation_of(step) if isinstance(step, nn.Module) and not is_observed(step) else None


def _operands(
    steps: tuple[Step, ...], shape: tuple[int, ...], dtype: torch.dtype, input: Tensor
) -> tuple[Tensor | None, Activation | None] | None:
    """Give the residual and the activation that steps are, for a layer of this output on the input's device.

    None where they are not.
    """
    residual = activation = None
    for step in steps:
        if isinstance(step, Tensor):
            if residual is not None or activation is not None or step.shape != shape or step.dtype != dtype:
                return None
            if not (step.is_cpu and input.is_cpu) and step.device != input.device:  # the first is quick
                return None
            residual = step
        elif (following := activation_step(step)) is not None and activation is None:
            activation = following
        elif not is_identity(step):
            return None
    return residual, activation


class Fused(nn.Module):
    """Base of the classes that fusing gives to modules, as `torch.nn.utils.parametrize` does; see `fused_class`.

    It adds no name without the prefix ``_fused_``, which would hide a child or method of the module's own.
    """

    _fused_original: ClassVar[type[nn.Module]]
    _fused_rewrite: ClassVar[Rewrite | None]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if _has_another_class(self):
            return super().__reduce_ex__(protocol)
        return _blank, (self._fused_original, self._fused_rewrite), self.__getstate__()


def unfuse(module: Fused) -> None:
    """Give a fused module back the class that it had.

    Raises:
        RuntimeError: if it was given another class since.
    """
    if _has_another_class(module):
        raise RuntimeError(
            f"a fused {module._fused_original.__name__} became a {type(module).__name__} after leannorm.fuse; undo "
            "that before the module is fused again or reverted, or call leannorm.fuse last"
        )
    module.__class__ = module._fused_original  # pyright: ignore[reportAttributeAccessIssue]


def tail(module: Fused) -> nn.Module | None:
    """Give the part whose output is a fused module's output, if there is one."""
    if isinstance(module, FusedBlock):
        path = module._fused_rewrite.tail
        return None if path is None else module.get_submodule(path)
    return next(reversed(module._modules.values()), None)


def _has_another_class(module: Fused) -> bool:
    return type(module) is not fused_class(module._fused_original, module._fused_rewrite)


class FusedSequential(Fused):
    """A `torch.nn.Sequential` that computes a layer that takes steps and the activation after it in one operator."""

    def forward(self, input: Any, *, fused_steps: tuple[Step, ...] = ()) -> Any:
        """Apply the layers in their order, then the steps."""
        if is_traced(input) or (not self.training and not fused_steps):
            return super().forward(input)
        layers = layers_of(self)
        value, at = input, 0
        while at < len(layers):
            convolution = layers[at] if precedes_its_layer(layers, at) else None
            at += convolution is not None
            end = at + 1
            if takes_steps(layers[at]):
                end = end_of_steps(layers, end)
            if end < len(layers) and gives_parts(layers[at]) and joins(layers[end]):
                value = layers[at](value, fused_parts=True)
            else:
                following = (*layers[at + 1 : end], *(fused_steps if end == len(layers) else ()))
                value = chain(layers[at], value, following, convolution)
            at = end
        return value


def precedes_its_layer(layers: list[nn.Module], at: int) -> bool:
    """Whether a layer of a sequence is one that the batch norm layer after it is to compute in its own call."""
    following = layers[at + 1] if at + 1 < len(layers) else None
    if not isinstance(following, SampledBatchNorm) or not following.folds_convolution:
        return False
    return folding.refusal(layers[at]) is None


def layers_of(sequential: nn.Module) -> list[nn.Module]:
    """Give what a Sequential calls, in its order."""
    return [layer for layer in sequential._modules.values() if layer is not None]


def joins(module: nn.Module) -> TypeGuard[SampledBatchNorm | FusedSequential]:
    """Whether a module begins with a layer that can be called with the parts of a concatenation."""
    if isinstance(module, FusedSequential) and module.training and not is_observed(module):
        layers = layers_of(module)
        return bool(layers) and joins(layers[0])
    return is_free(module)


def gives_parts(module: nn.Module) -> bool:
    """Whether a module can give the parts of the concatenation that is its output."""
    return isinstance(module, FusedBlock) and module._fused_rewrite.gives_parts and not is_observed(module)


def join(parts: list[Tensor] | tuple[Tensor, ...], apart: bool) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """Concatenate along channels, but where the parts are to stay apart."""
    return parts if apart else torch.cat(parts, 1)


def end_of_steps(layers: list[nn.Module], start: int) -> int:
    """Give the index after the identities and the activation that begin at ``start``; ``start`` if there are none."""
    end = start
    while end < len(layers) and is_identity(layers[end]):
        end += 1
    return end + 1 if end < len(layers) and activation_step(layers[end]) is not None else start


# Set by torch itself on any module.
_FRAMEWORK = frozenset([*vars(nn.Module()), "_compiled_call_impl", "__class__"])


class FusedBlock(Fused):
    """A module whose training forward was traced and calls each BN layer with the steps that follow it."""

    _fused_rewrite: ClassVar[Rewrite]  # pyright: ignore[reportIncompatibleVariableOverride]
    _fused_forwards: ClassVar[dict[tuple[str, ...], Callable[..., Any]]]

    def __setattr__(self, name: str, value: Any) -> None:
        known = name in self.__dict__ or name in self._modules or hasattr(type(self), name)
        if known and name not in _FRAMEWORK:
            warnings.warn(
                f"{type(self).__name__}.{name} is set after leannorm.fuse, which traced the block with what it had: "
                "the block is no longer fused. Call leannorm.fuse after such changes",
                stacklevel=2,
            )
            unfuse(self)
            return setattr(self, name, value)
        return super().__setattr__(name, value)


def compute(
    block: FusedBlock, args: tuple[Any, ...], kwargs: dict[str, Any], steps: tuple[Step, ...], parts: bool
) -> Any:
    """Compute what a block's own forward and then the steps would; where asked for, the parts of a concatenation if
    they can be given.
    """
    rewrite = block._fused_rewrite
    given = rewrite.arguments(args, kwargs) if block.training else None
    if given is not None and rewrite.knows_children_of(block):
        forward = block._fused_forwards.get(kinds_of(given))
        if forward is not None:
            further = (steps,) if rewrite.tail is not None else (parts,) if rewrite.gives_parts else ()
            return forward(block, *given, *further)
    return _follow(block._fused_original.forward(block, *args, **kwargs), steps)


@functools.cache
def fused_class(original: type[nn.Module], rewrite: Rewrite | None) -> type[Fused]:
    """Make the class of a fused module: a subclass of the one that it has, so that `isinstance` holds.

    Args:
        original: the class; a `torch.nn.Sequential` without a forward of its own if there is no rewrite.
        rewrite: the traced forwards, or None for a `FusedSequential`.
    """
    members: dict[str, Any] = {"_fused_original": original, "_fused_rewrite": rewrite, "__module__": __name__}
    if rewrite is None:
        bases = (FusedSequential, original)
    else:
        bases = (FusedBlock, original)
        members |= {f"_fused_activation_{i}": constant for i, constant in enumerate(rewrite.constants)}
        members["_fused_forwards"] = {
            kinds: _function(source, f"<leannorm.fuse {original.__qualname__} {hash(source):x}>")
            for kinds, source in rewrite.forwards
        }

        @functools.wraps(original.forward)
        def forward(
            self: FusedBlock, *args: Any, fused_steps: tuple[Step, ...] = (), fused_parts: bool = False, **kwargs: Any
        ) -> Any:
            return compute(self, args, kwargs, fused_steps, fused_parts)

        members["forward"] = forward
    metaclass: Any = type(original)
    return metaclass(f"Fused{original.__name__}", bases, members)


def _function(source: str, filename: str) -> Callable[..., Any]:
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)  # for tracebacks
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)  # the text that fuse generated, or its pickle
    return namespace["forward"]


def _blank(original: type[nn.Module], rewrite: Rewrite | None) -> Fused:
    cls = fused_class(original, rewrite)
    return cls.__new__(cls)
