"""Layers under torch.compile, checkpointing, torch.export and ONNX export."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import leannorm
from leannorm import parse_statistics
from leannorm.functional import batch_norm


def network(source="grid:1/8@step", activation="relu"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        leannorm.BatchNorm2d(8, activation=activation),
        nn.Conv2d(8, 8, 3),
        leannorm.BatchNorm2d(8, momentum=None, guard_nonfinite=True),
    )
    return leannorm.convert(model, parse_statistics(source))[0]


@pytest.mark.parametrize("decomposes", [False, True])
@pytest.mark.parametrize("source", ["grid:1/8@step", "bs:1/4", "fs:1/8@step+vdn:1", "grid:1/8@between_steps", "full"])
def test_twenty_compiled_steps_compile_once_and_train_as_eager_does(source, decomposes):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for compiled in (False, True):
        model = network(source)
        model[1].decomposes = model[3].decomposes = decomposes
        step = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        torch.manual_seed(1)
        for _ in range(20):
            loss = step(torch.randn(8, 3, 16, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append((loss, model.state_dict()))
    assert counter.frame_count == 1
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("source", ["full", "grid:1/4@step", "fs:1/4+vdn:1"])
@pytest.mark.parametrize(
    ("activation", "residual", "affine", "dtype"),
    [
        ("relu", True, True, torch.float32),
        ("relu6", True, False, torch.bfloat16),
        ("silu", True, True, torch.bfloat16),
        ("gelu", False, False, torch.float32),
        (None, True, True, torch.float32),
    ],
)
def test_what_is_decomposed_has_no_operator_of_ours_and_gives_the_same(source, activation, residual, affine, dtype):
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    x, extra, dy = (torch.randn(4, 5, 8, 8, generator=generator).to(dtype) for _ in range(3))
    weight, bias = torch.randn(2, 5, generator=generator) if affine else (None, None)
    leaves = [t.requires_grad_() for t in (x, weight, bias, extra if residual else None) if t is not None]
    targets: list[str] = []

    def run(decomposed):
        statistics = parse_statistics(source).regions(tuple(x.shape))
        y, mean, var = batch_norm(
            x, weight, bias, statistics=statistics, residual=extra if residual else None, activation=activation,
            decomposed=decomposed,
        )  # fmt: skip
        return y, mean, var

    def record(module, inputs):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    results = []
    for compiled, decomposed in ((False, True), (True, True)):
        torch.manual_seed(3)
        y, mean, var = (torch.compile(run, fullgraph=True, backend=backend) if compiled else run)(decomposed)
        assert not any(statistic.requires_grad for statistic in (mean, var))
        results.append([y.detach(), mean, var, *torch.autograd.grad(y, leaves, dy)])
    assert any("relu" in t or "mul" in t for t in targets)
    assert not any("leannorm" in target for target in targets)
    tolerance = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 5e-3}
    torch.testing.assert_close(*results, **tolerance)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_two_equal_layers_draw_different_places_and_steps_too_when_compiled(backend):
    torch._dynamo.reset()
    model = nn.ModuleList(
        leannorm.BatchNorm2d(1, momentum=1.0, statistics=leannorm.BatchSampling(1 / 64, minimum=1)) for _ in range(2)
    )

    @torch.compile(fullgraph=True, backend=backend)
    def run(x):
        return model[0](x) + model[1](x)

    x = torch.randn(64, 1, 2, 2)
    means = []
    for _ in range(3):
        run(x)
        means += [layer.running_mean.item() for layer in model]
    assert len(set(means)) > 3


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("source", ["full", "grid:1/8@step", "bs:1/4"])
def test_checkpoint_gives_the_same_gradients_and_moves_the_buffers_once(source, reentrant):
    results = []
    for checkpointed in (False, True):
        model = network(source)
        x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        torch.manual_seed(1)
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        results.append(([p.grad for p in model.parameters()], list(model.buffers()), x.grad))
        assert model[1].num_batches_tracked == 1
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "silu", "hardswish", "gelu"])
def test_eval_mode_exports_to_plain_operators(activation):
    model = network("fs:1/8+vdn:1", activation).eval()
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(model, (x,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in names), names
    torch.testing.assert_close(program.module()(x), model(x))


def test_onnx_export_of_an_unfolded_model(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = network("grid:1/8", "hardswish").eval()
    x = torch.randn(2, 3, 16, 16)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source", ["grid:1/4", "fs:1/4@step", "bs:1/4"])
def test_compiled_layers_take_other_shapes(source):
    torch._dynamo.reset()
    layer = leannorm.BatchNorm2d(3, statistics=parse_statistics(source))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for shape in ((8, 3, 16, 16), (8, 3, 12, 12), (5, 3, 12, 14)):
        assert compiled(torch.randn(shape)).shape == shape
