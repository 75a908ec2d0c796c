"""An exported program as one ONNX file: any batch, checked, whole or not there at all."""

from __future__ import annotations

import ast
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from leannorm.deploy.layers import LAYER
from leannorm.graph.capture import layer_of

try:
    import onnx
    import onnxscript  # noqa: F401  torch.onnx.export needs it, and says so less plainly
except ImportError as missing:
    raise ImportError(
        f"shipping needs onnx and onnxscript: pip install 'leannorm[deploy]' (got: {missing})"
    ) from missing


def export_onnx(
    program: ExportedProgram,
    path: str | Path,
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    metadata: Mapping[str, str],
) -> None:
    """Write a program as an ONNX file.

    A free dimension 0 of the first input is named ``batch``. The stack traces that torch attaches to every node are
    left out: they hold the source code and its place on this machine. Nodes whose value is a layer's result in the
    original model carry that layer's name (`LAYER`).

    Args:
        program: a folded program whose batch is free.
        path: the file; it is written under another name in the same folder first.
        inputs: names of the graph's inputs.
        outputs: names of the graph's outputs.
        metadata: properties of the model, such as the names of the classes.

    Raises:
        ValueError: if the program takes one size of batch only.
        onnx.checker.ValidationError: if the result is not valid ONNX.
    """
    with warnings.catch_warnings():
        # torch copies pytrees through a class that it deprecated itself
        warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated", category=FutureWarning)
        exported = torch.onnx.export(program, dynamo=True, verbose=False, input_names=inputs, output_names=outputs)
    assert exported is not None
    model = exported.model_proto
    _name_layers(model.graph, exported.exported_program or program)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    if not batch:
        raise ValueError("the model takes one size of batch only: export it with a free dimension 0")
    _rename_dimension(model.graph, batch, "batch")
    _drop_traces(model.graph)
    onnx.helper.set_model_props(model, dict(metadata))
    save(model, path)


def add_metadata(path: str | Path, metadata: Mapping[str, str]) -> None:
    """Add properties to a file, or replace those of the same names; what it computes stays as it is."""
    model = onnx.load(path)
    kept = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, kept | dict(metadata))
    save(model, path)


def save(model: onnx.ModelProto, path: str | Path) -> None:
    """Check a model and write it through a temporary name in the same folder.

    Raises:
        onnx.checker.ValidationError: if it is not valid ONNX.
    """
    path = Path(path)
    onnx.checker.check_model(model, full_check=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        onnx.save(model, temporary)
        temporary.replace(path)


def _values(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    return [*graph.input, *graph.output, *graph.value_info]


def _rename_dimension(graph: onnx.GraphProto, old: str, new: str) -> None:
    for value in _values(graph):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == old:
                dimension.dim_param = new


def _name_layers(graph: onnx.GraphProto, program: ExportedProgram) -> None:
    layers = {node.name: layer_of(node) for node in program.graph.nodes if node.op == "call_function"}
    for node in graph.node:
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes":  # the last of these names is the program's node
                layer = layers.get(ast.literal_eval(entry.value)[-1])
                if layer is not None:
                    node.metadata_props.add(key=LAYER, value=layer)
                break


def _drop_traces(graph: onnx.GraphProto) -> None:
    for part in (*graph.node, *_values(graph), *graph.initializer):
        kept = [entry for entry in part.metadata_props if not entry.key.startswith("pkg.")]
        del part.metadata_props[:]
        part.metadata_props.extend(kept)
