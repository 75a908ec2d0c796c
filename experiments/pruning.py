"""How much faster is a model without a third of its channels?

    .venv/bin/python experiments/pruning.py                        # each model and batch in turn, on 2 threads
    .venv/bin/python experiments/pruning.py --model resnet18 --batch 1

In each layer a share of the channels of batch normalization is given gamma = 0 and beta <= 0, the same ones along
residual connections, so that `prune` can remove them exactly: 30%, and 3/8 of which each layer keeps what makes a
multiple of 8. Random weights otherwise, 224 px, fp32, torch eager. Original and pruned model are timed interleaved,
after a check that their outputs are the same. Raw results: `benchmarks/results/pruning.json`.
"""

import argparse
import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import leannorm
from leannorm import records
from leannorm.bench.timing import interleave
from leannorm.records import Environment
from leannorm.train.environment import environment
from leannorm.train.models import build

MODELS = ("resnet18", "vgg11_bn", "mobilenet_v2")
SHARES = {1: 0.3, 8: 0.375}  # by the multiple of channels that each layer keeps
PIXELS, THREADS = 224, 2
REPEATS = {1: 41, 16: 11}  # short ones are the noisier
RESULT = Path("benchmarks/results/pruning.json")


@dataclass(frozen=True)
class Measured:
    """One model at one batch size: seconds of a forward, one number a round, and what was removed."""

    model: str
    batch: int
    round_to: int
    threads: int
    pixels: int
    channels: tuple[int, int]
    parameters: tuple[int, int]
    relative_error: float
    original_seconds: tuple[float, ...]
    pruned_seconds: tuple[float, ...]
    environment: Environment


def silence(model: nn.Module, share: float) -> nn.Module:
    """Put a model into eval mode with statistics that no default hides, and its first channels always zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                module.weight[: round(share * module.num_features)] = 0.0
                module.bias[: round(share * module.num_features)] = 0.0
    return model.eval()


@torch.no_grad()
def measure(name: str, batch: int, *, round_to: int, repeats: int, pixels: int = PIXELS) -> Measured:
    """Prune one model and time it against itself."""
    torch.manual_seed(0)
    model = silence(build(f"torchvision:{name}", classes=1000, channels=3), SHARES[round_to])
    x = torch.randn(batch, 3, pixels, pixels)
    pruned, report = leannorm.prune(model, x, round_to=round_to)
    timings = interleave({"original": lambda: model(x), "pruned": lambda: pruned(x)}, repeats=repeats)
    original, faster = (timing.seconds for timing in timings)
    return Measured(
        model=name,
        batch=batch,
        round_to=round_to,
        threads=torch.get_num_threads(),
        pixels=pixels,
        channels=(report.channels_before, report.channels_after),
        parameters=(report.parameters_before, report.parameters_after),
        relative_error=report.relative_error,
        original_seconds=original,
        pruned_seconds=faster,
        environment=environment(),
    )


def table(found: list[dict]) -> str:
    """The medians in Markdown; the speedup is the median of the rounds' ratios, with the smallest and the largest."""
    head = ("model", "batch", "multiple of", "channels", "parameters", "error", "original", "pruned", "times faster")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in found:
        ratios = sorted(a / b for a, b in zip(one["original_seconds"], one["pruned_seconds"], strict=True))
        medians = [1e3 * statistics.median(one[f"{side}_seconds"]) for side in ("original", "pruned")]
        shares = [f"-{1 - after / before:.0%}" for before, after in (one["channels"], one["parameters"])]
        lines.append(
            f"| `{one['model']}` | {one['batch']} | {one['round_to']} | {shares[0]} | {shares[1]} "
            f"| {one['relative_error']:.1e} "
            f"| {medians[0]:.1f} ms | {medians[1]:.1f} ms "
            f"| {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
    return "\n".join(lines)


def key(one: dict) -> tuple[str, int, int]:
    """What a result is of."""
    return one["model"], one["batch"], one["round_to"]


def main() -> None:
    """Measure what is asked for, write the raw results, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="only these")
    parser.add_argument("--batch", type=int, choices=REPEATS, action="append", help="only these")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    options = parser.parse_args()
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else []
    torch.set_num_threads(THREADS)
    cases = itertools.product(options.model or MODELS, options.batch or REPEATS, SHARES)
    for name, batch, round_to in [] if options.table else cases:
        found = [one for one in found if key(one) != (name, batch, round_to)]
        found.append(asdict(measure(name, batch, round_to=round_to, repeats=REPEATS[batch])))
        found.sort(key=lambda one: (MODELS.index(one["model"]), *key(one)[1:]))
        records.write_text(RESULT, json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
