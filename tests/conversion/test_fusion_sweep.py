"""fuse over torchvision's classification models and a hundred of timm's; prints the share that is fused, by family.

Each model trains one step before and after, in float64 so that only rounding can differ, at a small image size.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_fusion import operator_calls
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import leannorm
from leannorm.train.models import import_torchvision

import_torchvision()

from torchvision import models  # noqa: E402 - after its missing operators are defined

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]

# More parameters than this are fused without a step: they do not fit into a test machine's memory.
LARGE = 200_000_000
SIZES = {"inception_v3": 299, "maxvit_t": 224}
TIMM = {
    64: """
        convmixer_1024_20_ks9_p14 convmixer_768_32 cpubone_b0_bfrobust cpubone_b1_dwnorm cs3darknet_focus_l cs3darknet_l
        cspnext_s cspnext_tiny cspresnet50 densenet121 densenetblur121d dla34 dla46x_c dla60_res2net dpn48b dpn68
        ecaresnet26t efficientnet_b0 efficientnetv2_rw_t efficientvim_m1 efficientvim_m1_dist efficientvit_b0
        efficientvit_b1 ese_vovnet19b_slim fasternet_t0 fasternet_t1 fastvit_s12 fastvit_t8 ghostnet_050
        hardcorenas_a hardcorenas_b hgnet_tiny hgnetv2_b1 hrnet_w18 hrnet_w18_small_v2 iformer_l iformer_m
        inception_next_atto inception_next_tiny lcnetv2_base lcnetv2_small legacy_seresnet18 legacy_seresnet34
        legacy_xception lowformer_b0 lowformer_b1 mixnet_s mobilenetv3_large_100 mobilenetv3_small_050 mobileone_s0
        mobilevit_xxs mobilevitv2_075 nextvit_base nextvit_small regnetx_016 regnety_032 regnetz_b16 repghostnet_050
        repghostnet_058 repvgg_a0 repvit_m0_9 repvit_m1 res2net50_14w_8s res2net50_48w_2s resnest14d resnest26d
        resnet26d resnetblur18 resnetv2_18 resnetv2_50 rexnet_100 rexnetr_130 selecsls42 selecsls60 semnasnet_050
        seresnet50 shvit_s1 shvit_s2 skresnet18 skresnet34 starnet_s050 starnet_s100 tf_mobilenetv3_small_075
        tiny_vit_11m_224 tiny_vit_5m_224 tresnet_m tresnet_v2_l vgg11_bn vovnet39a xception41 xception41p
    """,
    96: """
        ghostnetv3_050 inception_resnet_v2 inception_v3 inception_v4
    """,
    224: """
        coatnet_nano_cc_224 efficientformer_l1 efficientformer_l3 efficientformerv2_s0 efficientformerv2_s1
        efficientvit_m0 efficientvit_m1 levit_128 levit_conv_192 swiftformer_s swiftformer_xs visformer_small
        visformer_tiny vit_small_resnet26d_224 volo_d1_224 xcit_nano_12_p16_224
    """,
    256: """
        bat_resnext26ts eca_halonext26ts lambda_resnet26rpt_256 maxvit_rmlp_pico_rw_256
    """,
}


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def training_step(model: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = torch.utils._pytree.tree_leaves(model.train()(x))
    sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() for y in outputs).backward()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: buffer.double().clone() for name, buffer in model.named_buffers()}
    for p in model.parameters():
        p.grad = None
    for name, buffer in model.named_buffers():
        buffer.copy_(state[name])
    return [y.detach() for y in outputs], gradients | buffers


def assert_close(found, expected):
    assert len(found[0]) == len(expected[0])
    assert found[1].keys() == expected[1].keys()
    scale = max(value.norm().item() for name, value in expected[1].items() if name.endswith(".grad"))
    for one, other in [*zip(found[0], expected[0], strict=True), *((found[1][n], expected[1][n]) for n in found[1])]:
        # gradients that are zero but for rounding (a convolution's bias before batch norm) are measured by the largest
        error = (one.double() - other.double()).norm()
        assert error <= 1e-6 * other.double().norm() + 1e-9 * scale


def check(make, size: int) -> tuple[int, int, Counter]:
    """Fuse a model and compare; give its number of BN layers, how many are fused, and the reasons of the others."""
    try:
        with torch.device("meta"):
            sketch = make()
    except NotImplementedError:  # RegNet computes its widths with tensors
        sketch = make()
    total = batch_norms(sketch)
    if not total:
        return 0, 0, Counter()
    large = sum(p.numel() for p in sketch.parameters()) > LARGE
    torch.manual_seed(0)
    model = sketch if large else make().double()
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = None if large else training_step(model, x)
    _, report = leannorm.fuse(model)
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True) if not issubclass(c, _BatchNorm))
    assert list(model.state_dict()) == keys
    assert len(report.changes) + len(report.refusals) == total
    fused = sum("+" in change.action for change in report.changes)
    if expected is not None:
        assert_close(training_step(model, x), expected)
        calls = operator_calls(model, x)
        assert sum(call["residual"] or call["activation"] for call in calls) >= fused
    leannorm.revert(model)
    assert [type(module) for module in model.modules()] == classes
    return total, fused, Counter(refusal.reason for refusal in report.refusals)


@pytest.fixture(scope="module")
def shares(request):
    """Collect what is fused, and print it at the end."""
    found: dict[str, Counter] = {}
    yield found
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    terminal.write_line("\nBN layers that are fused with what follows them")
    for family, counts in sorted(found.items()):
        fused, total = counts.pop("fused", 0), counts.pop("total")
        terminal.write_line(f"  {family}: {fused} of {total} ({fused / total:.0%})")
        for reason, count in counts.items():
            terminal.write_line(f"      {count} refused: {reason}")


@pytest.mark.parametrize("name", models.list_models(module=models))
def test_torchvision(name, shares):
    options = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    total, fused, reasons = check(lambda: models.get_model(name, weights=None, **options), SIZES.get(name, 64))
    if total:
        family = models.get_model_builder(name).__module__.rpartition(".")[2]
        counts = shares.setdefault(f"torchvision {family}", Counter())
        counts.update(Counter(fused=fused, total=total) + reasons)


@pytest.mark.parametrize(("name", "size"), [(name, size) for size, names in TIMM.items() for name in names.split()])
def test_timm(name, size, shares):
    timm = pytest.importorskip("timm")
    total, fused, reasons = check(lambda: timm.create_model(name), size)
    assert total
    counts = shares.setdefault(f"timm {timm.model_entrypoint(name).__module__.rpartition('.')[2]}", Counter())
    counts.update(Counter(fused=fused, total=total) + reasons)
