from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from leannorm import verify
from leannorm.deploy.export import export_onnx
from leannorm.deploy.runtime import Session
from leannorm.quantize.static import quantize_int8


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    with torch.no_grad():  # one scale for all weights would lose most channels
        model[2].weight *= torch.logspace(-3, 0, 32)[:, None, None, None]
    model.eval()
    path = tmp_path_factory.mktemp("fp32") / "model.fp32.onnx"
    program = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    export_onnx(program, path, inputs=["images"], outputs=["logits"], metadata={"classes": "ten"})
    return model, path


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 3, 8, 8, generator=generator), torch.zeros(8)) for _ in range(count)]


def test_the_int8_file_is_close_small_and_takes_any_batch(fp32, tmp_path):
    model, path = fp32
    quantize_int8(path, tmp_path / "model.int8.onnx", iter(batches(4)))
    record = verify(model, Session(tmp_path / "model.int8.onnx"), [images for images, _ in batches(3, seed=1)])
    assert 1e-4 < record.relative_error < 0.05
    assert (tmp_path / "model.int8.onnx").stat().st_size < 0.5 * path.stat().st_size


def test_weights_are_int8_with_a_scale_a_channel_and_logits_stay_float(fp32, tmp_path):
    _, path = fp32
    quantize_int8(path, tmp_path / "model.int8.onnx", batches(2))
    model = onnx.load(tmp_path / "model.int8.onnx")
    onnx.checker.check_model(model, full_check=True)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight = producers[node.input[1]]
            assert weight.op_type == "DequantizeLinear"
            assert tensors[weight.input[0]].dtype == np.int8
            assert len(set(tensors[weight.input[1]].tolist())) == tensors[weight.input[1]].size > 1
            assert tensors[producers[node.input[0]].input[2]].dtype == np.uint8
    assert producers["logits"].op_type == "Gemm"


def test_metadata_is_kept_and_nothing_else_is_written(fp32, tmp_path):
    _, path = fp32
    quantize_int8(path, tmp_path / "model.int8.onnx", batches(1))
    assert [file.name for file in tmp_path.iterdir()] == ["model.int8.onnx"]
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.int8.onnx").metadata_props}
    assert properties == {"classes": "ten"}


def test_no_batches_is_an_error(fp32, tmp_path):
    with pytest.raises(ValueError, match="calibration batches, got none"):
        quantize_int8(fp32[1], tmp_path / "model.int8.onnx", [])
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_calibrating_leaves_the_old_file(fp32, tmp_path):
    def broken():
        yield batches(1)[0]
        raise OSError("truncated image")

    kept = tmp_path / "model.int8.onnx"
    kept.write_bytes(b"old")
    with pytest.raises(OSError, match="truncated image"):
        quantize_int8(fp32[1], kept, broken())
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.int8.onnx", b"old")]
