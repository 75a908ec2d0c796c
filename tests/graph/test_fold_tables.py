"""A batch normalization that no neighbour takes up becomes one multiply-add with constants per channel."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

from leannorm.graph import fold
from leannorm.graph.batch_norm import find
from leannorm.graph.rules.table import per_channel

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


class Activated(nn.Module):
    """Batch normalization between two activations: DenseNet's and the pre-activation ResNet's place for it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return F.relu(self.norm(F.relu(x)))


def calls(module):
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return [node.target.__name__.partition(".")[0] for node in nodes]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (3, 5)),
        (nn.BatchNorm1d, (3, 5, 7)),
        (nn.BatchNorm2d, (3, 5, 4, 2)),
        (nn.BatchNorm3d, (3, 5, 2, 3, 2)),
    ],
)
def test_one_multiply_add_for_any_rank(norm, shape, affine, randomized):
    model = randomized(Activated(norm(5, eps=0.1, affine=affine))).double()
    x = torch.randn(shape).double()
    folded, report = fold(model, x)
    assert calls(folded) == ["relu", "scale_shift"]  # with its activation
    (change,) = report.changes
    assert change.module == "norm"
    assert change.action.startswith("replaced by a scale and a shift per channel: it follows relu")
    torch.testing.assert_close(folded(x[:2]), model(x[:2]), rtol=1e-14, atol=1e-14)


def test_the_constants_are_buffers_beside_the_layers_names(randomized):
    folded, _ = fold(randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(5))), torch.randn(2, 5, 4, 4))
    assert {name: tuple(value.shape) for name, value in folded.named_buffers()} == {
        "1.scale": (5, 1, 1),
        "1.shift": (5, 1, 1),
    }
    assert not list(folded.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_map_is_kept(dtype, randomized):
    model = randomized(Activated(nn.BatchNorm2d(5)))  # with parameters in float32
    x = torch.randn(2, 5, 4, 4, dtype=dtype)
    folded, _ = fold(model, x)
    assert folded(x).dtype == model(x).dtype == dtype
    assert {buffer.dtype for buffer in folded.buffers()} == {dtype}
    torch.testing.assert_close(folded(x), model(x), rtol=3e-2, atol=3e-2)


def test_the_memory_layout_is_kept(randomized):
    model = randomized(Activated(nn.BatchNorm2d(5)))
    x = torch.randn(2, 5, 4, 4).to(memory_format=torch.channels_last)
    folded, _ = fold(model, x)
    assert folded(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_with_tables_saves_and_loads(randomized, decomposed):
    model = randomized(nn.Sequential(Activated(nn.BatchNorm2d(5)), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1)))
    program = export(model, (torch.randn(2, 5, 4, 4),), dynamic_shapes=({0: Dim("batch", max=64)},))
    if decomposed:
        program = program.run_decompositions()
    folded, report = fold(program)
    assert [change.action.partition(" ")[0] for change in report.changes] == ["replaced", "folded"]
    assert not list(find(folded.graph))
    file = io.BytesIO()
    torch.export.save(folded, file)
    file.seek(0)
    x = torch.randn(3, 5, 4, 4)
    for result in (folded, torch.export.load(file)):
        torch.testing.assert_close(result.module()(x), model(x))


@pytest.mark.parametrize("kind", ["symbolic trace", "exported module", "ATen graph"])
def test_an_fx_graph_folds_as_the_module_does(kind, randomized):
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Activated(nn.BatchNorm2d(4))))
    x = torch.randn(2, 3, 6, 6)
    if kind == "symbolic trace":
        graph = torch.fx.symbolic_trace(model)
    elif kind == "exported module":
        graph = export(model, (x,), dynamic_shapes=({0: Dim.AUTO},)).module()
    else:
        graph = torch.fx.experimental.proxy_tensor.make_fx(model, pre_dispatch=True)(x)
    folded, report = fold(graph, x)
    assert [change.action.partition(" ")[0] for change in report.changes] == ["folded", "replaced"]
    assert isinstance(folded, torch.fx.GraphModule)
    torch.testing.assert_close(folded(x), model(x))


def test_a_table_that_overflows_is_refused(randomized):
    model = randomized(Activated(nn.BatchNorm2d(3)))
    with torch.no_grad():
        model.norm.weight.fill_(1e8)
    x = torch.randn(2, 3, 4, 4).half()
    folded, report = fold(model, x)
    assert report.changes == ()
    assert report.refusals[0].reason.startswith("its scale and shift do not fit into torch.float16; it follows relu")
    assert len(list(find(folded.graph))) == 1


def test_two_norms_that_overflow_together_stay_two(randomized):
    model = randomized(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    with torch.no_grad():
        for norm in (model[1], model[2]):
            norm.weight.fill_(1e3)
            norm.running_mean.zero_()
            norm.bias.zero_()
    x = 1e-3 * torch.randn(2, 3, 4, 4).half()
    folded, report = fold(model, x)
    assert [change.action.partition(":")[0] for change in report.changes] == [
        "replaced by a scale and a shift per channel"
    ] * 2
    assert "the folded weights do not fit into torch.float16" in report.changes[0].action
    torch.testing.assert_close(folded(x), model(x), rtol=1e-2, atol=1e-2)


def test_an_operator_that_is_only_called_like_one_of_torch_is_none():
    with torch.library._scoped_library("mine", "DEF") as library:
        library.define("add(Tensor x, Tensor y) -> Tensor")
        library.impl("add", lambda x, y: x * y, "CompositeExplicitAutograd")
        library.impl("add", lambda x, y: torch.empty_like(x), "Meta")

        class Product(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x):
                return self.norm(torch.ops.mine.add(self.a(x), self.b(x)))

        model, x = Product().eval(), torch.randn(2, 3, 4, 4)
        with torch.no_grad():
            folded, report = fold(model, x)
            assert report.changes[0].action.startswith("replaced by")
            torch.testing.assert_close(folded(x), model(x))


def test_per_channel_broadcasts_over_all_but_dimension_1():
    constant = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert per_channel(constant, 2, torch.float32).shape == (2,)
    assert per_channel(constant, 4, torch.float32).shape == (2, 1, 1)
    assert per_channel(constant, 4, torch.bfloat16).dtype == torch.bfloat16
