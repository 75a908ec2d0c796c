"""Does a training with its convolutions folded follow the unfused one? resnet20 on CIFAR-10, one thread.

    OMP_NUM_THREADS=1 .venv/bin/python experiments/folded_training.py    # 40 minutes; goes on where it stopped
    .venv/bin/python experiments/folded_training.py --page               # only makes the page again

The first steps: same source, seed and batches, in float64 and float32, by the unfused layers, `fuse` and
`fuse(convolution=True)`; and by the unfused layers with every pixel moved to the next number above, the yardstick for
how fast training amplifies a rounding. Then whole trainings in pairs, unfused and folded, seed by seed. Raw results:
`benchmarks/results/folded-training.json`; the page made from it is `docs/folded-training.md`.
"""

import argparse
import dataclasses
import itertools
import logging
import math
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from comparison import CONFIDENCE, Paired, paired
from page import made_with
from runs import trained
from trials import ARCHIVE, SCALES, prepare

import leannorm
from leannorm import records
from leannorm.records import Environment, TrainingRun
from leannorm.train.data import open_data
from leannorm.train.environment import environment
from leannorm.train.models import build

MODEL, DATA = "resnet20", SCALES["cpu"].data
SOURCES = ("grid:1/8", "fs:1/32")
FORMS = ("unfused", "moved", "fused", "folded")
DTYPES = ("float64", "float32")
STEPS, BATCH = 20, 64  # of the first steps
RATES = {0.004: "where the one-cycle schedule begins", 0.1: "its highest, without a warm-up"}
SEEDS, EPOCHS = 4, 4  # of the trainings, by the first source
RUNS = Path("runs/folded-training")
RESULT, PAGE = Path("benchmarks/results/folded-training.json"), Path("docs/folded-training.md")


@dataclass(frozen=True)
class Curve:
    """Losses of the first steps, before each; ``form`` is one of `FORMS`."""

    learning_rate: float
    statistics: str
    dtype: str
    form: str
    losses: tuple[float, ...]
    threads: int
    environment: Environment


@dataclass(frozen=True)
class Pair:
    """Two trainings that differ in nothing but how they compute."""

    seed: int
    unfused: TrainingRun
    folded: TrainingRun

    @property
    def accuracies(self) -> tuple[float, float]:
        """Validation accuracy after the last epoch, unfused and folded."""
        return self.unfused.history[-1].validation_accuracy, self.folded.history[-1].validation_accuracy


@dataclass(frozen=True)
class Following:
    """Everything that the page is made from."""

    model: str
    data: str
    batch_size: int
    steps: int
    epochs: int
    curves: tuple[Curve, ...] = ()
    pairs: tuple[Pair, ...] = ()


