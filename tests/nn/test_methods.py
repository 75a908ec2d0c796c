"""What all methods have in common: gradients, modes, state, precision, compiler, errors."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import leannorm
from cases import METHODS
from leannorm import parse_target
from leannorm.conversion.methods import has_method
from leannorm.methods import Method
from leannorm.nn import METHOD_LAYERS

PER_SAMPLE = ("gn:2", "in", "ln")
WITH_LAYER = [spelling for spelling in METHODS if spelling not in PER_SAMPLE]
TRAINED_WITH = [
    s for s in METHODS if s.startswith(("gn", "renorm", "mabn", "ghost", "accumulated", "adaptive", "masked"))
]
READ_STATE = ("renorm", "mabn", "accumulated", "diminishing", "mixture")


class Net(nn.Module):
    """Two normalized convolutions over sequences, so that masked statistics fit, too."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 4, 3, stride=2, bias=False), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


def converted(spelling, dtype=torch.float32):
    torch.manual_seed(0)
    return leannorm.convert(Net().to(dtype), parse_target(spelling))[0]


def arguments(spelling, seed=0, dtype=torch.float32):
    x = torch.randn(8, 3, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    lengths = {"lengths": torch.tensor([12, 12, 7, 5, 3, 12, 1, 10])} if spelling == "masked" else {}
    return x, lengths


def call(model, spelling, seed=0, dtype=torch.float32):
    x, lengths = arguments(spelling, seed, dtype)
    return model(x, **lengths)


def trained(spelling, steps=3, dtype=torch.float32):
    model = converted(spelling, dtype)
    for step in range(steps):
        call(model, spelling, step, dtype).square().mean().backward()
    model.zero_grad()
    return model


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


@pytest.mark.parametrize("spelling", METHODS)
def test_revert_computes_the_same_in_eval_mode_or_refuses(spelling):
    model = trained(spelling).eval()
    expected = call(model, spelling)
    names = set(Net().state_dict())
    _, report = leannorm.revert(model)
    if spelling in PER_SAMPLE or spelling.startswith(("mixture", "none")):
        assert {refusal.module for refusal in report.refusals} == {"bn1", "bn2"}
        assert call(model, spelling).equal(expected)
        return
    assert not report.refusals
    assert type(model.bn1) is nn.BatchNorm1d
    assert type(model.conv1) is nn.Conv1d
    assert set(model.state_dict()) == names
    assert vars(model.bn1).keys() == vars(Net().bn1).keys()
    tolerance = {"rtol": 0, "atol": 0.05} if spelling.startswith("wageubn") else {}
    torch.testing.assert_close(model(arguments(spelling)[0]), expected, **tolerance)


def test_revert_refuses_a_convolution_that_mixes_positions():
    model = converted("bnet:3")
    nn.init.normal_(model.bn1.kernel)
    _, report = leannorm.revert(model)
    assert [refusal.module for refusal in report.refusals] == ["bn1"]
    assert "mixes neighbouring positions" in report.refusals[0].reason
    _, report = leannorm.convert(model, leannorm.GhostBatch(4))
    assert "mixes neighbouring positions" in report.refusals[0].reason


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize(
    "first", ["grid:1/4", "vdn:1", "gn:2", "in", "renorm:3", "mabn:2", "bnet:3", "masked", "wageubn:8"]
)
def test_any_follows_any(first, second):
    model = trained(first, steps=1)
    gamma = torch.full((8,), 0.5)
    (model.bn1.weight if first != "bnet:3" else model.bn1.kernel[:, 0, 1]).data.copy_(gamma)
    _, report = leannorm.convert(model, parse_target(second))
    assert not report.refusals
    assert report.changes[0].action == f"statistics {parse_target(first)} -> {parse_target(second)}"
    fresh = converted(second)
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in fresh.modules()]
    found = model.bn1.kernel[:, 0, 1] if second == "bnet:3" else model.bn1.weight
    assert torch.equal(found, gamma)
    call(model, second).sum().backward()
    leannorm.convert(model, parse_target("grid:1/4"))
    if second not in ("mixture:2", "none"):
        assert str(model.bn1.statistics) == "grid:1/4"
        assert not has_method(model.bn1)


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
def test_frozen_layers_stay(spelling):
    model = trained(spelling)
    expected = call(copy.deepcopy(model).eval(), spelling)
    leannorm.freeze(model)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    torch.testing.assert_close(call(model.train(), spelling), expected)
    torch.testing.assert_close(dict(model.named_buffers()), buffers)
    leannorm.unfreeze(model)
    call(model, spelling)
    assert spelling == "none" or not torch.equal(model.bn1.running_var, buffers["bn1.running_var"])


