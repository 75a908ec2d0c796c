"""What `make reproduce` runs: scales, the arms of an experiment, and their trials, none of which is run twice."""

import dataclasses
import json
import re
import statistics
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runs import finished_run, trained

from leannorm import records
from leannorm.records import TrainingRun

DATA = Path(".data")
DIVERGED = "diverged.json"
ARCHIVE = Path("../shared/data/cifar10.tar.xz")


@dataclass(frozen=True)
class Scale:
    """How large the trainings of an experiment are.

    Args:
        name: of the scale.
        model: spelling of the model.
        data: spelling of the data; `prepare` makes the folder.
        images: training images, as many of each class.
        epochs: of each training.
        batch_size: images in a batch, where the arm says no other.
        learning_rate: at that batch size, where the arm says no other; it goes down in proportion with the batch.
        schedule: of the learning rate.
        seeds: every arm is trained with so many at first.
        most_seeds: and with so many at most, where the spread asks for them.
        accelerator: Lightning's name of the device.
    """

    name: str
    model: str
    data: str
    images: int
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str
    seeds: int
    most_seeds: int
    accelerator: str


SCALES = {
    "cpu": Scale("cpu", "resnet8", ".data/cifar10-10000", 10_000, 12, 128, 0.1, "one-cycle", 2, 5, "cpu"),
    "full": Scale("full", "resnet20", ".data/cifar10-50000", 50_000, 130, 128, 0.1, "drops:50,80", 2, 5, "auto"),
    # to see that it works: proves nothing
    "tiny": Scale("tiny", "resnet8", "digits", 1438, 1, 512, 0.05, "one-cycle", 2, 3, "cpu"),
}


@dataclass(frozen=True)
class Arm:
    """One line of a table.

    Args:
        name: in the table, unique in the experiment.
        statistics: spelling of the source or method.
        against: name of the arm that it is compared with; None for those that others are compared with.
        paper: the paper's number, as text; "" where it gives none.
        model: spelling of the model; None is the scale's.
        batch_size: None is the scale's.
        learning_rate: None is the scale's, in proportion to the batch.
        accumulate: batches for one step of the optimiser.
    """

    name: str
    statistics: str
    against: str | None = None
    paper: str = ""
    model: str | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    accumulate: int = 1

    def options(self, scale: Scale) -> dict[str, object]:
        """Give the arguments of the training that differ between the arms."""
        batch = self.batch_size or scale.batch_size
        rate = self.learning_rate or scale.learning_rate * batch * self.accumulate / scale.batch_size
        return {"batch_size": batch, "learning_rate": rate, "accumulate": self.accumulate}


@dataclass(frozen=True)
class Trial:
    """One training of an arm; ``run`` is None where it diverged."""

    arm: str
    seed: int
    run: TrainingRun | None

    @property
    def accuracy(self) -> float:
        """Mean validation accuracy of the last tenth of the epochs, which are not picked by the data that judges them.

        A training that diverged counts 0.
        """
        if self.run is None:
            return 0.0
        last = max(1, round(len(self.run.history) / 10))
        return statistics.fmean(epoch.validation_accuracy for epoch in self.run.history[-last:])


def accuracies(arm: str, found: list[Trial]) -> dict[int, float]:
    """Give an arm's accuracies by seed."""
    return {each.seed: each.accuracy for each in found if each.arm == arm}


