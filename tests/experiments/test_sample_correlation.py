"""Samples of tensors whose correlation is known, and the page that the records make."""

import math
from pathlib import Path

import pytest
import sample_correlation
import torch
from torch import nn

import leannorm

ROOT = Path(__file__).parents[2]


class Batches:
    """Twelve batches of maps that a function draws."""

    def __init__(self, draw):
        self.draw = draw

    def train_dataloader(self):
        return ((self.draw(), None) for _ in range(12))


def measured(monkeypatch, draw, *spellings):
    monkeypatch.setattr(sample_correlation, "SOURCES", spellings)
    model, _ = leannorm.convert(nn.Sequential(nn.BatchNorm2d(64)), leannorm.FullBatch())
    found = sample_correlation.measure(model, Batches(draw))
    assert [each.statistics for each in found] == list(spellings)
    assert model[0].running_mean.abs().max() == 0, "the network that is looked at stays as it is"
    return found


def test_independent_elements_have_the_design_effect_1(monkeypatch):
    grid, batch, full = measured(monkeypatch, lambda: torch.randn(16, 64, 8, 8), "grid:1/8", "bs:1/8", "full")
    for each in (grid, batch):
        assert each.M == 16 * 8 * 8
        assert each.design_effect == pytest.approx(1, abs=0.25)
        assert each.offset < 2 * each.noise / math.sqrt(12)
    assert (full.m, full.noise, full.offset) == (full.M, 0, 0)


def test_equal_elements_of_a_map_count_once(monkeypatch):
    """With rho = 1 in a sample, two whole samples are worth two elements, and a grid as much as all elements."""

    def draw():
        return torch.randn(16, 64, 1, 1).expand(16, 64, 8, 8)

    grid, batch = measured(monkeypatch, draw, "grid:1/8", "bs:1/8")
    assert batch.m == 2 * 64
    assert batch.design_effect == pytest.approx(64, rel=0.25)
    assert grid.noise < 1e-6


def test_places_that_differ_by_a_constant_are_an_offset_and_no_noise(monkeypatch):
    slope = torch.linspace(-3, 3, 8).view(1, 1, 8, 1)
    (patch,) = measured(monkeypatch, lambda: torch.randn(64, 64, 8, 8) + slope, "fs:1/16")
    assert patch.offset > 10 * patch.noise


def test_the_page_has_the_table_that_the_records_give(monkeypatch):
    monkeypatch.setattr(sample_correlation, "RESULT", ROOT / sample_correlation.RESULT)
    assert sample_correlation.committed_table() in (ROOT / "docs" / "default-source.md").read_text()
