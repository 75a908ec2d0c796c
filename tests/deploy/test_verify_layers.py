"""Where a candidate goes wrong: each layer that both models have, for every form of a model."""

from __future__ import annotations

import io
import math

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from leannorm import fold, verify
from leannorm.deploy.export import export_onnx
from leannorm.deploy.layers import LAYER, observe
from leannorm.deploy.runtime import Session
from leannorm.quantize.static import quantize_int8

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


class Network(nn.Module):
    """Batch norms that go into the layer before, through a pool, into the layer after, and into a table."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.conv2, self.pool, self.bn2 = nn.Conv2d(6, 6, 1), nn.AvgPool2d(2), nn.BatchNorm2d(6)
        self.table, self.bn3, self.down, self.fc = (
            nn.BatchNorm2d(6),
            nn.BatchNorm2d(6),
            nn.AvgPool2d(3),
            nn.Linear(6, 4),
        )

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.table(self.relu(self.bn2(self.pool(self.conv2(x))))))
        return self.fc(self.down(self.bn3(x)).flatten(1))


# Without conv1, conv2, pool, bn3 and down, whose values the fold changes.
KEPT = ["bn1", "relu", "bn2", "relu@1", "table", "relu@2", "fc"]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = Network().eval()
    for norm in (network.bn1, network.bn2, network.bn3, network.table):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.bias)
    return network


@pytest.fixture(scope="module")
def program(model):
    return fold(torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.AUTO},)))[0]


@pytest.fixture(scope="module")
def file(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("shipped") / "model.onnx"
    export_onnx(program, path, inputs=["images"], outputs=["logits"], metadata={})
    return path


def loaded(program):
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream)


@pytest.mark.parametrize("form", ["module", "program", "loaded program", "decomposed program", "file"])
def test_layers_of_a_folded_model_are_compared_where_its_values_are_the_originals(form, model, program, file):
    candidates = {
        "module": lambda: fold(model, X)[0],
        "program": lambda: program,
        "loaded program": lambda: loaded(program),
        "decomposed program": lambda: program.run_decompositions(),
        "file": lambda: Session(file),
    }
    record = verify(model, candidates[form](), [X, X[:2]])
    fused = ("table",) if form == "module" else ()  # one operator with its activation
    assert [layer.layer for layer in record.layers] == [layer for layer in KEPT if layer not in fused]
    assert max(layer.relative_error for layer in record.layers) < 1e-5
    assert max(layer.maximum_error for layer in record.layers) < 1e-4
    assert record.first_wrong_layer is None
    assert record.passed
    assert record.samples == 6


def test_eager_models_are_compared_at_all_of_their_layers(model):
    record = verify(model, model, [X])
    names = ["conv1", "bn1", "relu", "conv2", "pool", "bn2", "relu@1", "table", "relu@2", "bn3", "down", "fc"]
    assert [layer.layer for layer in record.layers] == names
    assert {layer.relative_error for layer in record.layers} == {0.0}


@pytest.mark.parametrize(("parameter", "layer"), [("conv1.weight", "bn1"), ("conv2.bias", "bn2"), ("fc.weight", "fc")])
def test_the_first_wrong_layer_of_a_folded_model(parameter, layer, model):
    folded, _ = fold(model, X)
    with torch.no_grad():
        folded.get_parameter(parameter).mul_(-5)
    record = verify(model, folded, [X])
    assert record.first_wrong_layer == layer
    assert not record.passed
    wrong = {entry.layer: entry for entry in record.layers}[layer]
    assert wrong.relative_error > 0.01
    assert 0 < wrong.maximum_error < math.inf


def test_the_first_wrong_layer_of_a_file(model, file, tmp_path):
    proto = onnx.load(file)
    (weight,) = [tensor for tensor in proto.graph.initializer if tensor.name == "conv2.weight"]
    weight.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(weight), weight.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    record = verify(model, Session(tmp_path / "wrong.onnx"), [X])
    assert record.first_wrong_layer == "bn2"
    assert not record.passed


def test_a_wrong_layer_that_does_not_show_in_the_output_is_named(model):
    folded, _ = fold(model, X)
    record = verify(model, folded, [X], max_error=0.0)
    assert record.first_wrong_layer == next(entry.layer for entry in record.layers if entry.relative_error > 0)


def test_nan_inside_is_the_first_wrong_layer(model):
    folded, _ = fold(model, X)
    with torch.no_grad():
        folded.get_parameter("conv2.bias")[0] = math.nan
    record = verify(model, folded, [X])
    assert record.first_wrong_layer == "bn2"
    assert math.isnan({entry.layer: entry for entry in record.layers}["bn2"].relative_error)


def test_an_int8_file_is_compared_layer_by_layer(model, file, tmp_path):
    quantize_int8(file, tmp_path / "int8.onnx", [X])
    record = verify(model, Session(tmp_path / "int8.onnx"), [X], max_error=0.2)
    assert {entry.layer for entry in record.layers} <= set(KEPT)
    assert {"bn1", "table"} <= {entry.layer for entry in record.layers}
    assert 0 < max(entry.relative_error for entry in record.layers) < 0.2


def test_compiled_models_and_functions_show_outputs_alone(model):
    compiled = torch.compile(model, backend="eager")
    for candidate in (compiled, lambda x: model(x)):
        record = verify(model, candidate, [X])
        assert record.passed
        assert record.layers == ()
        assert record.first_wrong_layer is None


def test_a_layer_is_kept_as_it_was_before_another_writes_to_it(model):
    _, values = observe(model, (X,))
    assert (values["bn1"] < 0).any()
    assert torch.equal(values["relu"], F.relu(values["bn1"]))


def test_hooks_are_gone_after_an_error(model):
    with pytest.raises(RuntimeError):
        observe(model, (torch.randn(1, 5, 8, 8),))
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_of_other_shapes_are_left_out():
    wide, narrow = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    record = verify(wide.eval(), narrow.eval(), [torch.randn(2, 3)])
    assert [entry.layer for entry in record.layers] == ["1"]


def test_the_file_names_each_layer_once(file):
    nodes = onnx.load(file).graph.node
    layers = [entry.value for node in nodes for entry in node.metadata_props if entry.key == LAYER]
    assert set(layers) == set(KEPT)
