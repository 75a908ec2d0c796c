"""Layers under `torch.fx` and `torch.jit.script`.

fx takes only modules of torch.nn for leaves of its graph, and runs the forward of all others on stand-ins, by whose
shapes no layer can choose regions. So a layer that is called with a stand-in records its own call, as a leaf's.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import fx, nn

from leannorm.nn.folding import is_observed


def is_traced(input: object) -> bool:
    """Whether an input is a stand-in of `torch.fx`."""
    return isinstance(input, fx.Proxy)


def record(layer: nn.Module, input: Any, *others: Any, **options: Any) -> Any:
    """Record a layer's call in the graph of the tracer whose stand-in the input is.

    Raises:
        TypeError: for a layer whose forward was replaced on the instance, which would be called once more.
    """
    if "forward" in vars(layer):
        raise TypeError(f"torch.fx cannot record a {type(layer).__name__} whose forward was set on the instance")
    args = [input, *others]
    while args[-1] is None:
        args.pop()
    options = {name: value for name, value in options.items() if value is not None}
    path = input.tracer.path_of_module(layer)
    if is_observed(layer):  # fx is tracing the layer's hooks around this call
        return input.tracer.create_proxy("get_attr", path, (), {}).forward(*args, **options)
    return input.tracer.create_proxy("call_module", path, tuple(args), options)


class Unscriptable:
    """Refuses `torch.jit.script`, which compiles no layer whose regions depend on the input's shape."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Answer `torch.jit.script`, which asks each module for what it is to compile in its place."""
        raise TypeError(
            f"torch.jit.script cannot compile a {type(self).__name__} of leannorm's: call leannorm.revert(model) "
            "first, take torch.export or torch.compile, or ship what leannorm.fold gives"
        )
