"""The Triton kernels on a GPU: real sizes, the dispatcher, torch.compile, CUDA graphs, nothing that waits."""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

import leannorm
from cases import ACTIVATIONS, regions_of
from leannorm.bench import gate, layers
from leannorm.bench.plan import LayerPlan
from leannorm.bench.timing import graph_of
from leannorm.functional import batch_norm
from leannorm.ops import definition
from leannorm.statistics import Regions
from triton_interpreter import ON_GPU, launchers, poisoned

if not ON_GPU:
    pytest.skip("there is no GPU", allow_module_level=True)

OPS = torch.ops.leannorm
_NAMES = ("moments", "normalize", "gradient", "apply", "correct", "finish", "track")
KERNELS = [getattr(launchers, f"{name}_kernel") for name in _NAMES]


@pytest.fixture(scope="module", autouse=True)
def _float32_in_full():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _memory_for_the_others():
    yield  # several processes may test on the GPU
    torch.cuda.empty_cache()


def tensors(shape=(16, 24, 14, 14), dtype=torch.bfloat16, *, channels_last=True):
    generator = torch.Generator("cuda").manual_seed(0)
    x, residual, dy = (torch.randn(shape, device="cuda", generator=generator).to(dtype) for _ in range(3))
    if channels_last:
        x, residual, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual, dy))
    weight, bias = torch.randn(2, shape[1], device="cuda", generator=generator)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), residual.requires_grad_(), dy


def step(x, weight, bias, residual, dy, regions, activation="relu"):
    """Forward and backward."""
    y, mean, var = batch_norm(x, weight, bias, statistics=regions, residual=residual, activation=activation)
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    return y, mean, var, *torch.autograd.grad(y, inputs, dy)


def compiled_variants():
    return sum(len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values())


@pytest.mark.parametrize("operation", list(layers.OPERATIONS))
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", [(32, 64, 112, 112), (32, 256, 56, 56), (64, 2048, 7, 7), (61, 40, 29, 31)], ids=str)
def test_real_sizes_err_at_most_twice_as_much_as_torch(shape, layout, dtype, operation):
    plan = LayerPlan(device="cuda", statistics=("full", "fs:1/32", "grid:1/32@step", "bs:1/8"))
    case = layers.Case(operation, shape, layout, dtype, "cuda", seed=0)
    with poisoned():
        assert gate.failures(str(case), layers.check(case, plan)) == []


@pytest.mark.parametrize("source", ["full", "grid:1/8@step"])
def test_the_dispatcher_calls_the_kernels(monkeypatch, source):
    calls = []
    for name in ("batch_norm", "batch_norm_backward"):
        right = getattr(launchers, name)
        monkeypatch.setattr(launchers, name, lambda *a, name=name, right=right: calls.append(name) or right(*a))
    step(*tensors(), regions_of(source, (16, 24, 14, 14)))
    assert calls == ["batch_norm", "batch_norm_backward"]


@pytest.mark.parametrize("activation", ACTIVATIONS[:5], ids=str)
@pytest.mark.parametrize("source", ["full", "grid:1/8@step", "fs:1/8@step+vdn:1"])
def test_opcheck(source, activation):
    x, weight, bias, residual, dy = tensors((6, 5, 8, 8), torch.float32)
    regions = regions_of(source, tuple(x.shape))
    draw = torch.randint(0, 2**62, (regions.draws,), device="cuda") if regions.draws else None
    places = draw, list(regions.boxes), list(regions.weights)
    kind, parameters = (activation.kind, list(activation.parameters)) if activation else ("", [])
    torch.library.opcheck(OPS.batch_norm, (x, weight, bias, residual, *places, 1e-5, kind, parameters))
    with torch.no_grad():
        y, mean, var = OPS.batch_norm(x, weight, bias, residual, *places, 1e-5, kind, parameters)
    at = (residual, None) if kind not in ("relu", "clamp", "leaky_relu") else (None, y)
    arguments = (dy, x, mean, var, weight, bias, *at, 1e-5, kind, parameters, *places, True)
    detached = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    torch.library.opcheck(OPS.batch_norm_backward, tuple(detached))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("source", ["full", "grid:1/8"])
def test_the_same_bits_each_time(source, channels_last):
    given = tensors((64, 64, 56, 56), channels_last=channels_last)
    regions = regions_of(source, (64, 64, 56, 56))
    first, *others = (step(*given, regions) for _ in range(5))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_and_nothing_is_compiled_as_places_move():
    given = tensors()
    sources = [leannorm.GridSampling(1 / 8, "step"), leannorm.FeatureSampling(1 / 8), leannorm.FullBatch()]
    for source in sources:
        step(*given, source.regions((16, 24, 14, 14), place=0))
    before = compiled_variants()
    with waiting_is_an_error():
        for source in sources:
            for place in range(20):
                step(*given, source.regions((16, 24, 14, 14), place))
    assert compiled_variants() == before


def sampled_layer():
    source = leannorm.GridSampling(1 / 8, "step")
    layer = leannorm.BatchNorm2d(8, statistics=source, activation="relu").cuda()
    x, _, _, residual, dy = tensors((16, 8, 14, 14))
    return layer, lambda: torch.autograd.grad(layer(x, residual), [x, residual, *layer.parameters()], dy)


