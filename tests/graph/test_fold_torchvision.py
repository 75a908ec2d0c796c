"""Whole architectures: every batch normalization is accounted for, and the outputs stay."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from leannorm.graph import fold
from leannorm.graph.batch_norm import find
from leannorm.train.models import import_torchvision

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}


def build(name: str) -> nn.Module:
    from torchvision.models import get_model

    torch.manual_seed(0)
    return get_model(name, weights=None, num_classes=10)


@pytest.fixture(autouse=True, scope="module")
def importable():
    import_torchvision()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*itertools.product(["resnet18", "mobilenet_v2", "regnet_y_400mf"], BOUNDS), ("densenet121", torch.float64)],
)
def test_every_batch_norm_is_folded_or_a_table(name, dtype, randomized):
    model = randomized(build(name)).to(dtype)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    x = torch.randn(2, 3, 32, 32, dtype=dtype, generator=torch.Generator().manual_seed(0))
    folded, report = fold(model, x)
    assert report.refusals == ()
    named = [change.module for change in report.changes]
    assert len(named) == len(set(named))
    assert set(named) == layers
    assert not list(find(folded.graph))
    tables = {change.module: change.action for change in report.changes if change.action.startswith("replaced by")}
    assert len(tables) == (62 if name == "densenet121" else 0)
    if tables:
        assert "it follows cat (" in tables["features.denseblock1.denselayer2.norm1"]
        assert "the max_pool2d before it has other users" in tables["features.denseblock1.denselayer1.norm1"]
    with torch.no_grad():
        expected, got = model(x), folded(x)
    assert ((got - expected).norm() / expected.norm()).item() < BOUNDS[dtype]
