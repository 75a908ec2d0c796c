"""How a block that `leannorm.fuse` traced computes, and for which calls that holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from leannorm.activation import Activation

KINDS: dict[str, type] = {"tensor": Tensor, "list": list}


def kinds_of(arguments: tuple[Any, ...]) -> tuple[str, ...]:
    """Give the kind of each argument, "" for any other."""
    return tuple(map(_kind, arguments))


def _kind(argument: object) -> str:
    for name, kind in KINDS.items():
        if isinstance(argument, kind):
            return name
    return ""


@dataclass(frozen=True)
class Rewrite:
    """How a fused block computes in training mode: source text, so that it pickles.

    Args:
        forwards: for the kinds of a call's arguments (keys of `KINDS`) the source of the forward that holds for them;
            any other call computes by the block's own forward.
        parameters: names of the own forward's positional parameters, as far as the optional ones are None by default.
        required: how many of them have no default.
        constants: activations that the sources name ``self._fused_activation_0`` and so on.
        tail: qualified name of the layer that takes the steps after the block's own call, if there is one.
        gives_parts: whether the output is a concatenation along channels, whose parts the forward can give instead.
        containers: what `children_of_containers` gave; where it has changed, the block computes by its own forward.
    """

    forwards: tuple[tuple[tuple[str, ...], str], ...]
    parameters: tuple[str, ...]
    required: int
    constants: tuple[Activation, ...] = ()
    tail: str | None = None
    gives_parts: bool = False
    containers: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Give a call's arguments by position, without a trailing None; or None where that cannot be said."""
        names, taken = self.parameters, 0
        while taken < len(kwargs) and len(args) < len(names) and names[len(args)] in kwargs:
            args += (kwargs[names[len(args)]],)
            taken += 1
        while len(args) > self.required and args[-1] is None:
            args = args[:-1]
        return args if taken == len(kwargs) and len(args) <= len(names) else None

    def knows_children_of(self, block: nn.Module) -> bool:
        """Whether no child has come or gone since the block was traced."""
        for path, names in self.containers:
            if tuple((_submodule(block, path) if path else block)._modules) != names:
                return False
        return True


def children_of_containers(block: nn.Module) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Give the names of a block's children, and of those in its containers, whose children it may call, by path."""
    found = [("", tuple(block._modules))]
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            found += [(f"{name}.{path}".rstrip("."), names) for path, names in children_of_containers(child)]
    return tuple(found)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for name in path.split("."):
        child = module._modules[name]
        module = module if child is None else child  # not by its truth: an empty Sequential is false
    return module
