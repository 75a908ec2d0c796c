"""How far a sample's statistics are from those of all elements, and how much that changes from step to step.

    make reproduce EXPERIMENT=convergence  # trains the network that is looked at
    .venv/bin/python experiments/sample_correlation.py  # two minutes on 2 cores; --table prints what is recorded

In a network that was trained with exact BN, weights frozen, every source samples the inputs of every BN layer over
augmented training batches. With d_t = (mean of the sample - mean of all) / sigma of step t, a channel:

    offset         root of the mean over channels of (mean over steps of d_t)^2: what stays, and can be learnt
    noise          root of the mean over channels of the variance over steps of d_t: what comes anew in each step
    scale noise    the same of log(sigma of the sample / sigma of all)
    design effect  noise^2 over (1/m - 1/M), which m independent ones of M elements have; 1 + (m - 1) rho, rho the
                   mean correlation of the sampled elements within a batch (Kish, Survey Sampling, 1965)

Raw results: `benchmarks/results/sample-correlation.json`; what they say is in `docs/default-source.md`.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import convergence
import torch
from comparison import paired_over_seeds
from torch import Tensor, nn
from trials import SCALES, Trial, accuracies, folder

import leannorm
from leannorm import records
from leannorm.ops import definition
from leannorm.records import Environment
from leannorm.train import checkpoint
from leannorm.train.data import ImageData
from leannorm.train.environment import environment
from leannorm.train.recorder import LAST

EXACT, *SAMPLED = convergence.FIRST
SOURCES = tuple(arm.statistics for arm in SAMPLED if not leannorm.parse_statistics(arm.statistics).virtual)
BATCHES = 40
RESULT = Path("benchmarks/results/sample-correlation.json")


@dataclass(frozen=True)
class LayerSample:
    """What a source's sample is like at a layer's input; m of M elements a channel."""

    statistics: str
    layer: str
    m: int
    M: int
    offset: float
    noise: float
    scale_noise: float

    @property
    def design_effect(self) -> float:
        """The variance of the sample's mean over that of independent elements."""
        return self.noise**2 / (1 / self.m - 1 / self.M)


@dataclass(frozen=True)
class Record:
    """Everything that the table is made from."""

    network: str
    batches: int
    environment: Environment
    samples: tuple[LayerSample, ...]


@torch.no_grad()
def inputs(model: nn.Module, data: ImageData) -> Iterator[dict[str, Tensor]]:
    """Give the inputs of every BN layer by its name, batch after batch, each normalized by its own statistics."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, leannorm.BatchNorm2d):
            layer.momentum = 0.0
            layer.register_forward_pre_hook(lambda _, arguments, name=name: found.update({name: arguments[0]}))
    model.train()
    for images, _ in islice(data.train_dataloader(), BATCHES):
        model(images)
        yield found


def measure(model: nn.Module, data: ImageData) -> list[LayerSample]:
    """Measure every source at every layer over the same batches."""
    torch.manual_seed(0)
    sources = {spelling: leannorm.parse_statistics(spelling) for spelling in SOURCES}
    places = {name: layer.place for name, layer in model.named_modules() if isinstance(layer, leannorm.BatchNorm2d)}
    steps: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for batch in inputs(model, data):
        for name, place in places.items():
            x = batch[name].double()
            mean, var = definition.moments(x, None, (), ())
            for spelling, source in sources.items():
                regions = source.regions_of(x, place)
                draw = torch.randint(0, 2**62, (regions.draws,)) if regions.draws else None
                sampled_mean, sampled_var = definition.moments(x, draw, regions.boxes, regions.weights)
                steps[spelling, name].append(
                    torch.stack([(sampled_mean - mean) / var.sqrt(), (sampled_var / var).log() / 2])
                )
                counts[spelling, name] = round(1 / regions.inverse_count), x.numel() // x.shape[1]
    samples = []
    for key, found in steps.items():
        offset, _ = _root_mean_square(torch.stack(found).mean(0))
        noise, scale_noise = _root_mean_square(torch.stack(found).std(0))
        samples.append(LayerSample(*key, *counts[key], offset, noise, scale_noise))
    return samples


def _root_mean_square(values: Tensor) -> list[float]:
    return values.square().mean(1).sqrt().tolist()


def table(samples: tuple[LayerSample, ...], trials: list[Trial]) -> str:
    """Give in Markdown the medians over layers beside what training with the source lost, the least noise first."""
    lines = [
        "| statistics | noise | noise of sigma | offset | design effect, its range | points against BN | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    exact = accuracies(EXACT.name, trials)
    for arm in SAMPLED:
        group = [each for each in samples if each.statistics == arm.statistics]
        lost = paired_over_seeds(accuracies(arm.name, trials), exact)
        if not group or lost is None:
            continue
        medians = [
            statistics.median(getattr(each, name) for each in group) for name in ("noise", "scale_noise", "offset")
        ]
        effects = [each.design_effect for each in group]
        effect = f"{statistics.median(effects):.1f}, {min(effects):.1f} to {max(effects):.1f}"
        difference = f"{100 * lost.mean:+.1f} ± {100 * lost.half_width:.1f}"
        cells = [f"`{arm.statistics}`", *(f"{median:.3f}" for median in medians), effect, difference, str(lost.seeds)]
        rows.append((medians[0], f"| {' | '.join(cells)} |"))
    return "\n".join(lines + [row for _, row in sorted(rows)])


def committed_table() -> str:
    """Give the table of the records that are there."""
    found = json.loads((RESULT.parent / "convergence-cpu.json").read_text())["trials"]
    return table(records.read(Record, RESULT).samples, [records.from_json(Trial, json.dumps(each)) for each in found])


def main() -> None:
    """Measure, write the raw results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the committed record's table, measure nothing")
    if not parser.parse_args().table:
        scale = SCALES["cpu"]
        path = folder("convergence", scale, EXACT, 0) / LAST
        model, _ = checkpoint.load(path)
        model.to(memory_format=torch.channels_last)  # as it was trained: the grid's shape follows the layout
        data = checkpoint.open_data_of(path, batch_size=scale.batch_size)
        network = f"{scale.model} after {scale.epochs} epochs of {scale.data} with exact BN"
        found = Record(network, BATCHES, environment(), tuple(measure(model, data)))
        records.write_text(RESULT, json.dumps(asdict(found), indent=1) + "\n")
    print(committed_table())


if __name__ == "__main__":
    main()
