"""Which statistics a network trained with sampled ones should have at inference: resnet8 on the digits.

    .venv/bin/python experiments/inference_statistics.py  # 10 minutes on 2 cores; finished runs are not run again

Compared, for the weights at the end of training: the moving average; the moving average with the variance of the
sampled mean between steps (``@between_steps``, which changes nothing in training: the weights are the same);
statistics recalibrated over 40 augmented training batches of what the source itself samples; and those of all elements.
Raw results: `benchmarks/results/digits-inference.json`; what they say is in `docs/inference-statistics.md`.
"""

import copy
import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from runs import trained
from torch import nn

import leannorm
from leannorm import records
from leannorm.train import checkpoint
from leannorm.train.data import ImageData

SOURCES = ("full", "grid:1/4", "fs:1/4", "grid:1/4@step", "fs:1/4@step", "bs:1/8", "vdn:4")
SEEDS = (0, 1)
EPOCHS = 12
BATCHES = 40
RUNS = Path("runs/inference")
RESULT = Path("benchmarks/results/digits-inference.json")
FORMS = ("moving", "between_steps", "recalibrated", "recalibrated_exact")


@dataclass(frozen=True)
class Inference:
    """Accuracy and loss on the validation images by the statistics that eval mode uses."""

    statistics: str
    seed: int
    form: str
    accuracy: float
    loss: float


def weights(source: str, seed: int) -> Path:
    """Train with a source and a seed; give the last checkpoint."""
    out = RUNS / str(seed) / source
    trained("resnet8", "digits", statistics=source, seed=seed, epochs=EPOCHS, batch_size=64, out=out)
    return out / "last.ckpt"


@torch.no_grad()
def measure(model: nn.Module, data: ImageData) -> tuple[float, float]:
    """Give accuracy and mean loss on the validation images."""
    batches = list(data.val_dataloader())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = model.eval()(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    return (logits.argmax(1) == labels).double().mean().item(), loss


def recalibrated(model: nn.Module, data: ImageData, *, exact: bool) -> nn.Module:
    """Copy the model with statistics of augmented training batches."""
    model = copy.deepcopy(model)
    if exact:
        leannorm.convert(model, leannorm.FullBatch())
    epochs = itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count())
    torch.manual_seed(0)
    leannorm.recalibrate(model, epochs, limit=BATCHES)
    return model


def compare(source: str, seed: int) -> list[Inference]:
    """Measure all forms for one training."""
    path = weights(source, seed)
    model, _ = checkpoint.load(path)
    data = checkpoint.open_data_of(path, batch_size=64)
    models = {
        "moving": model,
        "recalibrated": recalibrated(model, data, exact=False),
        "recalibrated_exact": recalibrated(model, data, exact=True),
    }
    if source != "full":
        spelled = source + (",between_steps" if "@" in source else "@between_steps")
        models["between_steps"], _ = checkpoint.load(weights(spelled, seed))
        mine, others = (dict(m.named_parameters()) for m in (model, models["between_steps"]))
        assert all(torch.equal(parameter, others[name]) for name, parameter in mine.items())
    return [Inference(source, seed, form, *measure(models[form], data)) for form in FORMS if form in models]


def main() -> None:
    """Run everything, write the raw results, print the table."""
    found = [result for source in SOURCES for seed in SEEDS for result in compare(source, seed)]
    records.write_text(RESULT, json.dumps([asdict(result) for result in found], indent=1) + "\n")
    print("| statistics | " + " | ".join(FORMS) + " |\n|---|" + "---|" * len(FORMS))
    for source in SOURCES:
        cells = []
        for form in FORMS:
            group = [result for result in found if (result.statistics, result.form) == (source, form)]
            means = [statistics.fmean(values) for values in zip(*((r.accuracy, r.loss) for r in group), strict=True)]
            cells.append(f"{100 * means[0]:.2f}%, {means[1]:.3f}" if means else "")
        print(f"| `{source}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
