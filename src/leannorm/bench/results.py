"""Frozen results of `leannorm bench`: raw samples, never summaries, so that every table is a function of the file."""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass
from pathlib import Path

from leannorm import records
from leannorm.records import Environment


@dataclass(frozen=True)
class Conditions:
    """How everything in a file was measured.

    ``allocator`` holds the environment variables that change memory allocation; ``cache_bytes`` is the size of the
    device's last-level cache, None where it is not known; ``quick`` marks shapes that prove nothing about speed.
    """

    environment: Environment
    device: str
    threads: int
    allocator: tuple[tuple[str, str], ...]
    cache_bytes: int | None
    repeats: int
    seed: int
    quick: bool


@dataclass(frozen=True)
class Check:
    """The error of one side in one tensor, ``||found - exact|| / ||exact||`` against float64, and what it may be."""

    side: str
    tensor: str
    error: float
    torch_error: float
    limit: float


@dataclass(frozen=True)
class Timing:
    """Seconds an iteration, one sample a repeat, each the mean of so many iterations.

    Sample i of every side of a case was taken in the same round.
    """

    side: str
    iterations: int
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class LayerCase:
    """One operation on one (N, C, H, W) shape, layout and dtype, forward and backward."""

    operation: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    checks: tuple[Check, ...]
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class LayerBenchmark:
    """Everything `leannorm bench layers` measured."""

    kind: str
    conditions: Conditions
    image_size: int
    batch: int
    cases: tuple[LayerCase, ...]


@dataclass(frozen=True)
class SavedBytes:
    """Bytes that one forward pass of a side keeps for the backward pass, parameters and inputs not counted."""

    side: str
    bytes: int


@dataclass(frozen=True)
class TrainingCase:
    """The whole training step of one model: forward, loss, backward, SGD."""

    model: str
    checks: tuple[Check, ...]
    saved: tuple[SavedBytes, ...]
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class TrainingBenchmark:
    """Everything `leannorm bench training` measured.

    Each sample followed ``settle`` untimed steps of the same side; ``apart`` says that each side had its own process,
    ``starts`` how often that was begun anew.
    """

    kind: str
    conditions: Conditions
    image_size: int
    batch: int
    layout: str
    dtype: str
    cases: tuple[TrainingCase, ...]
    settle: int = 0
    apart: bool = False
    starts: int = 1


KINDS = {"layers": LayerBenchmark, "training": TrainingBenchmark}


def read(path: str | Path) -> LayerBenchmark | TrainingBenchmark:
    """Read the results of either command.

    Raises:
        ValueError: if the file holds something else.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{path} holds no results of `leannorm bench`: its kind is {kind!r}, not one of {list(KINDS)}")
    return records.from_json(KINDS[kind], text)


def default_path(kind: str, conditions: Conditions, today: datetime.date) -> Path:
    """Give the file in which results are kept: `benchmarks/results/KIND-MACHINE-YYYY-MM.json`.

    >>> from leannorm.records import Environment
    >>> machine = Environment("Intel(R) Xeon(R) Processor @ 2.80GHz, Linux x86_64", 2, "3.13", (), "unknown")
    >>> conditions = Conditions(machine, "cpu", 2, (), None, 11, 0, quick=False)
    >>> print(default_path("layers", conditions, datetime.date(2026, 3, 1)))
    benchmarks/results/layers-intel-xeon-processor-2-80ghz-linux-x86-64-2026-03.json
    """
    device = "" if conditions.device == "cpu" else f"{conditions.device} "
    name = re.sub(r"\((r|tm)\)", "", f"{device}{conditions.environment.machine}".lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    quick = "-quick" if conditions.quick else ""
    return Path("benchmarks/results") / f"{kind}{quick}-{slug}-{today:%Y-%m}.json"
