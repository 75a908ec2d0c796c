"""`experiments/pruning.py` measures what it says, and its committed results hold all models."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pruning as experiment
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("round_to", "least", "most"), [(1, 0.29, 0.31), (8, 0.33, 0.375)])
def test_every_channel_that_is_silenced_goes(round_to, least, most):
    measured = experiment.measure("mobilenet_v2", 1, round_to=round_to, repeats=2, pixels=32)
    before, after = measured.channels
    assert least < 1 - after / before < most
    assert measured.relative_error < 1e-5
    assert len(measured.original_seconds) == len(measured.pruned_seconds) == 2
    (head, _, line) = experiment.table([dataclasses.asdict(measured)]).splitlines()
    assert head.count("|") == line.count("|")
    assert line.startswith(f"| `mobilenet_v2` | 1 | {round_to} | -3")


def test_the_committed_results_are_whole():
    found = json.loads((ROOT / experiment.RESULT).read_text(encoding="utf-8"))
    assert [experiment.key(one) for one in found] == [
        *itertools.product(experiment.MODELS, experiment.REPEATS, experiment.SHARES),
    ]
    for one in found:
        assert one["relative_error"] < 1e-5
        assert one["pixels"] == 224
        assert len(one["original_seconds"]) == len(one["pruned_seconds"]) >= 5
