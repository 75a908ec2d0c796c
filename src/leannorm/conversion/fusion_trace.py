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

from leannorm.nn.rewrite import KINDS


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

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = kinds
        self.context = _context()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        arguments = zip(positional_parameters(root_fn)[0], self.kinds, strict=False)
        nodes = [(self.create_node("placeholder", name, (), {}), kind) for name, kind in arguments]
        return root_fn, [self.root, *(_STAND_INS[kind](node, self) for node, kind in nodes)]

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


def positional_parameters(forward: Any) -> tuple[tuple[str, ...], int]:
    """Give a forward's positional parameters but self, as far as the optional ones are None by default.

    Returns:
        Their names, and how many have no default.

    Raises:
        UntraceableError: if none is required, or one that can only be given by keyword.
    """
    required, optional, ended = [], [], False
    for parameter in list(signature(forward).parameters.values())[1:]:
        positional = parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        if parameter.default is Parameter.empty and parameter.kind is Parameter.KEYWORD_ONLY:
            raise UntraceableError(f"its forward requires the keyword argument {parameter.name!r}")
        if positional and parameter.default is Parameter.empty:
            required.append(parameter.name)
        elif positional and parameter.default is None and not ended:
            optional.append(parameter.name)
        else:
            ended = True
    if not required:
        raise UntraceableError("its forward requires no argument")
    return (*required, *optional), len(required)


def trace(block: nn.Module, kinds: tuple[str, ...], *, children_train: bool = True) -> fx.Graph:
    """Trace the forward of a block in training mode.

    Args:
        block: the module.
        kinds: of the first positional arguments, keys of `leannorm.nn.rewrite.KINDS`; all others have their defaults.
        children_train: the mode that its descendants show.

    Returns:
        The graph; each call of a child is a ``call_module`` node.

    Raises:
        UntraceableError: with the reason.
    """
    with _modes(block, children_train), _nothing_else_changes(block), warnings.catch_warnings(action="ignore"):
        try:
            graph = _Tracer(kinds).trace(block)
        except UntraceableError:
            raise
        except Exception as error:
            first, *_ = str(error).strip().splitlines() or [""]
            raise UntraceableError(f"its forward cannot be traced: {type(error).__name__}: {first}") from error
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