@pytest.mark.parametrize("spelling", WITH_LAYER)
def test_recalibration_pools_exact_statistics_or_refuses(spelling):
    model = trained(spelling)
    exact = leannorm.revert(copy.deepcopy(model))[0]
    state = copy.deepcopy(model.state_dict())
    batches = [arguments("", seed)[0] for seed in range(3)]
    if not spelling.startswith(("renorm", "ghost", "accumulated", "adaptive", "bnet")):
        with pytest.raises(ValueError, match="no BN layer with running statistics"):
            leannorm.recalibrate(model, batches)
        torch.testing.assert_close(model.state_dict(), state)
        return
    leannorm.recalibrate(model, batches)
    leannorm.recalibrate(exact, batches)
    for name, buffer in exact.named_buffers():
        if "running" in name:
            torch.testing.assert_close(model.get_buffer(name), buffer)
    others = {name for name in state if "running" not in name}
    torch.testing.assert_close({name: model.state_dict()[name] for name in others}, {n: state[n] for n in others})
    assert not model.bn1.exact


def test_recalibration_goes_through_the_convolution_of_bnet():
    model = converted("bnet:3")
    nn.init.normal_(model.bn1.kernel)
    batches = [arguments("", seed)[0] for seed in range(3)]
    seen = []
    model.bn2.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    leannorm.recalibrate(model, batches)
    pooled = torch.cat(seen)
    torch.testing.assert_close(model.bn2.running_mean, pooled.mean([0, 2]))
    with torch.no_grad():
        y = model.conv1(batches[2])
        normalized = (y - y.mean([0, 2], keepdim=True)) / (y.var([0, 2], correction=0, keepdim=True) + 1e-5).sqrt()
        convolved = nn.functional.conv1d(normalized, model.bn1.kernel, model.bn1.bias, padding=1, groups=8)
    torch.testing.assert_close(seen[2], model.conv2(torch.relu(convolved)))


def test_converting_a_part_leaves_the_other_methods_whole():
    def first(module, name):
        return name == "bn1"

    model = converted("masked")
    leannorm.convert(model, leannorm.FullBatch(), filter_fn=first)
    call(model, "masked")
    model = converted("mabn:2")
    leannorm.convert(model, leannorm.FullBatch(), filter_fn=first)
    assert type(model.conv2).__name__ == "CenteredConv1d"
    leannorm.convert(model, leannorm.FullBatch())
    assert type(model.conv2) is nn.Conv1d


def test_timms_layer_keeps_its_activation_with_a_method():
    from leannorm.train.models import import_torchvision

    import_torchvision()
    norm_act = pytest.importorskip("timm.layers.norm_act")
    layer = norm_act.BatchNormAct2d(3, act_layer=nn.ReLU, inplace=False)
    model = nn.Sequential(layer)
    x = torch.randn(4, 3, 6, 6)
    expected = torch.relu(leannorm.nn.GhostBatchNorm(3, leannorm.GhostBatch(2))(x))
    leannorm.convert(model, leannorm.GhostBatch(2))
    torch.testing.assert_close(model(x), expected)
    _, report = leannorm.convert(model, leannorm.GroupNormalization(3))
    assert "applies relu" in report.refusals[0].reason
    leannorm.revert(model)
    assert type(layer) is norm_act.BatchNormAct2d


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


@pytest.mark.parametrize("spelling", [s for s in WITH_LAYER if s not in ("masked", "wageubn:8", "mixture:2")])
def test_fused_blocks_compute_methods_too(spelling):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)) + x)

    torch.manual_seed(0)
    model, _ = leannorm.convert(nn.Sequential(Block()), parse_target(spelling))
    expected = copy.deepcopy(model)
    _, report = leannorm.fuse(model)
    assert report.changes, report.refusals
    for _ in range(4):
        x = torch.randn(5, 4, 6, 6)
        torch.testing.assert_close(model(x), expected(x))


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


METHOD_CLASSES = sorted(Method.__subclasses__(), key=lambda method: method.name)


