from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim

from leannorm import fold, verify
from leannorm.deploy.export import export_onnx, save
from leannorm.deploy.normalization import normalization_nodes
from leannorm.deploy.runtime import Session, latency_ms

NAMES = {"inputs": ["images"], "outputs": ["logits"]}


def network():
    layers = [nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(6, 4), nn.BatchNorm1d(4))
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
    return model.eval()


def program_of(model, batch=Dim.AUTO):
    return torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: batch},))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    model = network()
    program, _ = fold(program_of(model))
    path = tmp_path_factory.mktemp("shipped") / "model.onnx"
    export_onnx(program, path, **NAMES, metadata={"classes": json.dumps(["ä", "b"]), "statistics": "grid:1/32"})
    return model, path


def test_the_file_computes_what_the_model_does_for_any_batch(shipped):
    model, path = shipped
    record = verify(model, Session(path), [torch.randn(n, 3, 8, 8) for n in (1, 2, 5)], max_error=1e-5)
    assert record.passed
    assert record.samples == 8


def test_the_file_is_one_checked_graph_that_names_its_batch(shipped):
    _, path = shipped
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "logits"]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_no_normalization_and_no_trace_of_this_machine_is_in_the_file(shipped):
    _, path = shipped
    assert normalization_nodes(onnx.load(path)) == ()
    for text in (b"stack_trace", b".py", b"/home", b"site-packages"):
        assert text not in path.read_bytes()


def test_metadata_is_in_the_file(shipped):
    _, path = shipped
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties == {"classes": json.dumps(["ä", "b"]), "statistics": "grid:1/32"}


def test_a_model_like_densenet_ships_without_normalization(tmp_path):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.conv1, self.norm2 = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.norm3, self.fc = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(7), nn.Linear(7, 5)

        def forward(self, x):
            new = self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())
            return self.fc(self.norm3(torch.cat([x, new], 1)).relu().mean((2, 3)))

    model = Dense().eval()
    for norm in (model.norm1, model.norm2, model.norm3):
        nn.init.normal_(norm.running_mean)
        nn.init.normal_(norm.weight)
    program, report = fold(program_of(model))
    assert [change.action.partition(" ")[0] for change in report.changes] == ["replaced", "folded", "replaced"]
    export_onnx(program, tmp_path / "model.onnx", **NAMES, metadata={})
    shipped = onnx.load(tmp_path / "model.onnx")
    assert normalization_nodes(shipped) == ()
    operators = [node.op_type for node in shipped.graph.node]
    assert [operators.count(name) for name in ("Mul", "Add", "Conv", "BatchNormalization")] == [2, 2, 2, 0]
    record = verify(model, Session(tmp_path / "model.onnx"), [torch.randn(n, 3, 8, 8) for n in (1, 3)], max_error=1e-5)
    assert record.passed


def test_an_unfolded_model_is_found_out(tmp_path):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval()
    export_onnx(program_of(model), tmp_path / "model.onnx", **NAMES, metadata={})
    (left,) = normalization_nodes(onnx.load(tmp_path / "model.onnx"))
    assert left.startswith("BatchNormalization ")


def test_one_size_of_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one size of batch only"):
        export_onnx(program_of(network(), Dim.STATIC), tmp_path / "model.onnx", **NAMES, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_model_is_not_written_and_the_old_file_stays(shipped, tmp_path):
    _, path = shipped
    broken = onnx.load(path)
    broken.graph.node[0].op_type = "NoSuchOperator"
    kept = tmp_path / "model.onnx"
    kept.write_bytes(b"old")
    with pytest.raises(onnx.checker.ValidationError):
        save(broken, kept)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.onnx", b"old")]


def test_a_failed_write_leaves_nothing(shipped, tmp_path, monkeypatch):
    _, path = shipped
    model = onnx.load(path)

    def fail(proto, file):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "save", fail)
    with pytest.raises(OSError, match="no space"):
        save(model, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_session_takes_arrays_and_says_how_many(shipped):
    model, path = shipped
    session = Session(path)
    x = torch.randn(2, 3, 8, 8)
    assert np.array_equal(session(x), session(x.numpy()))
    np.testing.assert_allclose(session(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"takes 1 inputs \(images\), got 2"):
        session(x, x)


def test_latency_is_the_median_of_single_calls():
    import time

    calls = []

    def model(x):
        calls.append(x)
        time.sleep(0.05 if len(calls) % 5 == 0 else 0.002)

    assert 2 <= latency_ms(model, (1,), seconds=0.2) < 20
    assert len(calls) >= 10
