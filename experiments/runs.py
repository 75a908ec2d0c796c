"""What the experiments share: runs that are not trained twice, and their raw records in one file."""

import json
from collections.abc import Iterable
from pathlib import Path

from leannorm import records
from leannorm.records import TrainingRun
from leannorm.train.run import train


def finished_run(out: Path, epochs: int) -> TrainingRun | None:
    """Read the record of a run that is finished; None where it is not."""
    if not (out / "run.json").exists():
        return None
    found = records.read(TrainingRun, out / "run.json")
    return found if len(found.history) == epochs else None


def trained(model: str, data: str, *, out: Path, epochs: int, **options) -> TrainingRun:
    """Train, go on with a run that was stopped, or read one that is finished."""
    finished = finished_run(out, epochs)
    if finished is not None:
        return finished
    return train(model, data, out=out, epochs=epochs, resume=(out / "last.ckpt").exists(), **options)


def write_raw(path: Path, groups: Iterable[Iterable[TrainingRun]]) -> None:
    """Write the records of all runs as one JSON list."""
    raw = [json.loads(records.to_json(run)) for group in groups for run in group]
    records.write_text(path, json.dumps(raw, indent=1) + "\n")
