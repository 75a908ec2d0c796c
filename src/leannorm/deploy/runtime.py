"""Run a shipped file in onnxruntime, and time any model at batch 1."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from leannorm.deploy.layers import LAYER

try:
    import onnxruntime
except ImportError as missing:
    raise ImportError(f"shipped files run in onnxruntime: pip install 'leannorm[deploy]' (got: {missing})") from missing

if TYPE_CHECKING:
    from collections.abc import Callable


class Session:
    """An ONNX file as a callable, on the CPU, with as many threads as torch uses.

    Args:
        path: the file.
        threads: of one run; None means as many as ``torch.get_num_threads()``, so that latencies compare.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.path = Path(path)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = tuple(node.name for node in self._session.get_inputs())
        self.outputs = tuple(node.name for node in self._session.get_outputs())

    def __call__(self, *inputs: Tensor | np.ndarray) -> Any:
        """Run on tensors or arrays; returns the one output as an array, or a tuple of all.

        Raises:
            ValueError: if the number of inputs is not the file's.
        """
        results = self._session.run(None, self._feeds(inputs))
        return results[0] if len(results) == 1 else tuple(results)

    def observe(self, *inputs: Tensor | np.ndarray) -> tuple[Any, dict[str, Tensor]]:
        """Run, and give the results of the layers that the file's nodes name beside what `__call__` returns.

        Needs onnx. The values come from a second session, whose further outputs keep the runtime from fusing across
        them: errors can differ slightly from those of the file as it runs.
        """
        session, layers = self._observer()
        values = session.run(list(layers.values()), self._feeds(inputs)) if layers else []
        return self(*inputs), {layer: torch.as_tensor(value) for layer, value in zip(layers, values, strict=True)}

    def _observer(self) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
        import onnx

        model = onnx.load(self.path)
        layers = {e.value: node.output[0] for node in model.graph.node for e in node.metadata_props if e.key == LAYER}
        held = {output.name for output in model.graph.output}
        for name in layers.values():
            if name not in held:
                model.graph.output.add(name=name)
        providers = ["CPUExecutionProvider"]
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=providers), layers

    def _feeds(self, inputs: tuple[Tensor | np.ndarray, ...]) -> dict[str, np.ndarray]:
        if len(inputs) != len(self.inputs):
            raise ValueError(
                f"{self.path} takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(inputs)}"
            )
        return {name: _array(value) for name, value in zip(self.inputs, inputs, strict=True)}


def latency_ms(model: Callable[..., Any], inputs: tuple[Any, ...], *, seconds: float = 0.5) -> float:
    """Median wall-clock milliseconds of one call, in inference mode.

    Args:
        model: a module, a `Session` or any callable that returns when its work is done (CPU).
        inputs: its arguments; give a batch of 1 for the latency that a device sees.
        seconds: how long to go on, after a tenth of that without timing; ten calls are timed at least.
    """
    times: list[float] = []
    with torch.inference_mode():
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds / 10:
            model(*inputs)
        begin = time.perf_counter()
        while len(times) < 10 or time.perf_counter() - begin < seconds:
            start = time.perf_counter()
            model(*inputs)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _array(value: Tensor | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