def beginning(rate: float, spelling: str, dtype: str, form: str) -> Curve:
    """Train for some steps at a constant rate."""
    data = open_data(DATA, batch_size=BATCH, seed=0)
    torch.manual_seed(0)
    model = build(MODEL, classes=len(data.classes), channels=data.input_shape[0])
    leannorm.convert(model, leannorm.parse_statistics(spelling))
    if form in ("fused", "folded"):
        leannorm.fuse(model, convolution=form == "folded")
    model.to(getattr(torch, dtype))
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    losses = []
    for images, labels in itertools.islice(data.train_dataloader(), STEPS):
        x = images.to(getattr(torch, dtype))
        if form == "moved":
            x = x.nextafter(torch.full_like(x, math.inf))
        loss = F.cross_entropy(model(x), labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Curve(rate, spelling, dtype, form, tuple(losses), torch.get_num_threads(), environment())


def pair(seed: int) -> Pair:
    """Train unfused and folded."""
    models = {"unfused": MODEL, "folded": f"experiments/variants.py:{MODEL}_folded"}
    options = {"statistics": SOURCES[0], "seed": seed, "epochs": EPOCHS, "accelerator": "cpu"}
    runs = [trained(model, DATA, out=RUNS / str(seed) / form, **options) for form, model in models.items()]
    return Pair(seed, *runs)


def kept() -> Following:
    """Read what an earlier run has found.

    Raises:
        ValueError: if it was found with other settings.
    """
    empty = Following(MODEL, DATA, BATCH, STEPS, EPOCHS)
    found = records.read(Following, RESULT) if RESULT.exists() else empty
    if dataclasses.replace(found, curves=(), pairs=()) != empty:
        raise ValueError(f"{RESULT} was made with other settings than {empty}: move it away to start anew")
    return found


def follow(seeds: int) -> Iterator[Following]:
    """Run what is not there yet; give all that is there after each piece."""
    found = kept()
    for key in itertools.product(RATES, SOURCES, DTYPES, FORMS):
        if all((c.learning_rate, c.statistics, c.dtype, c.form) != key for c in found.curves):
            found = dataclasses.replace(found, curves=(*found.curves, beginning(*key)))
            yield found
    for seed in range(seeds):
        if all(each.seed != seed for each in found.pairs):
            found = dataclasses.replace(found, pairs=(*found.pairs, pair(seed)))
            yield found


def differences(found: Following, rate: float, dtype: str, form: str) -> list[float]:
    """Give for each step the largest |loss - unfused| / unfused over the sources that have both curves."""
    curves = {(c.statistics, c.form): c.losses for c in found.curves if (c.learning_rate, c.dtype) == (rate, dtype)}
    relative = [
        [abs(loss / unfused - 1) for loss, unfused in zip(losses, curves[spelling, "unfused"], strict=True)]
        for (spelling, curve_form), losses in curves.items()
        if curve_form == form and (spelling, "unfused") in curves
    ]
    return [max(at_step) for at_step in zip(*relative, strict=True)]


def accuracy_difference(found: Following) -> Paired:
    """Compare the final accuracies of folded trainings with those of unfused ones, over the seeds."""
    return paired([folded - unfused for unfused, folded in (each.accuracies for each in found.pairs)])


def steps_table(found: Following, rate: float) -> str:
    """Give the differences of the first steps at a rate in Markdown."""
    columns = {
        (dtype, form): values
        for dtype in DTYPES
        for form in FORMS[1:]
        if (values := differences(found, rate, dtype, form))
    }
    lines = [
        "| step | " + " | ".join(f"{form}, {dtype}" for dtype, form in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for step, values in enumerate(zip(*columns.values(), strict=True), 1):
        lines.append(f"| {step} | " + " | ".join(f"{value:.1e}" for value in values) + " |")
    lines.append("| largest | " + " | ".join(f"{max(values):.1e}" for values in columns.values()) + " |")
    return "\n".join(lines)


def trainings_table(found: Following) -> str:
    """Give the trainings in Markdown, and what they resolve."""
    if not found.pairs:
        return "Not run."
    lines = ["| seed | unfused | folded | difference |", "|---|---|---|---|"]
    for each in found.pairs:
        unfused, folded = each.accuracies
        lines.append(f"| {each.seed} | {unfused:.2%} | {folded:.2%} | {100 * (folded - unfused):+.2f} |")
    means = [statistics.fmean(values) for values in zip(*(each.accuracies for each in found.pairs), strict=True)]
    difference = accuracy_difference(found)
    half = f" ± {100 * difference.half_width:.2f}" if difference.seeds > 1 else ", one seed"
    lines.append(
        f"| mean | {means[0]:.2%} | {means[1]:.2%} | {100 * difference.mean:+.2f}{half}: {difference.verdict} |"
    )
    return "\n".join(lines)


def page(found: Following) -> str:
    """Give the page in Markdown."""
    made = made_with(
        {curve.environment for curve in found.curves}
        | {run.environment for each in found.pairs for run in (each.unfused, each.folded)}
    )
    sources = " and ".join(f"`{spelling}`" for spelling in SOURCES)
    tables = "\n\n".join(
        f"At a rate of {rate:g}, {what}:\n\n{steps_table(found, rate)}" for rate, what in RATES.items()
    )
    return f"""# Training with folded convolutions

Does `leannorm.fuse(model, convolution=True)` train what the unfused layers train? `experiments/folded_training.py`:
`{found.model}` on the images of `{found.data}`, one thread. Raw results: `benchmarks/results/folded-training.json`.

## The first {found.steps} steps

Same weights, batches of {found.batch_size} and source: how far each step's loss is from that of the unfused layers,
relative to it; the larger of {sources}. "Fused" is `fuse(model)`, "folded"
`fuse(model, convolution=True)`. "Moved" is the yardstick: the unfused layers again, with every pixel moved to the next
number above, which shows how training amplifies one rounding.

{tables}

## Whole trainings

`{SOURCES[0]}`, {found.epochs} epochs, batch 128, one-cycle schedule. Both of a pair have the same seed: weights,
order and augmentation of the images are the same. Validation accuracy after the last epoch, the difference in points;
its mean with the {CONFIDENCE:.0%} interval over the seeds (Student's t). Where that holds 0 the seeds do not resolve a
difference; if there is one, it lies within the interval.

{trainings_table(found)}

Made with: {made}.
"""


def main() -> None:
    """Run what is not there yet and write it after each piece."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="pairs of trainings")
    parser.add_argument("--page", action="store_true", help="only make the page from what is there")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="CIFAR-10 as class folders, in a tar file")
    options = parser.parse_args()
    if options.page:
        records.write_text(PAGE, page(records.read(Following, RESULT)))
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    prepare(SCALES["cpu"], options.archive)
    for found in follow(options.seeds):
        records.write(RESULT, found)
        records.write_text(PAGE, page(found))
        print(f"{len(found.curves)} curves, {len(found.pairs)} pairs of trainings", flush=True)


if __name__ == "__main__":
    main()
