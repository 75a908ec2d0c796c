"""Which source of statistics serves the digits best: resnet8, 20 epochs, three seeds each, the same data order for all.

    .venv/bin/python experiments/digits.py        # about 12 minutes on 2 cores; finished runs are not run again

Measured on 2 cores of an AMD EPYC with torch 2.13 (`benchmarks/results/digits-sources.json`): the mean of the last five
epochs' validation accuracy, over n = 3 seeds. With 360 validation images one image is 0.28 points.
"""

import statistics
from pathlib import Path

from runs import trained, write_raw

from leannorm.records import TrainingRun

SOURCES = ("full", "grid:1/2", "grid:1/4", "grid:1/8", "fs:1/4", "fs:1/8", "grid:1/4@step", "bs:1/8", "vdn:4")
SOURCES += ("grid:1/4+vdn:1",)
SEEDS = (0, 1, 2)
EPOCHS = 20
RUNS = Path("runs/digits")
RESULT = Path("benchmarks/results/digits-sources.json")


def run(source: str, seed: int) -> TrainingRun:
    """Train with a source and a seed."""
    return trained("resnet8", "digits", statistics=source, seed=seed, epochs=EPOCHS, out=RUNS / str(seed) / source)


def late_accuracy(finished: TrainingRun) -> float:
    """Mean validation accuracy of the last five epochs: no epoch is picked by the data that it is judged on."""
    return statistics.fmean(epoch.validation_accuracy for epoch in finished.history[-5:])


def main() -> None:
    """Run everything, write the raw results, print the table."""
    runs = {source: [run(source, seed) for seed in SEEDS] for source in SOURCES}
    write_raw(RESULT, runs.values())
    exact = [late_accuracy(finished) for finished in runs["full"]]
    print("| statistics | accuracy | difference to exact BN, by seed |\n|---|---|---|")
    for source, group in runs.items():
        found = [late_accuracy(finished) for finished in group]
        differences = ", ".join(f"{100 * (a - b):+.2f}" for a, b in zip(found, exact, strict=True))
        print(f"| `{source}` | {100 * statistics.fmean(found):.2f}% | {differences} |")


if __name__ == "__main__":
    main()
