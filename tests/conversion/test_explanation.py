"""explain: what it says of each layer, against what runs; half of the cases are refusals."""

import pytest
import torch
from torch import nn

import leannorm
from leannorm import explain, records
from leannorm.backends import aten, cpu, triton

native = pytest.mark.skipif(not cpu.available, reason="the extension was not built")


def model(source="grid:1/8", activation=True):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *([nn.ReLU()] if activation else []))
    return leannorm.convert(layers, leannorm.parse_target(source))[0] if source else layers


def images(dtype=torch.float32):
    return torch.randn(4, 3, 18, 18, generator=torch.Generator().manual_seed(0)).to(dtype)


def only(explanation):
    (layer,) = explanation.layers
    return layer


@native
def test_the_native_kernels_serve_a_fused_layer():
    fused, _ = leannorm.fuse(model())
    assert only(explain(fused, images())) == records.LayerExplanation(
        "1", "BatchNorm2d", "grid:1/8 (128 of 1024)", "batch norm + relu", "native CPU kernels"
    )


@native
def test_without_inputs_it_tells_what_an_ordinary_input_would_get():
    assert only(explain(leannorm.fuse(model())[0])) == records.LayerExplanation(
        "1", "BatchNorm2d", "grid:1/8", "batch norm + relu", "native CPU kernels"
    )
    assert only(explain(model().double())).served_by == "ATen"
    folded = only(explain(leannorm.fuse(model(), convolution=True)[0]))
    assert (folded.operator, folded.served_by) == ("convolution + batch norm + relu", "PyTorch's convolutions")


def test_the_missing_extension_is_named_and_aten_serves(monkeypatch):
    called = []
    monkeypatch.setattr(cpu, "_kernels", None)
    monkeypatch.setattr(cpu, "_missing", "the extension was not built (no module named _kernels)")
    monkeypatch.setattr(cpu, "_work_on", lambda *_: called.append(True))
    for layer in (only(explain(model(activation=False), images())), only(explain(model(activation=False)))):
        assert layer.served_by == "ATen"
        assert layer.reasons == (
            "the extension was not built (no module named _kernels); install again where a C++ compiler is found",
        )
    assert called


@native
@pytest.mark.parametrize(
    ("input", "reason"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.float64), "float32, bfloat16 and float16, the input is torch.float64"),
        (torch.zeros(0, 3, 4, 4), "the input is empty"),
        (torch.zeros(4, 3, 4, 4).permute(0, 1, 3, 2), "memory order is neither contiguous nor channels-last"),
        (torch.zeros(2, 3, 4, 4, device="meta"), "for the CPU and for NVIDIA GPUs, the input is on meta"),
        (
            torch.zeros(2, 3).as_subclass(type("Masked", (torch.Tensor,), {})),
            "read memory, which a Masked may not have",
        ),
    ],
    ids=["dtype", "empty", "order", "device", "subclass"],
)
def test_inputs_that_no_kernel_takes(input, reason):
    layer = only(explain(input))
    assert (layer.operator, layer.served_by) == ("batch norm", "ATen")
    assert reason in layer.reasons[0]


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_that_the_kernels_take(dtype):
    layer = only(explain(torch.zeros(2, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)))
    assert (layer.served_by, layer.reasons) == ("native CPU kernels", ())


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_it_says_is_what_runs(monkeypatch, dtype):
    calls = []
    reference = aten.batch_norm
    monkeypatch.setattr(aten, "batch_norm", lambda *args: calls.append(True) or reference(*args))
    network, x = model().to(dtype), images(dtype)
    served_by = only(explain(network, x)).served_by
    calls.clear()
    network(x)
    assert served_by == ("ATen" if calls else "native CPU kernels")


def test_a_gpu_is_asked_for_triton(monkeypatch):
    monkeypatch.setattr(triton, "installed", False)

    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 0)

    x = torch.zeros(2, 3, 4, 4).as_subclass(OnGPU)
    assert only(explain(x)).reasons == ("Triton is not installed: pip install 'leannorm[gpu]'",)


def test_a_layer_that_is_not_fused_says_what_fuse_would_do():
    layer = only(explain(model(), images()))
    assert layer.operator == "batch norm"
    assert "leannorm.fuse computes batch norm + relu in one operator" in layer.reasons


def test_a_call_that_does_not_fit_the_fused_operator():
    network, _ = leannorm.fuse(model(), convolution=True)
    small = only(explain(network, images()[:, :, :5, :5]))
    assert small.statistics == "grid:1/8 (36 of 36)"
    assert small.operator == "batch norm + relu"
    assert "convolution + batch norm + relu in one operator, which this call does not fit" in small.reasons[-1]
    assert any("aims at 64 elements a channel or more" in reason for reason in small.reasons)


def test_a_folded_convolution():
    layer = only(explain(leannorm.fuse(model(), convolution=True)[0], images()))
    assert (layer.statistics, layer.operator) == ("grid:1/8 (128 of 1024)", "convolution + batch norm + relu")
    assert (layer.served_by, layer.reasons) == ("PyTorch's convolutions", ())


