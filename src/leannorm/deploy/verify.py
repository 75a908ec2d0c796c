"""verify: how far a candidate is from the model that it was made from, on the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from leannorm.deploy.layers import Values, observe
from leannorm.graph.export import as_module
from leannorm.records import LayerError, Verification

Model = nn.Module | ExportedProgram | Callable[..., Any]


def verify(reference: Model, candidate: Model, batches: Iterable[Any], *, max_error: float = 0.01) -> Verification:
    r"""Compare a candidate with its reference on the same batches.

    .. math:: \text{relative error} = \|candidate - reference\|_2 / \|reference\|_2

    over all elements of all floating outputs of all batches, in float64. Arg-max agreement and accuracy are taken where
    the output is one tensor of shape (N, classes), accuracy where the batches have labels. NaN or infinity in either
    output makes the error NaN, and never passes.

    On the first batch the errors are taken at each layer too, where both models have a layer of that name with a result
    of the same shape. A folded model is compared where its values are the original's: a convolution that has taken up a
    batch normalization stands for that.

    Args:
        reference: a module in eval mode, compiled or not, an exported program, or any callable (such as a
            `leannorm.deploy.runtime.Session`) that takes what the batches hold and returns tensors or arrays. Functions
            and compiled modules show no layers.
        candidate: as ``reference``.
        batches: inputs, or ``(inputs, labels)``; inputs are a tensor, or a tuple of arguments; labels (N,) are
            integers.
        max_error: the largest relative error that passes.

    Returns:
        The record, with ``passed`` true if the relative error is at most ``max_error``.

    Raises:
        ValueError: if there are no batches, a model is in training mode, or outputs differ in number or shape.
    """
    if not (max_error >= 0 and math.isfinite(max_error)):
        raise ValueError(f"max_error must be a finite number >= 0, got {max_error}")
    run_reference, run_candidate = _runner(reference, "reference"), _runner(candidate, "candidate")
    tally = _Tally()
    layers: tuple[LayerError, ...] = ()
    with torch.no_grad():
        for i, batch in enumerate(batches):
            inputs, labels = _split(batch)
            if i == 0:
                (expected, inner), (got, other) = observe(run_reference, inputs), observe(run_candidate, inputs)
                layers = _layer_errors(inner, other)
            else:
                expected, got = run_reference(*inputs), run_candidate(*inputs)
            tally.add(len(inputs[0]), _outputs(expected), _outputs(got), labels)
    if not tally.samples:
        raise ValueError("verify got no batches to compare on: give an iterable with at least one, not one used up")
    return tally.record(max_error, layers)


def _layer_errors(reference: Values, candidate: Values) -> tuple[LayerError, ...]:
    errors = []
    for layer, expected in reference.items():
        got = candidate.get(layer)
        if got is not None and got.shape == expected.shape and expected.is_floating_point():
            whole = _Tally()
            whole.add(1, _outputs(expected), _outputs(got), None)
            errors.append(LayerError(layer, whole.relative_error(), whole.maximum))
    return tuple(errors)


class _Tally:
    """Sums over batches."""

    def __init__(self) -> None:
        self.samples = 0
        self.squared_difference = 0.0
        self.squared_reference = 0.0
        self.maximum = 0.0
        self.classified = 0
        self.agreeing = 0
        self.labelled = 0
        self.reference_correct = 0
        self.candidate_correct = 0

    def add(self, samples: int, reference: list[Tensor], candidate: list[Tensor], labels: Tensor | None) -> None:
        shapes, others = ([tuple(tensor.shape) for tensor in outputs] for outputs in (reference, candidate))
        if shapes != others:
            raise ValueError(f"candidate and reference must return the same shapes, got {others} and {shapes}")
        if not reference:
            raise ValueError("the models return no floating tensor to compare")
        self.samples += samples
        for expected, got in zip(reference, candidate, strict=True):
            difference = (got - expected).abs()
            self.squared_difference += difference.square().sum().item()
            self.squared_reference += expected.square().sum().item()
            largest = difference.max().item() if difference.numel() else 0.0
            # Python's max drops a NaN that comes second.
            self.maximum = largest if math.isnan(largest) else max(self.maximum, largest)
        if len(reference) == 1 and reference[0].ndim == 2 and reference[0].shape[1] > 1:
            self._classify(reference[0].argmax(1), candidate[0].argmax(1), labels)

    def _classify(self, reference: Tensor, candidate: Tensor, labels: Tensor | None) -> None:
        self.classified += len(reference)
        self.agreeing += int((reference == candidate).sum())
        if labels is None:
            return
        if labels.shape != reference.shape or labels.is_floating_point():
            raise ValueError(
                f"labels must be integers of shape {tuple(reference.shape)}, got {labels.dtype} of shape "
                f"{tuple(labels.shape)}: give (inputs, None) to compare outputs alone"
            )
        self.labelled += len(labels)
        self.reference_correct += int((reference == labels).sum())
        self.candidate_correct += int((candidate == labels).sum())

    def relative_error(self) -> float:
        error = math.sqrt(self.squared_difference)
        if error:  # 0 / 0 is no error
            norm = math.sqrt(self.squared_reference)
            error = error / norm if norm else math.inf
        return error

    def record(self, max_error: float, layers: tuple[LayerError, ...]) -> Verification:
        error = self.relative_error()
        return Verification(
            samples=self.samples,
            relative_error=error,
            maximum_error=self.maximum,
            argmax_agreement=_share(self.agreeing, self.classified),
            reference_accuracy=_share(self.reference_correct, self.labelled),
            candidate_accuracy=_share(self.candidate_correct, self.labelled),
            max_error=max_error,
            passed=error <= max_error,
            layers=layers,
            first_wrong_layer=next((layer.layer for layer in layers if not layer.relative_error <= max_error), None),
        )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _runner(model: Model, role: str) -> Callable[..., Any]:
    if isinstance(model, ExportedProgram):
        return as_module(model)
    if not isinstance(model, nn.Module):
        return model
    if isinstance(model, GraphModule) and "train" in vars(model):
        return model  # the module of an exported program: its mode is in its graph, its flag says nothing
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"the {role} is in training mode ({training[0]}): call eval() on it first")
    return model


def _split(batch: Any) -> tuple[tuple[Any, ...], Tensor | None]:
    """Arguments and labels of a batch."""
    inputs, labels = batch, None
    if isinstance(batch, tuple | list):
        if len(batch) != 2:
            raise ValueError(
                f"a batch must be a tensor or (inputs, labels), got a {type(batch).__name__} of {len(batch)}"
            )
        inputs, labels = batch
    if labels is not None:
        labels = torch.as_tensor(labels).cpu()
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), labels


def _outputs(result: Any) -> list[Tensor]:
    """The floating tensors of a result, in float64 on the CPU."""
    leaves = (torch.as_tensor(x) for x in pytree.tree_leaves(result) if isinstance(x, Tensor | np.ndarray | np.generic))
    return [leaf.detach().cpu().double() for leaf in leaves if leaf.is_floating_point()]
