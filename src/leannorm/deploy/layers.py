"""What each layer of a model returned, under the name that the layer has in the model it was trained as."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from leannorm.graph.capture import layer_of

Values = dict[str, Tensor]

LAYER = "leannorm.layer"  # the property under which nodes of ONNX files carry the name


def observe(model: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Any, Values]:
    """Run a model and keep the results of its layers.

    Layers are modules without children, under their qualified names, with ``@k`` for the k-th further call. A module of
    an exported program knows them by its graph, where `fold` notes whose result a value is; a model with an ``observe``
    of its own (`leannorm.deploy.runtime.Session`) is asked. A compiled model, or a function, shows nothing.

    Returns:
        What the model returns, and the layers' results, in the order in which they came.
    """
    if hasattr(model, "observe"):
        return model.observe(*inputs)  # pyright: ignore[reportFunctionMemberAccess]
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        return model(*inputs), {}
    if isinstance(model, GraphModule) and any("nn_module_stack" in node.meta for node in model.graph.nodes):
        recorder = _Recorder(model)
        return recorder.run(*inputs), recorder.values
    return _hooked(model, inputs)


class _Recorder(Interpreter):
    """Runs a graph; the last value of a layer is its result."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.values: Values = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        layer = layer_of(n) if n.op == "call_function" else None
        if layer is not None and isinstance(result, Tensor):
            self.values.pop(layer, None)
            self.values[layer] = result.clone()  # a later layer may write to it
        return result


def _hooked(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, Values]:
    values: Values = {}
    calls: Counter[str] = Counter()

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                values[f"{name}@{calls[name]}" if calls[name] else name] = result.clone()
            calls[name] += 1

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if name and not list(module.children())]
    handles = [module.register_forward_hook(keep(name)) for name, module in leaves]
    try:
        return model(*inputs), values
    finally:
        for handle in handles:
            handle.remove()