@given(st.data())
def test_spellings_are_read_back(data):
    cls = data.draw(st.sampled_from(METHOD_CLASSES))
    numbers = {"int": st.integers(1, 50), "float": st.floats(1, 50)}
    fields = {name: data.draw(numbers[kind]) for name, kind in cls.__annotations__.items() if kind in numbers}
    if "start" in fields:
        fields["r_end"] += fields["start"]
        fields["d_end"] += fields["start"]
    if cls is leannorm.EnhancedTransform:
        fields["kernel"] = data.draw(st.sampled_from([3, 5, 7]))
    if cls is leannorm.DiminishingAverage:
        fields["exponent"] = data.draw(st.floats(0, 1))
    if cls is leannorm.EightBitNormalization:
        fields = {name: value + 1 for name, value in fields.items()}
    method = cls(**fields)
    assert parse_target(str(method)) == method


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("ghost:0", "samples must be at least 1, got 0"),
        ("ghost:x", "'x' is not a whole number"),
        ("ghost:", "ghost takes no ''"),
        ("in:3", "in takes no '3'"),
        ("renorm:0.5", "r_max must be at least 1"),
        ("renorm:3@r_end=3", "r_end must be at least 5000"),
        ("renorm:3@speed=3", "renorm has no option 'speed=3'"),
        ("renorm:3@", "renorm has no option ''"),
        ("accumulated", "missing 1 required positional argument: 'steps'"),
        ("diminishing:2", "exponent must be at most 1"),
        ("bnet:4", "kernel must be 3, 5 or 7, got 4"),
        ("mabn:0", "batches must be at least 1"),
        ("mixture:0", "components must be at least 1"),
        ("wageubn:1", "bits must be at least 2"),
        ("ghost:3+grid:1/4", "allowed are"),
        ("grid:1/4+ghost:3", "'ghost' is a method, which stands alone"),
        ("gnn:3", r"is not a source, nor a method \(gn, in"),
    ],
)
def test_bad_spellings_say_what_is_wrong(spelling, says):
    with pytest.raises(ValueError, match=says):
        parse_target(spelling)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: leannorm.GhostBatch("32"), ValueError, "samples must be of type int, got '32'"),
        (lambda: leannorm.GhostBatch(True), ValueError, "samples must be of type int, got True"),
        (lambda: leannorm.BatchRenormalization(float("nan")), ValueError, "r_max must be finite and not negative"),
        (lambda: leannorm.BatchNorm2d(3, statistics=leannorm.GhostBatch(3)), TypeError, "leannorm.convert"),
        (lambda: leannorm.parse_statistics("ghost:3"), ValueError, "'ghost' is a method"),
        (lambda: leannorm.nn.GhostBatchNorm(3, leannorm.AccumulatedBatch(2)), TypeError, "takes GhostBatch, got"),
        (
            lambda: leannorm.nn.BatchRenorm(3, leannorm.BatchRenormalization(), track_running_stats=False),
            ValueError,
            "needs running statistics",
        ),
        (lambda: converted("ghost:3").bn1(torch.randn(2, 8, 3, 3)), ValueError, "expected 2D or 3D input"),
        (lambda: converted("in").bn1(torch.randn(8, 8)), ValueError, r"needs an \(N, C, L\) input"),
        (lambda: converted("bnet:3").bn1(torch.randn(8, 8)), ValueError, "over the 1 spatial dimensions"),
        (lambda: converted("ghost:3")(torch.ones(2, 3, 4).int()), RuntimeError, "Float|float|dtype|type"),
    ],
)
def test_bad_use_says_what_is_wrong(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_refusals_of_convert():
    model = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, affine=False),
        leannorm.BatchNorm2d(3, activation="relu"),
        leannorm.freeze(nn.BatchNorm2d(3))[0],
    )
    reasons = {}
    for spelling in ("adaptive", "bnet:3", "gn:3"):
        _, report = leannorm.convert(copy.deepcopy(model), parse_target(spelling))
        reasons |= {(spelling, refusal.module): refusal.reason for refusal in report.refusals}
    assert set(reasons) == {("adaptive", "0"), ("bnet:3", "1"), ("gn:3", "2"), ("gn:3", "3")}
    assert "track_running_stats=False" in reasons["adaptive", "0"]
    assert "affine=False" in reasons["bnet:3", "1"]
    assert "applies relu" in reasons["gn:3", "2"]
    assert "unfreeze it first" in reasons["gn:3", "3"]


def test_torchs_synchronizing_converter_drops_no_method_in_silence():
    for spelling in WITH_LAYER:
        with pytest.raises(RuntimeError, match=r"would drop the statistics.*leannorm\.revert"):
            nn.SyncBatchNorm.convert_sync_batchnorm(converted(spelling))


def test_every_method_has_a_layer_and_a_case():
    assert {*METHOD_LAYERS} | {type(parse_target(s)) for s in PER_SAMPLE} == {*METHOD_CLASSES}
    assert {type(parse_target(s)) for s in METHODS} == {*METHOD_CLASSES}
    assert all("Source:" in layer.__doc__ for layer in METHOD_LAYERS.values())
