"""Speed of a layer and of a training step of every source and method, against torch's BN in the same rounds.

Not for a machine that computes anything else. The paper's numbers: iterations a second of ResNet-18 against BN.
"""

import copy
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from comparison import paired
from torch import nn
from trials import Scale

import leannorm
from leannorm import records
from leannorm.bench.timing import interleave
from leannorm.train.environment import environment
from leannorm.train.models import build

TITLE = "Speed of sources and methods"
PAPER = {"l1": "+0.4%", "range:16": "+1.7%", "fs:1/32": "+10.7%", "vdn:1": "+13.8%", "bs:1/32": "+16.5%"}
SPELLINGS = (
    "full", "fs:1/32", "grid:1/32", "grid:1/8", "bs:1/32", "vdn:1", "fs:1/32+vdn:1", "gn:32", "renorm:3", "mabn:16",
    "ghost:16", "accumulated:4", "adaptive", "in", "ln", "diminishing:1", "l1", "range:16", "bnet:3", "mixture:2",
    "wageubn:8", "none",
)  # fmt: skip
BATCH = {"cpu": 32, "full": 128, "tiny": 2}
REPEATS = {"cpu": 21, "full": 21, "tiny": 3}


@dataclass(frozen=True)
class Speed:
    """Seconds of each round by what was timed ("layer" or "step") and the spelling; "torch" is plain torch."""

    what: str
    statistics: str
    seconds: tuple[float, ...]


def measure(scale: Scale) -> list[Speed]:
    """Time everything; all sides of a round in random order."""
    device = "cuda" if scale.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    batch, size = BATCH[scale.name], 32
    network = build(scale.model, classes=10, channels=3).to(device)
    layer = nn.Sequential(nn.BatchNorm2d(64)).to(device)
    images = torch.randn(batch, 3, size, size, device=device)
    maps = torch.randn(batch, 64, size, size, device=device, requires_grad=True)
    labels = torch.randint(10, (batch,), device=device)
    found = []
    for what, model in (("layer", layer), ("step", network)):
        steps = {}
        for spelling in ("torch", *SPELLINGS):
            side = copy.deepcopy(model)
            if spelling != "torch":
                leannorm.convert(side, leannorm.parse_target(spelling))
            steps[spelling] = _layer_step(side, maps) if what == "layer" else _training_step(side, images, labels)
        timings = interleave(steps, repeats=REPEATS[scale.name], device=device)
        found += [Speed(what, timing.side, timing.seconds) for timing in timings]
    return found


def _layer_step(model: nn.Module, maps: torch.Tensor):
    gradient = torch.randn_like(maps)

    def step() -> None:
        model(maps).backward(gradient)
        maps.grad = None

    return step


def _training_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # costs what any rate does, moves nothing

    def step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def table(found: list[Speed]) -> str:
    """Give the table in Markdown: the mean over rounds of torch's time over each side's."""
    lines = ["| `--statistics` | layer | step | step, paper |", "|---|---|---|---|"]
    for spelling in SPELLINGS:
        cells = []
        for what in ("layer", "step"):
            theirs, mine = (
                next(s.seconds for s in found if (s.what, s.statistics) == (what, name)) for name in ("torch", spelling)
            )
            gain = paired([a / b - 1 for a, b in zip(theirs, mine, strict=True)])
            note = "" if gain.verdict != "not resolved" else " (not resolved)"
            cells.append(f"{100 * gain.mean:+.1f}% ± {100 * gain.half_width:.1f}{note}")
        lines.append(f"| `{spelling}` | {cells[0]} | {cells[1]} | {PAPER.get(spelling, '')} |")
    return "\n".join(lines)


def run(scale: Scale, results: Path, docs: Path) -> Path:
    """Measure, write raw results and page; give the page."""
    found, where = measure(scale), environment()
    raw = {"environment": asdict(where), "threads": torch.get_num_threads(), "speeds": [asdict(each) for each in found]}
    results.mkdir(parents=True, exist_ok=True)
    docs.mkdir(parents=True, exist_ok=True)
    records.write_text(results / f"speed-{scale.name}.json", json.dumps(raw, indent=1) + "\n")
    torch_step = statistics.median(next(s.seconds for s in found if (s.what, s.statistics) == ("step", "torch")))
    text = f"""# {TITLE}

How much faster than torch's BN: the mean over {REPEATS[scale.name]} rounds of torch's time over each one's, less one,
with its 95% interval over the rounds. Layer: 64 channels of 32x32, batch {BATCH[scale.name]}, forward and backward,
float32. Step: {scale.model} on 32x32 images at the same batch, {1000 * torch_step:.2f} ms with torch's BN (median). The
sources are not fused with activations here (`leannorm bench` does that). `gn`, `in` and `ln` are
PyTorch's layers, `adaptive` and `bnet` use BN's kernels, the other methods are composed of PyTorch's operators. Raw
results: `benchmarks/results/speed-{scale.name}.json`.

{table(found)}

Made with: {where.machine}, {where.cores} cores, {torch.get_num_threads()} threads, torch {torch.__version__}.
"""
    page = docs / f"speed-{scale.name}.md"
    records.write_text(page, text)
    return page
