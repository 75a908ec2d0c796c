"""`experiments/pruning.py` measures what it says, and its committed results hold all models."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pruning as experiment

ROOT = Path(__file__).parents[2]


def test_every_channel_that_is_silenced_goes():
    measured = experiment.measure("mobilenet_v2", 1, repeats=2, pixels=32)
    before, after = measured.channels
    assert 0.29 < 1 - after / before < 0.31
    assert measured.relative_error < 1e-5
    assert len(measured.original_seconds) == len(measured.pruned_seconds) == 2
    (head, _, line) = experiment.table([dataclasses.asdict(measured)]).splitlines()
    assert head.count("|") == line.count("|")
    assert line.startswith("| `mobilenet_v2` | 1 | -30% |")


def test_the_committed_results_are_whole():
    found = json.loads((ROOT / experiment.RESULT).read_text(encoding="utf-8"))
    assert [(one["model"], one["batch"]) for one in found] == [
        *itertools.product(experiment.MODELS, experiment.REPEATS),
    ]
    for one in found:
        assert one["relative_error"] < 1e-5
        assert one["pixels"] == 224
        assert len(one["original_seconds"]) == len(one["pruned_seconds"]) >= 5
