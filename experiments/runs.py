"""What the experiments share: runs that are not trained twice, and their raw records in one file."""

import dataclasses
import inspect
import json
from collections.abc import Iterable
from pathlib import Path

from leannorm import parse_target, records
from leannorm.records import TrainingRun
from leannorm.train import checkpoint
from leannorm.train.configuration import Configuration
from leannorm.train.recorder import LAST, RUN
from leannorm.train.run import train

ARGUMENTS = inspect.signature(train)


def finished_run(model: str, data: str, *, out: Path, **options) -> TrainingRun | None:
    """Read the record of a training of these arguments that is finished; None where it is not.

    Raises:
        ValueError: if the finished training had other arguments.
    """
    if not (out / RUN).exists():
        return None
    found = records.read(TrainingRun, out / RUN)
    if len(found.history) != found.epochs:
        return None
    call = ARGUMENTS.bind(model, data, out=out, **options)
    call.apply_defaults()
    wanted = call.arguments | {"statistics": str(parse_target(call.arguments["statistics"]))}
    made = dataclasses.asdict(Configuration.from_plain(checkpoint.read(out / LAST)["hyper_parameters"]))
    others = {name: value for name, value in made.items() if name in wanted and value != wanted[name]}
    differing = [f"{name} {value}, wanted {wanted[name]}" for name, value in others.items()]
    if differing:
        raise ValueError(f"{out} holds a training of other arguments: {'; '.join(differing)}. Move it away")
    return found


def trained(model: str, data: str, *, out: Path, **options) -> TrainingRun:
    """Train, go on with a training that was stopped, or read one that is finished.

    Raises:
        ValueError: if the folder holds a training of other arguments.
    """
    finished = finished_run(model, data, out=out, **options)
    if finished is not None:
        return finished
    return train(model, data, out=out, resume=(out / LAST).exists(), **options)


def write_raw(path: Path, groups: Iterable[Iterable[TrainingRun]]) -> None:
    """Write the records of all runs as one JSON list."""
    raw = [json.loads(records.to_json(run)) for group in groups for run in group]
    records.write_text(path, json.dumps(raw, indent=1) + "\n")