@pytest.mark.parametrize("given", [(), (images(),)])
def test_a_convolution_that_tune_keeps_apart_is_no_call_that_does_not_fit(given):
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(2)]
    network, _ = leannorm.convert(nn.Sequential(*blocks), leannorm.parse_statistics("grid:1/8"))
    leannorm.fuse(network, convolution=True)
    network[0][1].folds_convolution = False
    apart, folded = explain(network, *given).layers
    assert (apart.operator, folded.operator) == ("batch norm + relu", "convolution + batch norm + relu")
    assert not any("leannorm.fuse" in reason for reason in (*apart.reasons, *folded.reasons))


def test_eval_mode_without_running_statistics():
    layer = only(explain(leannorm.BatchNorm2d(3, track_running_stats=False).eval(), images()))
    assert (layer.statistics, layer.served_by) == ("full", "PyTorch")


def test_a_convolution_that_stays_apart_says_why():
    network = model()
    network[0].register_forward_hook(lambda *_: None)
    leannorm.fuse(network, convolution=True)
    network[1].folds_convolution = True
    assert (
        "not fused: its convolution stays apart: the Conv2d before it has hooks" in explain(network).layers[0].reasons
    )


def test_a_hook_is_why_a_layer_is_not_fused():
    network = model()
    network[1].register_forward_hook(lambda *_: None)
    assert "not fused: it has hooks, which see its output" in only(explain(network, images())).reasons


@native
@pytest.mark.parametrize("given", [(), (images(),)])
def test_eval_mode_and_frozen_layers_run_by_one_native_operator_with_what_follows(given):
    alone = only(explain(model().eval(), *given))
    assert (alone.statistics, alone.served_by, alone.operator) == ("running", "PyTorch", "batch norm")
    assert "one pass of PyTorch's own" in alone.reasons[0]
    assert "leannorm.fold leaves no normalization" in alone.reasons[1]
    frozen = only(explain(leannorm.freeze(leannorm.fuse(model())[0])[0], *given))
    assert (frozen.served_by, frozen.operator, frozen.reasons) == ("native CPU kernels", "batch norm + relu", ())


@native
def test_eval_mode_that_the_native_operator_does_not_take_says_why():
    double = only(explain(model().double().eval(), images().double()))
    assert double.served_by == "PyTorch"
    assert "take float32, bfloat16 and float16" in double.reasons[0]
    assert only(explain(model("bnet:3").eval(), images())).served_by == "PyTorch"


@pytest.mark.parametrize("given", [(), (images(),)])
def test_torchs_own_layers_say_why_they_are_left(given):
    class Own(nn.BatchNorm2d):
        pass

    network = nn.Sequential(nn.BatchNorm2d(3), Own(3), nn.GroupNorm(1, 3))
    left = [layer.reasons for layer in explain(network, *given).layers]
    assert left == [
        ("it is torch's own: leannorm.convert or leannorm.fuse (batch norm) takes it over",),
        ("left as it is: Own is a subclass whose forward may do more than batch normalization",),
        ("GroupNorm is no batch normalization, which the kernels compute alone",),
    ]


@pytest.mark.parametrize(
    ("target", "served_by", "reason"),
    [
        ("ghost:2", "PyTorch", "ghost:2 is composed of PyTorch's operators: the kernels compute batch norm alone"),
        ("gn:4", "PyTorch", "gn:4 is torch's own layer: the kernels compute batch norm alone"),
        pytest.param(
            "renorm:3", "ATen, native CPU kernels, PyTorch", "batch_norm and normalize, not moments", marks=native
        ),
        pytest.param("bnet:3", "native CPU kernels, PyTorch", None, marks=native),
    ],
)
def test_methods(target, served_by, reason):
    layer = only(explain(model(target), images()))
    assert (layer.statistics, layer.served_by) == (target, served_by)
    assert (layer.reasons == ()) if reason is None else reason in layer.reasons[0]


def test_virtual_samples_and_each_form_of_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.bn(x)) + self.bn(x[:, :, ::2]).mean()

    network, _ = leannorm.convert(Twice(), leannorm.parse_statistics("vdn:1"))
    first, second, unused = explain(network, images()).layers
    assert (first.statistics, second.statistics) == ("vdn:1 (324 of 1620)", "vdn:1 (162 of 810)")
    assert unused.reasons == ("these example inputs do not reach it",)


def test_the_model_stays_as_it_is():
    network, _ = leannorm.fuse(model("bs:1/4"))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    drawn = torch.get_rng_state()
    explain(network, images())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert network.training
    assert not nn.modules.module._global_forward_hooks
    with pytest.raises(RuntimeError, match="channels"):
        explain(network, images()[:, :2])
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_the_text_is_a_table_with_notes_and_the_record_is_json():
    layers = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    explained = explain(layers)
    heading, *lines, note = str(explained).splitlines()
    assert heading.split() == ["module", "layer", "statistics", "computes", "by"]
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert all(line.endswith("PyTorch  [1]") for line in lines)
    assert note == "[1] it is torch's own: leannorm.convert or leannorm.fuse (batch norm) takes it over"
    assert records.from_json(records.Explanation, records.to_json(explained)) == explained
    assert explain(nn.Linear(2, 2)).layers == ()


def test_what_it_does_not_take():
    with pytest.raises(TypeError, match="a module or a tensor, got str"):
        explain("resnet18")
    with pytest.raises(ValueError, match="example_inputs are for a module"):
        explain(torch.zeros(2, 3), torch.zeros(2, 3))
