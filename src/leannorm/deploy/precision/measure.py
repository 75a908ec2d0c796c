"""What layers give on calibration data: their ranges, and the errors that a number format brings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from leannorm.deploy.precision.formats import FLOATS, activation_scale, relative_error, rounded_weights
from leannorm.deploy.precision.layers import Layer, constant
from leannorm.deploy.precision.mixed import with_casts, with_nodes

CHUNK = 8  # samples whose values are held at once
SAMPLE = 16  # samples that single layers are rounded on

Bounds = tuple[np.ndarray, np.ndarray]


@dataclass
class Range:
    """What is known of a value over all calibration data; counts are of its elements."""

    low: float = np.inf
    high: float = -np.inf
    elements: int = 0
    nonzero: int = 0
    below: int = 0
    above: int = 0
    outside: int = 0

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))

    def add(self, values: np.ndarray, bounds: Bounds | None, axis: int) -> None:
        """Take more values in; ``bounds`` are those of the channels along ``axis``."""
        if not values.size:
            return
        magnitudes, fp16 = np.abs(values), FLOATS["fp16"]
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.elements += values.size
        self.nonzero += int(np.count_nonzero(values))
        self.below += int(((magnitudes > 0) & (magnitudes < fp16.smallest_normal)).sum())
        self.above += int((magnitudes > fp16.largest).sum())
        if bounds is not None:
            shape = [1] * values.ndim
            shape[axis] = -1
            low, high = (bound.reshape(shape) for bound in bounds)
            self.outside += int(((values < low) | (values > high)).sum())


def underflow(values: np.ndarray) -> float:
    """The share of non-zero values that are below fp16's smallest normal number."""
    found = Range()
    found.add(values, None, 0)
    return share(found.below, found.nonzero)


def share(part: int, whole: int) -> float:
    """A share, 0 of nothing."""
    return part / whole if whole else 0.0


def ranges(
    model: onnx.ModelProto, layers: Collection[Layer], batches: Iterable[Any], bounds: Mapping[str, Bounds]
) -> tuple[dict[str, Range], np.ndarray]:
    """Run an fp32 model over calibration data.

    Args:
        model: with one input.
        layers: those of the model.
        batches: inputs; of a tuple the first item is the input.
        bounds: predicted range per channel of layers' outputs, by the output's name.

    Returns:
        The range of every fp32 value that a node reads or writes, by name, and the first `SAMPLE` inputs.

    Raises:
        ValueError: if there are no batches, or a value is NaN or infinite.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    names = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    given = model.graph.input[0].name
    watched = [name for node in model.graph.node for name in node.output if name in names]
    axes = {layer.output: layer.channel_axis for layer in layers}
    found = {name: Range() for name in (given, *watched)}
    session = Runner(model, watched)
    sample: list[np.ndarray] = []
    for chunk in chunks(batches):
        if sum(map(len, sample)) < SAMPLE:
            sample.append(chunk)
        found[given].add(chunk, None, 0)
        for name, value in zip(watched, session(chunk), strict=True):
            if not np.isfinite(value).all():
                raise ValueError(f"the fp32 file itself gives NaN or infinity at {name}: there is nothing to plan for")
            found[name].add(value, bounds.get(name), axes.get(name, 0))
    if not sample:
        raise ValueError("a precision plan needs calibration batches, got none")
    return found, np.concatenate(sample)[:SAMPLE]


def chunks(batches: Iterable[Any]) -> Iterator[np.ndarray]:
    """Inputs of at most `CHUNK` samples."""
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) else batch
        images = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
        for i in range(0, len(images), CHUNK):
            yield images[i : i + CHUNK]


class Runner:
    """A model in memory as a callable that returns some of its values."""

    def __init__(self, model: onnx.ModelProto, values: Iterable[str]) -> None:
        watched = onnx.ModelProto()
        watched.CopyFrom(model)
        held = {output.name for output in model.graph.output}
        self._values = list(values)
        for name in dict.fromkeys(self._values):
            if name not in held:
                watched.graph.output.add(name=name)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(
            watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def __call__(self, inputs: np.ndarray) -> list[np.ndarray]:
        """Give the values for a batch."""
        return [np.asarray(value) for value in self._session.run(self._values, {self._input: inputs})]


class Rounding:
    """The errors of rounding one layer of a model, on the sample.

    Args:
        model: the fp32 model.
        found: ranges of its values (`ranges`).
        sample: inputs.
    """

    def __init__(self, model: onnx.ModelProto, found: Mapping[str, Range], sample: np.ndarray) -> None:
        self._model, self._found, self._sample = model, found, sample
        self._outputs = [output.name for output in model.graph.output]

    def exact(self, layer: Layer) -> list[np.ndarray]:
        """The layer's output and the model's, unrounded."""
        return Runner(self._model, [layer.output, *self._outputs])(self._sample)

    def errors(self, layer: Layer, kind: str, expected: list[np.ndarray]) -> tuple[float, float]:
        """Relative errors at the layer and at the model's outputs where that layer alone is rounded to a format.

        ``expected`` are the values without (`exact`).
        """
        got = Runner(self._rounded(layer, kind), [layer.output, *self._outputs])(self._sample)
        at_outputs = [np.concatenate([value.ravel() for value in side[1:]]) for side in (got, expected)]
        return relative_error(got[0], expected[0]), relative_error(*at_outputs)

    def _rounded(self, layer: Layer, kind: str) -> onnx.ModelProto:
        if kind in FLOATS:
            return with_casts(self._model, {layer.node: kind}, explicit=True)
        weight = f"{layer.weight}.int8"
        whole = rounded_weights(constant(self._model, layer.weight), layer.weight_axis)
        constants = [numpy_helper.from_array(whole, weight)]
        nodes = []
        for node in self._model.graph.node:
            if node.name != layer.node:
                nodes.append(node)
                continue
            rounded = onnx.NodeProto()
            rounded.CopyFrom(node)
            rounded.input[0], rounded.input[1] = f"{layer.input}.int8", weight
            nodes += [*self._quantized(layer.input, layer.input, rounded.input[0], constants), rounded]
            if layer.operator.startswith("Conv"):  # the results of matrix products stay float
                rounded.output[0] = f"{layer.output}.exact"
                nodes += self._quantized(layer.output, rounded.output[0], layer.output, constants)
        return with_nodes(self._model, nodes, constants)

    def _quantized(
        self, value: str, source: str, result: str, constants: list[TensorProto]
    ) -> tuple[onnx.NodeProto, onnx.NodeProto]:
        """Nodes that round ``source`` to 8 bits, over the range of ``value``; their constants are appended."""
        scale, zero = activation_scale(self._found[value].low, self._found[value].high)
        names = [f"{result}.scale", f"{result}.zero"]
        arrays = np.asarray(scale), np.asarray(zero)
        constants += [numpy_helper.from_array(array, name) for name, array in zip(names, arrays, strict=True)]
        whole = f"{result}.whole"
        return (
            helper.make_node("QuantizeLinear", [source, *names], [whole], name=f"quantize_{result}"),
            helper.make_node("DequantizeLinear", [whole, *names], [result], name=f"dequantize_{result}"),
        )
