"""The numeric check at the end of a graph transform: nothing wrong leaves in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Mapping

# The largest relative error that rounding explains in a deep network; a wrong rewrite gives far more.
MAX_ERROR = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class DifferentError(RuntimeError):
    """A rewritten model does not compute what its original does."""


def require_equal(
    original: nn.Module,
    rewritten: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    max_error: Mapping[torch.dtype, float] = MAX_ERROR,
) -> float:
    """Run both on the same inputs, with the same random numbers, and compare every tensor that they return.

    The error of a tensor is ``||rewritten - original|| / ||original||`` (2-norms, in float64), its bound
    that of the coarsest dtype among the outputs and the parameters.

    Returns:
        The largest error of an output.

    Raises:
        DifferentError: if an output's error is above the bound, or its shape, its count or its NaN and inf
            differ.
    """
    expected, got = (_outputs(model, inputs, kwargs) for model in (original, rewritten))
    shapes = [[tuple(tensor.shape) for tensor in outputs] for outputs in (expected, got)]
    if shapes[0] != shapes[1]:
        raise DifferentError(f"the rewritten model returns shapes {shapes[1]}, the original {shapes[0]}")
    dtypes = {tensor.dtype for tensor in (*expected, *rewritten.parameters(), *rewritten.buffers())}
    bound = max((max_error[dtype] for dtype in dtypes if dtype in max_error), default=0.0)
    errors = [_relative_error(a.double(), b.double()) for a, b in zip(expected, got, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__, default=None)
    if worst is not None and errors[worst] > bound:
        largest = (got[worst].double() - expected[worst].double()).abs().max().item()
        raise DifferentError(
            f"the rewritten model differs from the original: output {worst} by a relative error of "
            f"{errors[worst]:.3g} (allowed: {bound:g}), at most {largest:.3g} in one place; keep the original"
        )
    return 0.0 if worst is None else errors[worst]


def run(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """What a module returns; it runs on copies of its buffers and inputs, so that all of them stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    copies = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
    return torch.func.functional_call(module, buffers, copies, kwargs)


def _outputs(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    devices = range(torch.cuda.device_count())
    with torch.no_grad(), torch.random.fork_rng(devices), torch.backends.cudnn.flags(allow_tf32=False):
        torch.manual_seed(0)
        return [leaf for leaf in pytree.tree_leaves(run(model, inputs, kwargs)) if isinstance(leaf, Tensor)]


def _relative_error(expected: Tensor, got: Tensor) -> float:
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return torch.inf
    expected, got = expected[finite], got[finite]
    scale = torch.linalg.vector_norm(expected).item()
    difference = torch.linalg.vector_norm(got - expected).item()
    return difference / scale if scale > 0 else difference
