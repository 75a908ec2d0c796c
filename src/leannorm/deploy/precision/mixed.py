"""An fp32 file rewritten by number formats a node: casts where formats meet, INT8 through `quantize_int8`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from leannorm.deploy.export import save
from leannorm.deploy.precision.formats import FLOATS, rounded, stored
from leannorm.quantize.static import quantize_int8


def write_mixed(source: str | Path, path: str | Path, types: Mapping[str, str], batches: Iterable[Any]) -> None:
    """Write a copy of an fp32 file in which each node computes in its number format.

    Args:
        source: the file.
        path: the new file; it is written under another name in the same folder first.
        types: of every node, by its name (`leannorm.deploy.precision.layers.spread`).
        batches: calibration inputs for INT8.

    Raises:
        ValueError: if INT8 is asked for without batches.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        if "int8" in types.values():
            quantized = Path(folder) / "quantized.onnx"
            exclude = [name for name, kind in types.items() if kind != "int8"]
            quantize_int8(source, quantized, batches, exclude=exclude)
            source = quantized
        save(with_casts(onnx.load(source), types), path)


def with_casts(model: onnx.ModelProto, types: Mapping[str, str], *, explicit: bool = False) -> onnx.ModelProto:
    """Rewrite nodes of an fp32 graph to compute in 16 bits, with as few casts as that takes.

    A value is cast once for all its readers of one format, and not at all between nodes of the same format; weights are
    stored in it.

    Args:
        model: the graph; it is not changed. Values that are not fp32, such as shapes, stay as they are.
        types: number formats of nodes, by name; "fp16" and "bf16" count.
        explicit: compute in fp32 but round what such nodes read and give through their format. That is what a
            runtime with native kernels and fp32 sums computes, also where this runtime skips the rounding.
    """
    rewriting = _Rewriting(model, types, explicit=explicit)
    nodes = rewriting.nodes(model.graph.node, {value.name for value in model.graph.output})
    return with_nodes(model, nodes, rewriting.constants.values())


def with_nodes(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], constants: Iterable[TensorProto]
) -> onnx.ModelProto:
    """A copy with other nodes and more constants, less the constants and value types that no node names any more."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
    read = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    _keep(graph.initializer, read)
    _keep(graph.value_info, {name for node in graph.node for name in node.output})
    return copy


class _Rewriting:
    """The new nodes of a graph, and the values that exist in 16 bits so far."""

    def __init__(self, model: onnx.ModelProto, types: Mapping[str, str], *, explicit: bool) -> None:
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._is_fp32 = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        self._is_fp32 |= {name for name, t in self._initializers.items() if t.data_type == TensorProto.FLOAT}
        self._types = {name: kind for name, kind in types.items() if kind in FLOATS}
        self._explicit = explicit
        self._casts: dict[tuple[str, str], str] = {}
        self.constants: dict[str, TensorProto] = {}

    def nodes(self, nodes: Iterable[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
        nodes = list(nodes)
        readers: dict[str, set[str | None]] = {name: {None} for name in outputs}  # None: in fp32
        for node in nodes:
            for name in node.input:
                readers.setdefault(name, set()).add(self._types.get(node.name))
        new: list[onnx.NodeProto] = []
        for node in nodes:
            kind = self._types.get(node.name)
            if kind is None:
                new.append(node)
                continue
            rewritten = onnx.NodeProto()
            rewritten.CopyFrom(node)
            for i, name in enumerate(node.input):
                if name in self._is_fp32:
                    rewritten.input[i] = self._read(name, kind, new)
            new.append(rewritten)
            for i, name in enumerate(node.output):
                if name in self._is_fp32:
                    rewritten.output[i] = self._write(name, kind, new, needed=readers.get(name, {None}) != {kind})
        return new

    def _read(self, name: str, kind: str, new: list[onnx.NodeProto]) -> str:
        """The name of a value in a format, made where there is none yet."""
        if (name, kind) not in self._casts:
            self._casts[name, kind] = f"{name}.{kind}"
            if name in self._initializers:
                self._store(name, kind)
            elif self._explicit:
                new += _cast(name, f"{name}.{kind}.stored", FLOATS[kind].onnx)
                new += _cast(f"{name}.{kind}.stored", f"{name}.{kind}", TensorProto.FLOAT)
            else:
                new += _cast(name, f"{name}.{kind}", FLOATS[kind].onnx)
        return self._casts[name, kind]

    def _store(self, name: str, kind: str) -> None:
        values = numpy_helper.to_array(self._initializers[name])
        new = f"{name}.{kind}"
        if self._explicit:
            self.constants[new] = numpy_helper.from_array(rounded(values, kind), new)
        else:
            self.constants[new] = helper.make_tensor(
                new, FLOATS[kind].onnx, values.shape, stored(values, kind), raw=True
            )

    def _write(self, name: str, kind: str, new: list[onnx.NodeProto], *, needed: bool) -> str:
        """The name under which a node in a format writes a value; ``needed`` in fp32 too, it is cast back."""
        if self._explicit:
            new += _cast(f"{name}.exact", f"{name}.stored", FLOATS[kind].onnx)
            new += _cast(f"{name}.stored", name, TensorProto.FLOAT)
            self._casts[name, kind] = name
            return f"{name}.exact"
        self._casts[name, kind] = f"{name}.{kind}"
        if needed:
            new += _cast(f"{name}.{kind}", name, TensorProto.FLOAT)
        return f"{name}.{kind}"


def _cast(source: str, result: str, kind: int) -> list[onnx.NodeProto]:
    return [helper.make_node("Cast", [source], [result], name=f"cast_{result}", to=kind)]


def _keep(entries: Any, names: set[str]) -> None:
    kept = [entry for entry in entries if entry.name in names]
    del entries[:]
    entries.extend(kept)