def batch_renorm(scale: Scale, batch_size: int) -> str:
    """Spell batch renorm with a schedule as long as the training: the published one outlasts short trainings."""
    steps = scale.epochs * (scale.images // batch_size)
    return f"renorm:3@start={steps // 10},r_end={steps // 2},d_end={steps // 3}"


def prepare(scale: Scale, archive: Path = ARCHIVE) -> None:
    """Unpack CIFAR-10 and link the scale's share of its training images, once.

    Raises:
        FileNotFoundError: if the images are needed and there is no archive.
    """
    folder = Path(scale.data)
    if scale.data == "digits" or folder.exists():
        return
    if not (DATA / "cifar10").exists():
        if not archive.exists():
            raise FileNotFoundError(
                f"{scale.name} needs CIFAR-10 as class folders: no archive {archive}; give --archive"
            )
        DATA.mkdir(exist_ok=True)
        with tarfile.open(archive) as packed:
            packed.extractall(DATA / ".unpacking", filter="data")
        (DATA / ".unpacking" / "cifar10").rename(DATA / "cifar10")
    partial = folder.with_name(f".{folder.name}.partial")
    for part in ("train", "val"):
        classes = sorted(path for path in (DATA / "cifar10" / part).iterdir() if path.is_dir())
        for class_folder in classes:
            images = sorted(class_folder.iterdir())
            if part == "train":
                images = images[: scale.images // len(classes)]
            target = partial / part / class_folder.name
            target.mkdir(parents=True, exist_ok=True)
            for image in images:
                if not (target / image.name).exists():
                    (target / image.name).hardlink_to(image)
    partial.rename(folder)


def folder(experiment: str, scale: Scale, arm: Arm, seed: int) -> Path:
    """Name the folder of a training."""
    return Path("runs/reproduce") / experiment / scale.name / re.sub(r"[^\w.@+-]+", "_", arm.name) / str(seed)


def training(experiment: str, scale: Scale, arm: Arm, seed: int) -> dict[str, Any]:
    """Give all arguments of a training."""
    return {
        "model": arm.model or scale.model,
        "data": scale.data,
        "statistics": arm.statistics,
        "seed": seed,
        "epochs": scale.epochs,
        "schedule": scale.schedule,
        "accelerator": scale.accelerator,
        "out": folder(experiment, scale, arm, seed),
        **arm.options(scale),
    }


def finished(experiment: str, scale: Scale, arm: Arm, seed: int) -> Trial | None:
    """Read a training that is finished, or has diverged; None where there is none."""
    arguments = training(experiment, scale, arm, seed)
    if (arguments["out"] / DIVERGED).exists():
        return Trial(arm.name, seed, None)
    run = finished_run(**arguments)
    return None if run is None else Trial(arm.name, seed, run)


def recorded(path: Path, scale: Scale, arms: tuple[Arm, ...]) -> list[Trial]:
    """Read the trials of these arms at this scale from what `write_raw` wrote; [] where there is no such file."""
    if not path.exists():
        return []
    plain = json.loads(path.read_text())
    if plain["scale"] | {"seeds": scale.seeds, "most_seeds": scale.most_seeds} != dataclasses.asdict(scale):
        return []
    same = {arm.name for arm in arms if dataclasses.asdict(arm) in plain["arms"]}
    trials_of_same = (each for each in plain["trials"] if each["arm"] in same)
    return [Trial(each["arm"], each["seed"], each["run"] and _run(each["run"])) for each in trials_of_same]


def _run(plain: dict[str, Any]) -> TrainingRun:
    return records.from_json(TrainingRun, json.dumps(plain))


def trial(experiment: str, scale: Scale, arm: Arm, seed: int) -> Trial:
    """Train an arm with a seed, go on with a training that was stopped, or read one that is finished."""
    found = finished(experiment, scale, arm, seed)
    if found is not None:
        return found
    arguments = training(experiment, scale, arm, seed)
    try:
        run = trained(**arguments)
    except ValueError as error:
        if "diverged" not in str(error):
            raise
        records.write_text(arguments["out"] / DIVERGED, json.dumps(str(error)) + "\n")
        run = None
    return Trial(arm.name, seed, run)


def trials(experiment: str, scale: Scale, arms: tuple[Arm, ...], seed: int) -> Iterator[Trial]:
    """Train every arm with a seed, the first ones first, and say so."""
    for number, arm in enumerate(arms, 1):
        print(f"{experiment} {scale.name}, seed {seed}, {number} of {len(arms)}: {arm.name}", flush=True)
        yield trial(experiment, scale, arm, seed)


def write_raw(path: Path, scale: Scale, arms: tuple[Arm, ...], found: list[Trial]) -> None:
    """Write everything that the page is made from."""
    plain = {
        "scale": dataclasses.asdict(scale),
        "arms": [dataclasses.asdict(arm) for arm in arms],
        "trials": [dataclasses.asdict(each) for each in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    records.write_text(path, json.dumps(plain, indent=1) + "\n")
