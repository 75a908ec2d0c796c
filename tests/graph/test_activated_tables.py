"""A table that nothing takes up is one operator with the addition and the activation behind it, or is left as it is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from leannorm.backends import cpu
from leannorm.functional import scale_shift
from leannorm.graph import fold
from leannorm.graph.activated_tables import check, match

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
native = pytest.mark.skipif(not cpu.available, reason="the extension was not built")


class After(nn.Module):
    """Batch normalization that nothing takes up, and what is done with its result y; x is its input."""

    def __init__(self, tail, norm=nn.BatchNorm2d):
        super().__init__()
        self.norm, self.tail = norm(5), tail

    def forward(self, x):
        x = torch.sin(x)
        return self.tail(self.norm(x), x)


def calls(module):
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return [node.target.__name__.partition(".")[0] for node in nodes]


@pytest.fixture
def kernels(monkeypatch):
    """The calls of the native kernel for given statistics: whether each had a residual, and its activation."""
    seen = []
    if cpu.available:
        kernel = cpu.eager._kernels["normalize", "cpu"]

        def count(*args):
            seen.append((args[5] is not None, args[7]))
            return kernel(*args)

        monkeypatch.setitem(cpu.eager._kernels, ("normalize", "cpu"), count)
    return seen


ACTIVATIONS = {
    "relu": (F.relu, "relu"),
    "relu_": (lambda z: F.relu(z, inplace=True), "relu"),
    "relu6": (F.relu6, "clamp"),
    "relu6_": (lambda z: F.relu6(z, inplace=True), "clamp"),
    "hardtanh": (lambda z: F.hardtanh(z, -0.5, 0.75), "clamp"),
    "clamp": (lambda z: z.clamp(-0.5, 0.75), "clamp"),
    "leaky_relu": (lambda z: F.leaky_relu(z, 0.2), "leaky_relu"),
    "silu": (F.silu, "silu"),
    "hardswish_": (lambda z: F.hardswish(z, inplace=True), "hardswish"),
    "gelu": (F.gelu, "gelu"),
    "gelu by tanh": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
}


@native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_table_and_its_activation_are_one_operator(name, dtype, layout, randomized, kernels):
    function, kind = ACTIVATIONS[name]
    model = randomized(After(lambda y, _: function(y)))
    x = torch.randn(3, 5, 6, 7).to(dtype).contiguous(memory_format=layout)
    folded, report = fold(model, x)
    assert calls(folded) == ["sin", "scale_shift"]
    assert report.changes[0].action.startswith("replaced by a scale and a shift per channel")
    kernels.clear()
    y = folded(x)
    assert kernels == [(False, kind)]
    assert (y.dtype, y.stride()) == (dtype, x.stride())
    wanted = copy.deepcopy(model).double()(x.double())
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(folded(x[:2]), y[:2])


def add_in_place(y, x):
    y += x
    return F.relu(y, inplace=True)


@native
@pytest.mark.parametrize(
    ("tail", "kind"),
    [
        (lambda y, x: F.silu(y + x), "silu"),
        (lambda y, x: F.relu(x + y), "relu"),
        (lambda y, x: torch.add(y, x, alpha=1), ""),
        (add_in_place, "relu"),
    ],
    ids=["add, silu", "other order", "add alone", "in place"],
)
def test_an_addition_and_its_activation_belong_to_it(tail, kind, randomized, kernels):
    model, x = randomized(After(tail)), torch.randn(3, 5, 6, 7)
    folded, _ = fold(model, x)
    assert calls(folded) == ["sin", "scale_shift"]
    kernels.clear()
    torch.testing.assert_close(folded(x), model(x), rtol=2e-6, atol=2e-6)
    assert kernels == [(True, kind)]


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d, (4, 5)), (nn.BatchNorm3d, (2, 5, 3, 2, 2))])
def test_any_rank_and_the_gradient(norm, shape, randomized):
    model, x = randomized(After(lambda y, x: F.gelu(y + x), norm)), torch.randn(shape, requires_grad=True)
    folded, _ = fold(model, x.detach())
    assert "scale_shift" in calls(folded)
    found, wanted = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (folded, model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@native
def test_what_the_kernel_does_not_take_is_computed_by_the_operators_there_were(randomized, kernels):
    model, x = randomized(After(lambda y, _: F.silu(y))).double(), torch.randn(2, 5, 4, 4).double()
    folded, _ = fold(model, x)
    assert calls(folded) == ["sin", "scale_shift"]
    constants = folded.norm.scale, folded.norm.shift
    assert torch.equal(folded(x), F.silu(torch.addcmul(constants[1], constants[0], x.sin())))
    wide = torch.randn(1, 5, 1, 1)
    broadcast = scale_shift(torch.ones(2, 5, 3, 3), torch.ones(5, 1, 1), torch.zeros(5, 1, 1), wide, "relu")
    assert torch.equal(broadcast, F.relu(1 + wide.expand(2, 5, 3, 3)))
    x, (scale, shift) = torch.randn(2, 5, 3, 5), torch.randn(2, 5)
    assert torch.equal(scale_shift(x, scale, shift), torch.addcmul(shift, scale, x))  # along the last dimension
    assert scale_shift(x.bfloat16(), scale.view(5, 1, 1), shift.view(5, 1, 1)).dtype == torch.float32
    assert kernels == []


@pytest.mark.parametrize("how", ["export", "strict export", "make_fx", "symbolic_trace", "compile", "fold again"])
def test_what_records_a_folded_module_sees_plain_operators(how, randomized):
    model, x = randomized(After(lambda y, x: F.hardswish(y + x))), torch.randn(2, 5, 4, 4)
    folded, _ = fold(model, x)
    assert "scale_shift" in calls(folded)
    match how:
        case "export" | "strict export":
            recorded = torch.export.export(folded, (x,), strict=how == "strict export").module()
        case "make_fx":
            recorded = torch.fx.experimental.proxy_tensor.make_fx(folded)(x)
        case "symbolic_trace":
            recorded = torch.fx.symbolic_trace(folded)
        case "compile":
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("eager")
            recorded = torch.compile(folded, fullgraph=True, backend=counter)
            recorded(x)
            assert not any("leannorm" in str(node.target) for node in counter.graphs[0].graph.nodes)
        case _:
            recorded, report = fold(folded, x)
            assert not report.refusals
    torch.testing.assert_close(recorded(x), model(x), rtol=2e-6, atol=2e-6)
    if how not in ("compile", "fold again"):
        assert not any("scale_shift" in str(node.target) for node in recorded.graph.nodes)


def test_a_program_and_its_onnx_file_hold_plain_operators(randomized, tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = randomized(After(lambda y, x: F.silu(y + x))), torch.randn(2, 5, 4, 4)
    program, _ = fold(torch.export.export(model, (x,)))
    module, _ = fold(model, x)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names == {"aten.sin.default", "aten.addcmul.default", "aten.add.Tensor", "aten.silu.default"}
    for given, arguments in ((program, ()), (module, (x,))):
        torch.onnx.export(given, arguments, tmp_path / "model.onnx", dynamo=True, verbose=False)
        file = onnx.load(tmp_path / "model.onnx")
        onnx.checker.check_model(file, full_check=True)
        assert {node.domain for node in file.graph.node} == {""}
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


def write_to_the_input(y, x):
    x.relu_()
    return F.relu(y + x)


def write_to_the_residual(y, x):
    other = x * 2
    other += y
    return other + other.relu()


REFUSED = {
    "the table is read twice": (lambda y, _: F.relu(y) + y, "its result is read by add too"),
    "two activations read it": (lambda y, _: F.relu(y) * F.silu(y), "its result is read by silu too"),
    "it is returned too": (lambda y, _: (F.relu(y), y), "its result is read by output too"),
    "it is added to itself": (lambda y, _: F.relu(y + y), "it is added to itself"),
    "a weighed addition": (lambda y, x: F.relu(torch.add(y, x, alpha=2)), "the addition weighs its operand by 2"),
    "a broadcast": (lambda y, x: F.relu(y + x[:1]), "what is added, slice_1, has another shape or dtype"),
    "another dtype": (lambda y, x: F.relu(y + x.double()), "what is added, to, has another shape or dtype"),
    "a write to the other operand": (write_to_the_residual, "the addition writes into mul"),
    "a write to its input": (write_to_the_input, "relu_ writes to its input in place"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_table_that_is_not_one_operator_with_what_follows_says_why(case, randomized):
    tail, reason = REFUSED[case]
    model, x = randomized(After(tail)), torch.randn(3, 5, 4, 4)
    folded, _ = fold(model, x)
    assert "scale_shift" not in calls(folded)
    (found,) = filter(None, map(match, folded.graph.nodes))
    assert check(found) == reason
    torch.testing.assert_close(folded(x), model(x), rtol=2e-6, atol=2e-6)


UNMATCHED = {
    "nothing follows": lambda y, _: y,
    "a bounded activation without bounds": lambda y, _: y.clamp(min=0.1),
    "bounds out of order": lambda y, _: y.clamp(1, -1),
    "bounds that are tensors": lambda y, _: y.clamp(torch.zeros(1), torch.ones(1)),
    "a slope whose sign says nothing": lambda y, _: F.leaky_relu(y, -0.1),
    "an activation of another kind": lambda y, _: torch.tanh(y),
    "the addition of a number": lambda y, _: F.relu(y + 1.0),
    "a multiplication": lambda y, x: F.relu(y * x),
    "a view between": lambda y, _: F.relu(y.flatten(1)),
}


@pytest.mark.parametrize("case", UNMATCHED)
def test_what_is_no_activation_or_addition_stays(case, randomized):
    model, x = randomized(After(UNMATCHED[case])), torch.randn(3, 5, 4, 4)
    folded, _ = fold(model, x)
    assert calls(folded)[:2] == ["sin", "addcmul"]
    assert not any(map(match, folded.graph.nodes))
    torch.testing.assert_close(folded(x), model(x), rtol=2e-6, atol=2e-6)


def test_an_activation_of_a_sum_that_others_read_stays_apart(randomized):
    def tail(y, x):
        total = y + x
        return F.relu(total) + total

    model, x = randomized(After(tail)), torch.randn(3, 5, 4, 4)
    folded, _ = fold(model, x)
    assert calls(folded) == ["sin", "scale_shift", "relu", "add"]
    torch.testing.assert_close(folded(x), model(x), rtol=2e-6, atol=2e-6)


def test_a_multiply_add_of_the_models_own_is_one_too_only_by_channel_constants():
    class Own(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return F.relu(torch.addcmul(self.shift, self.scale, x))

    x = torch.randn(3, 5, 4, 4)
    for shape, kept in (((5, 1, 1), False), ((4, 4), True), ((1, 1, 4), True), ((5, 4, 4), True)):
        model = Own(shape)
        folded, _ = fold(model.eval(), x)
        assert ("addcmul" in calls(folded)) is kept, shape
        torch.testing.assert_close(folded(x), model(x), rtol=2e-6, atol=2e-6)
