"""Post-training INT8: scales from calibration data, weights a channel each, quantise-dequantise form."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

try:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
except ImportError as missing:
    raise ImportError(f"INT8 needs onnx and onnxruntime: pip install 'leannorm[deploy]' (got: {missing})") from missing


class _Reader(CalibrationDataReader):
    """Batches as onnxruntime's calibration asks for them."""

    def __init__(self, name: str, batches: Iterator[Any]) -> None:
        self._name = name
        self._batches = batches

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]  None ends it
        batch = next(self._batches, None)
        if batch is None:
            return None
        images = batch[0] if isinstance(batch, tuple | list) else batch
        return {self._name: images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)}


def quantize_int8(
    source: str | Path, path: str | Path, batches: Iterable[Any], *, exclude: Collection[str] = ()
) -> None:
    """Write an INT8 copy of an ONNX file that has one input.

    Weights become signed 8-bit integers with a scale for each output channel; activations become unsigned 8-bit
    integers with one scale and zero point a tensor, taken from the smallest and largest value that calibration sees.
    onnxruntime multiplies this pair of types fastest on x86, and exactly where the processor has VNNI; older ones add
    pairs of products in 16 bits, which can saturate: verify on such a device itself.

    Args:
        source: the fp32 file; its metadata properties are kept.
        path: the INT8 file; it is written under another name in the same folder first.
        batches: calibration inputs, such as training batches; of a tuple the first item is the input.
        exclude: names of nodes that stay in fp32.

    Raises:
        ValueError: if there are no batches.
    """
    path, batches = Path(path), iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("INT8 needs calibration batches, got none")
    original = onnx.load(source)
    reader = _Reader(original.graph.input[0].name, itertools.chain([first], batches))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        inferred, temporary = Path(folder) / "inferred.onnx", Path(folder) / path.name
        # The exporter has optimised the graph; what calibration needs are the shapes.
        quant_pre_process(source, inferred, skip_optimization=True, skip_symbolic_shape=True)
        quantize_static(
            inferred,
            temporary,
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*_left_in_fp32(onnx.load(inferred).graph), *exclude],
            # Eight bits for logits would make near classes equal, and save nothing.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        model = onnx.load(temporary)
        onnx.helper.set_model_props(model, {entry.key: entry.value for entry in original.metadata_props})
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, temporary)
        temporary.replace(path)


def _left_in_fp32(graph: onnx.GraphProto) -> list[str]:
    """Name what exported group and instance normalization consist of: onnxruntime has no INT8 form of it."""
    constants = {tensor.name for tensor in graph.initializer}
    outputs = {node.output[0]: node for node in graph.node}
    names = []
    for node in graph.node:
        before = outputs.get(node.input[0]) if node.input else None
        around = before is not None and before.op_type == "InstanceNormalization"
        if node.op_type == "InstanceNormalization" or around or (node.input and set(node.input) <= constants):
            names.append(node.name)
    return names
