"""What all methods have in common: gradients, state, precision, compiler, checkpointing."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import leannorm
from cases import METHODS
from leannorm import parse_target
from method_cases import TRAINED_WITH, WITH_LAYER, Net, arguments, call, converted, trained

READ_STATE = ("renorm", "mabn", "accumulated", "diminishing", "mixture")


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("spelling", METHODS)
def test_gradients(spelling, steps):
    """For all but what has no gradient by definition: rounding, averages, r and d, whose formulas have other tests."""
    if spelling.startswith("wageubn"):
        spelling = "wageubn:40@statistics_bits=40,gradient_bits=40"  # so fine that rounding is none
    if spelling.startswith("mabn"):
        spelling = "mabn:2@warmup=99"
    if spelling.startswith("renorm"):
        spelling = "renorm:1@d_max=0"
    if spelling.startswith("mixture"):
        steps = max(steps, 1)  # the first batch places the components, without a gradient
    layer = trained(spelling, steps, torch.float64).bn1
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    x = torch.randn(5, 8, 4, dtype=torch.float64).requires_grad_()
    lengths = {"lengths": torch.tensor([4, 2, 3, 0, 1])} if spelling == "masked" else {}

    def run(x, *parameters):
        twin = copy.deepcopy(layer)
        twin.length_mark = None
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(twin, dict(zip(names, parameters, strict=True)), (x,), lengths)

    torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_an_averaged_gradient_has_no_derivative():
    layer = trained("mabn:2").bn1
    x = torch.randn(5, 8, 4).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("spelling", METHODS)
def test_state_travels(spelling):
    model = trained(spelling)
    expected = call(model.eval(), spelling)
    loaded = converted(spelling).eval()
    loaded.load_state_dict(model.state_dict())
    for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(twin, spelling), expected)
        assert torch.equal(call(twin.train(), spelling, 7), call(copy.deepcopy(model).train(), spelling, 7))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spelling", [s for s in WITH_LAYER if s != "masked"])
def test_residual_and_activation(spelling, training):
    layer = trained(spelling).bn1.train(training)
    x, residual = torch.randn(2, 6, 8, 5).unbind()
    expected = torch.relu(copy.deepcopy(layer)(x) + residual)
    torch.testing.assert_close(layer(x, residual, "relu"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", WITH_LAYER)
def test_half_inputs(spelling, dtype):
    layer, exact = trained(spelling).bn1, trained(spelling, dtype=torch.float64).bn1
    x = torch.randn(6, 8, 9, dtype=torch.float64).to(dtype)
    lengths = {"lengths": torch.tensor([9, 3, 4, 5, 6, 7])} if spelling == "masked" else {}
    for training in (True, False):
        y = layer.train(training)(x, **lengths)
        assert y.dtype == dtype
        atol = 0.05 if spelling.startswith(("wageubn", "mixture")) else 0.03
        torch.testing.assert_close(y.double(), exact.train(training)(x.double(), **lengths), rtol=2e-2, atol=atol)


@pytest.mark.parametrize("spelling", TRAINED_WITH)
def test_autocast(spelling):
    model, exact = converted(spelling), converted(spelling)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(model, spelling, step)
        expected = call(exact, spelling, step)
        torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
        y.float().square().mean().backward()
    assert model.bn1.weight.grad.dtype == torch.float32
    assert all(buffer.dtype != torch.bfloat16 for buffer in model.buffers())


# what torch's compiler says of its own code
@pytest.mark.filterwarnings("ignore:.*should not be instantiated", "ignore:The .grad attribute of a Tensor that is not")
@pytest.mark.parametrize(
    ("backend", "spelling"),
    [("aot_eager", s) for s in METHODS] + [pytest.param("inductor", s, marks=pytest.mark.slow) for s in TRAINED_WITH],
)
def test_compiled_steps_compile_once_and_train_as_eager_does(spelling, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    results = []
    for compiled in (False, True):
        model = converted(spelling)
        step = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for seed in range(12):
            loss = call(step, spelling, seed).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append((loss, model.state_dict()))
    assert counter.frame_count == 1
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("spelling", [s for s in WITH_LAYER if s != "masked"])
def test_activation_checkpointing_is_exact_or_refused(spelling):
    model = trained(spelling)
    x = torch.randn(6, 8, 5)
    plain = copy.deepcopy(model.bn1)
    if spelling.startswith(READ_STATE):
        y = checkpoint(model.bn1, x.clone().requires_grad_(), use_reentrant=False)
        with pytest.raises(RuntimeError, match="leave the layer out of activation checkpointing"):
            y.sum().backward()
        return
    results = []
    for layer, run in ((plain, plain), (model.bn1, lambda x: checkpoint(model.bn1, x, use_reentrant=False))):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        results.append([leaf.grad, *layer.buffers()])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("spelling", WITH_LAYER)
def test_empty_batches_pass_and_move_nothing(spelling):
    layer = trained(spelling).bn1
    before = {name: b.clone() for name, b in layer.named_buffers() if name != "num_batches_tracked"}
    assert layer(torch.empty(0, 8, 5)).shape == (0, 8, 5)
    assert layer.eval()(torch.empty(0, 8, 5)).shape == (0, 8, 5)
    assert all(torch.equal(layer.get_buffer(name), b) for name, b in before.items())


@pytest.mark.parametrize("spelling", [s for s in WITH_LAYER if s not in ("masked", "none")])
def test_one_element_a_channel_raises(spelling):
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        converted(spelling).bn1(torch.randn(1, 8, 1))


@pytest.mark.parametrize("spelling", WITH_LAYER)
def test_nonfinite_values_are_kept_out_where_asked(spelling):
    model, _ = leannorm.convert(Net(), parse_target(spelling), guard_nonfinite=True)
    layer = model.bn1
    x = torch.randn(6, 8, 5)
    x[0, 3] = float("nan")
    lengths = {"lengths": torch.full((6,), 5)} if spelling == "masked" else {}
    layer(x, **lengths)
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()


def test_masked_layers_take_lengths_of_shorter_maps_and_forget_them():
    model = converted("masked")
    x, lengths = arguments("masked")
    seen = []
    hook = model.bn2.register_forward_pre_hook(lambda layer, args: seen.append(layer._mask(args[0]).sum(-1).flatten()))
    model(x, **lengths)
    hook.remove()
    assert seen[0].tolist() == [5, 5, 3, 3, 2, 5, 1, 5]  # ceil(length * 5 / 12)
    with pytest.raises(ValueError, match=r"call the converted model as model\(x, lengths=lengths\)"):
        model(x)
    with pytest.raises(ValueError, match="one length for each sample"):
        model(x, lengths=torch.tensor([3]))
    assert model.eval()(x).shape == model(x, lengths=lengths["lengths"]).shape
