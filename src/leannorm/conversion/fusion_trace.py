"""Trace a block's forward into a graph whose leaves are its child modules; or say why the graph would not be it.

`torch.fx` runs the forward once with stand-ins and records what it does to them. Whatever else the forward does or
reads is lost or becomes a constant. What can be seen of that is refused here: random draws, attributes that it sets,
tensors that it makes, grad and autocast contexts, checkpoints, custom autograd functions, its children's mode.
"""

from __future__ import annotations

import operator
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from leannorm.nn.fused import KINDS


class UntraceableError(Exception):
    """A block has no graph; the message says why."""


class _Proxy(fx.Proxy):
    """A stand-in that tells augmented assignment, which changes a tensor in place, from its operator."""


def _recorded(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _Argument(_Proxy):
    """A stand-in that passes `isinstance` checks for its kind."""

    kind: type = Tensor

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.kind


_STAND_INS = {kind: type("_Argument", (_Argument,), {"kind": cls}) for kind, cls in KINDS.items()}


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        nodes = [self.create_node("placeholder", name, (), {}) for name in required_arguments(root_fn)]
        return root_fn, [self.root, *(_STAND_INS[self.kind](node, self) for node in nodes)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and a not in self.tensor_attrs:
            kept = (*self.root.parameters(), *self.root.buffers())
            if not any(a is tensor for tensor in kept):
                raise UntraceableError("its forward makes a tensor that does not depend on its input")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self.context:
            raise UntraceableError(
                "its forward computes in a context (no_grad, autocast, checkpoint, a custom autograd function)"
            )
        return super().create_node(*args, **kwargs)


def required_arguments(forward: Any) -> list[str]:
    """Give the names of a forward's positional arguments without default, but self.

    Raises:
        UntraceableError: if there are none, or a keyword argument is required.
    """
    names = []
    for parameter in list(signature(forward).parameters.values())[1:]:
        if parameter.default is not Parameter.empty or parameter.kind in (
            Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD
        ):  # fmt: skip
            continue
        if parameter.kind is Parameter.KEYWORD_ONLY:
            raise UntraceableError(f"its forward requires the keyword argument {parameter.name!r}")
        names.append(parameter.name)
    if not names:
        raise UntraceableError("its forward requires no argument")
    return names


def trace(block: nn.Module, kind: str = "tensor", *, children_train: bool = True) -> fx.Graph:
    """Trace the forward of a block in training mode.

    Args:
        block: the module.
        kind: of all its required arguments, a key of `leannorm.nn.fused.KINDS`; others have their defaults.
        children_train: the mode that its descendants show.

    Returns:
        The graph; each call of a child is a ``call_module`` node.

    Raises:
        UntraceableError: with the reason.
    """
    with _modes(block, children_train), _nothing_else_changes(block), warnings.catch_warnings(action="ignore"):
        try:
            graph = _Tracer(kind).trace(block)
        except UntraceableError:
            raise
        except Exception as error:
            text = str(error).strip().splitlines()
            raise UntraceableError(
                f"its forward cannot be traced: {type(error).__name__}{': ' + text[0] if text else ''}"
            ) from error
    for node in graph.nodes:
        node.type = None  # an annotation may not be importable
    return graph


def _context() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,  # pyright: ignore[reportAttributeAccessIssue]
    )


@contextmanager
def _modes(block: nn.Module, children_train: bool) -> Iterator[None]:
    modes = {module: module.training for module in block.modules()}
    try:
        for module in modes:
            module.__dict__["training"] = module is block or children_train
        yield
    finally:
        for module, mode in modes.items():
            module.__dict__["training"] = mode


@contextmanager
def _nothing_else_changes(block: nn.Module) -> Iterator[None]:
    """Put back attributes and random generators, and raise `UntraceableError` if the forward changed them."""
    attributes = [(container, dict(container)) for module in block.modules() for container in _containers(module)]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - what a forward draws from
    try:
        yield
    finally:
        reason = None
        if not torch.equal(torch.get_rng_state(), generators[0]) or random.getstate() != generators[1]:
            reason = "its forward draws random numbers that do not depend on its input"
        elif not all(map(np.array_equal, np.random.get_state(), generators[2])):  # noqa: NPY002
            reason = "its forward draws random numbers from NumPy"
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        np.random.set_state(generators[2])  # noqa: NPY002
        for container, before in attributes:
            if len(container) != len(before) or any(container.get(k) is not v for k, v in before.items()):
                container.clear()
                container.update(before)
                reason = "its forward sets attributes"
    if reason is not None:
        raise UntraceableError(reason)


def _containers(module: nn.Module) -> list[dict[str, Any]]:
    return [vars(module), module._parameters, module._buffers, module._modules]  # pyright: ignore[reportReturnType]
