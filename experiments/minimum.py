"""How few elements a channel a sample may have: resnet8 on the digits at batch 16, one in 64 but at least a minimum.

    .venv/bin/python experiments/minimum.py       # about 10 minutes on 2 cores; finished runs are not run again

At batch 16 the digits' maps hold 1024, 256 and 64 elements a channel, so that the minimum decides at each of them. Raw
results: `benchmarks/results/digits-minimum.json`, n = 2 seeds, mean of the last three epochs' validation accuracy.
"""

import statistics
from pathlib import Path

from runs import trained, write_raw

from leannorm.records import TrainingRun

MINIMA = (4, 8, 16, 32, 64, 128)
SEEDS = (0, 1)
EPOCHS = 10
RUNS = Path("runs/minimum")
RESULT = Path("benchmarks/results/digits-minimum.json")


def run(spelling: str, seed: int) -> TrainingRun:
    """Train with a source and a seed."""
    options = {"statistics": spelling, "seed": seed, "epochs": EPOCHS, "out": RUNS / str(seed) / spelling}
    return trained("resnet8", "digits", batch_size=16, learning_rate=0.03, **options)


def main() -> None:
    """Run everything, write the raw results, print the table."""
    spellings = ("full", *(f"grid:1/64@minimum={minimum}" for minimum in MINIMA))
    runs = {spelling: [run(spelling, seed) for seed in SEEDS] for spelling in spellings}
    write_raw(RESULT, runs.values())
    print("| statistics | accuracy, by seed |\n|---|---|")
    for spelling, group in runs.items():
        found = [statistics.fmean(epoch.validation_accuracy for epoch in one.history[-3:]) for one in group]
        print(f"| `{spelling}` | {', '.join(f'{100 * accuracy:.2f}%' for accuracy in found)} |")


if __name__ == "__main__":
    main()