def test_a_layer_waits_for_nothing_in_any_mode():
    layer, layer_step = sampled_layer()
    layer_step()
    for mode in (True, False):
        layer.train(mode)
        layer_step()  # what is compiled or loaded first may wait
        with waiting_is_an_error():
            for _ in range(3):
                layer_step()
    assert layer.num_batches_tracked == 5


def test_replays_train_a_layer_on():
    layer, layer_step = sampled_layer()
    replay = graph_of(layer_step)
    assert layer.num_batches_tracked == 3  # the capture itself computes nothing
    seen = []
    for _ in range(5):
        replay()
        seen.append(layer.running_mean.tolist())
    assert layer.num_batches_tracked == 8
    assert len({tuple(mean) for mean in seen}) == 5


def test_another_batch_size_compiles_nothing():
    regions = leannorm.GridSampling(1 / 8, "step")
    step(*tensors((64, 64, 14, 14)), regions.regions((64, 64, 14, 14)))
    before = compiled_variants()
    step(*tensors((50, 64, 14, 14)), regions.regions((50, 64, 14, 14)))
    assert compiled_variants() == before


def test_replays_of_a_cuda_graph_draw_new_places():
    x, weight, bias, residual, dy = tensors((64, 8, 4, 4), torch.float32)
    regions = leannorm.BatchSampling(1 / 64, minimum=1).regions(tuple(x.shape))
    captured = []

    def capture():
        captured[:] = step(x, weight, bias, residual, dy, regions)

    replay = graph_of(capture)
    means = []
    for _ in range(10):
        for tensor in captured:
            tensor.detach().fill_(float("nan"))
        replay()
        y, mean, var, *gradients = (tensor.detach().clone() for tensor in captured)
        wanted = definition.normalize(x, mean, var, weight, bias, residual, 1e-5, "relu", [])
        torch.testing.assert_close(y, wanted.detach(), rtol=1e-4, atol=1e-5)
        assert all(g.isfinite().all() for g in gradients)
        means.append(tuple(mean.tolist()))
    assert len(set(means)) > 3
    samples = [tuple(v) for v in x.detach().mean((2, 3)).tolist()]
    for mean in means:
        assert any(torch.tensor(mean).allclose(torch.tensor(s), atol=1e-5) for s in samples)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("source", ["full", "grid:1/8"])
def test_compiled_models_train_as_eager_ones_without_a_graph_break(source, mode):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3),
            leannorm.BatchNorm2d(8, statistics=leannorm.parse_statistics(source), activation="relu"),
            torch.nn.Conv2d(8, 8, 3),
            leannorm.BatchNorm2d(8, statistics=leannorm.parse_statistics(source)),
        ).cuda()
        model = model.to(memory_format=torch.channels_last)
        run = torch.compile(model, fullgraph=True, mode=mode) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        torch.manual_seed(1)
        for _ in range(6):
            loss = run(torch.randn(8, 3, 16, 16, device="cuda")).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([t.detach().clone() for t in (loss, *model.state_dict().values())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((2**25 + 8, 64), (2**25 + 3, 1, 5, 1)),
        ((3, 5, 2**14, 2**13 + 2**11), (2, 1, 1, 1, 2**14 - 3, 1, 3, 1, 7, 1, 2**13, 1)),
    ],
)
def test_more_elements_than_32_bits_count(shape, box):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    starts, counts = box[::4], box[2::4]
    tail = tuple(slice(start, None) for start in starts)
    region = tuple(slice(start, start + count) for start, count in zip(starts, counts, strict=True))
    tail, region = ((slices[0], slice(None), *slices[1:]) for slices in (tail, region))
    mean, var = OPS.moments(x, None, list(box), [1.0])
    sample, dimensions = x[region].double(), [0, *range(2, x.ndim)]
    torch.testing.assert_close(mean.double(), sample.mean(dimensions), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var.double(), sample.var(dimensions, correction=0), rtol=1e-4, atol=1e-5)
    y = OPS.normalize(x, mean, var, None, None, None, 1e-5, "", [])
    wanted = definition.normalize(x[tail].double(), mean.double(), var.double(), None, None, None, 1e-5, "", [])
    torch.testing.assert_close(y[tail].double(), wanted, rtol=1e-2, atol=1e-2)
    del y
    dx, _, sum_g, _ = OPS.backward_fused(x, x, mean, var, None, None, None, None, 1e-5, "", [], False)
    scale = definition.per_channel((var + 1e-5).rsqrt(), x)
    torch.testing.assert_close(dx[tail].float(), x[tail].float() * scale, rtol=1e-2, atol=1e-2)
    exact = x.sum(dimensions, dtype=torch.float64)
    torch.testing.assert_close(sum_g.double(), exact, rtol=1e-3, atol=1e-4 * (x.numel() / shape[1]) ** 0.5)


def test_regions_of_other_weights_than_one_are_taken():
    x, weight, bias, _, dy = tensors((4, 6, 8, 8), torch.float32)
    box = (0, 1, 4, 1, 1, 1, 3, 1, 2, 1, 3, 1)
    twice, once = Regions(box * 2, (0.5, 0.5), 0, 1 / 72), Regions(box, (1.0,), 0, 1 / 36)
    torch.testing.assert_close(*(step(x, weight, bias, None, dy, regions, "silu") for regions in (twice, once)))
