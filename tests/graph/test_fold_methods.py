"""Methods whose eval mode is BN's fold as BN does; the others are refused with a reason."""

import pytest
import torch
from torch import nn

import leannorm
from cases import METHODS

NEVER = ("mixture", "wageubn", "none")
PER_SAMPLE = ("gn", "in", "ln")


def trained(spelling):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3), nn.BatchNorm1d(4))
    leannorm.convert(model, leannorm.parse_target(spelling))
    lengths = {"lengths": torch.full((6,), 9)} if spelling == "masked" else {}
    for _ in range(3):
        model(torch.randn(6, 3, 12), **lengths).square().mean().backward()
    return model.eval()


@pytest.mark.parametrize("spelling", [s for s in METHODS if not s.startswith((*NEVER, *PER_SAMPLE, "mabn"))])
def test_folds(spelling):
    model, x = trained(spelling), torch.randn(2, 3, 12)
    folded, report = leannorm.fold(model, (x,))
    assert [change.module for change in report.changes] == ["1", "4"]
    assert not report.refusals
    torch.testing.assert_close(folded(x), model(x))
    assert not any("batch_norm" in str(node.target) for node in folded.graph.nodes)


@pytest.mark.parametrize("spelling", [s for s in METHODS if s.startswith(NEVER)])
def test_refused_with_a_reason(spelling):
    _, report = leannorm.fold(trained(spelling), (torch.randn(2, 3, 12),))
    assert not report.changes
    assert [refusal.module for refusal in report.refusals] == ["1", "4"]
    assert all("affine map per channel" in r.reason or "scale and shift alone" in r.reason for r in report.refusals)


def test_centered_weights_fold_after_revert():
    model, x = trained("mabn:2"), torch.randn(2, 3, 12)
    expected = model(x)
    folded, report = leannorm.fold(model, (x,))
    assert "weight of the conv1d before it is not a constant" in report.changes[0].action
    torch.testing.assert_close(folded(x), expected)
    leannorm.revert(model)
    folded, report = leannorm.fold(model, (x,))
    assert not report.refusals
    torch.testing.assert_close(folded(x), expected)


@pytest.mark.parametrize("spelling", [s for s in METHODS if s.startswith(PER_SAMPLE)])
def test_per_sample_normalization_stays(spelling):
    model, x = trained(spelling), torch.randn(2, 3, 12)
    folded, report = leannorm.fold(model, (x,))
    assert not report.changes
    torch.testing.assert_close(folded(x), model(x))
