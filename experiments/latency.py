"""How fast is a folded ResNet-18 at batch 1, and how long does it take to fold ResNet-152?

    OMP_NUM_THREADS=2 .venv/bin/python experiments/latency.py            # a minute on 2 quiet cores
    OMP_NUM_THREADS=2 .venv/bin/python experiments/latency.py --fold     # ResNet-152's fold, with torch.export's share
    .venv/bin/python experiments/latency.py --table

224 px, fp32, random weights, every form of the model in one process: each round takes a sample of each, after a rest in
which the threads of the form before go to sleep. Speed-ups are medians, with quartiles, of the ratios to torch eager
within the rounds. Raw results: `benchmarks/results/latency-resnet18.json` and `fold-resnet152.json`.
"""

import argparse
import copy
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.export import Dim

from leannorm import records
from leannorm.bench import timing
from leannorm.bench.results import Timing
from leannorm.bench.summary import quartiles, ratios
from leannorm.deploy.export import export_onnx
from leannorm.deploy.runtime import Session
from leannorm.graph import fold
from leannorm.graph.export import export
from leannorm.records import Environment
from leannorm.train.environment import environment
from leannorm.train.models import build

LATENCY, FOLDING = (Path("benchmarks/results") / name for name in ("latency-resnet18.json", "fold-resnet152.json"))
SOURCE = 8.2 / 5.7  # Chen et al. fold ResNet-18 on a CPU from 8.2 to 5.7 ms
REPEATS, REST, SAMPLE = 25, 0.05, 0.1  # rounds; seconds
MAX_ERROR = 1e-5
FOLDS = 5


@dataclass(frozen=True)
class Form:
    """A form of the model: ``error`` is ``||y - exact|| / ||exact||`` against the original in float64."""

    name: str
    error: float


@dataclass(frozen=True)
class Latency:
    """Everything measured at batch 1; the first form is torch eager."""

    environment: Environment
    model: str
    image_size: int
    threads: int
    forms: tuple[Form, ...]
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class FoldTime:
    """Seconds of `fold`, and those in which torch.export alone captures the same model, in turn."""

    environment: Environment
    model: str
    image_size: int
    threads: int
    fold_seconds: tuple[float, ...]
    export_seconds: tuple[float, ...]


def forms(model: nn.Module, x: Tensor, folder: Path) -> dict[str, Callable[[], object]]:
    """Every form of the model as a call without arguments, torch eager first; ``folder`` holds the files."""
    found: dict[str, Callable[[], object]] = {}
    for suffix, layout in (("", torch.contiguous_format), (", channels last", torch.channels_last)):
        images = x.to(memory_format=layout)
        original = copy.deepcopy(model).to(memory_format=layout)
        folded = fold(original, images)[0].to(memory_format=layout)
        compiled = torch.compile(folded)
        for name, form in (("torch eager", original), ("folded", folded), ("folded, torch.compile, frozen", compiled)):
            found[name + suffix] = functools.partial(form, images)
    program, _ = fold(export(model, (x,))[0], x)
    export_onnx(program, folder / "model.fp32.onnx", inputs=["images"], outputs=["logits"], metadata={})
    found["ONNX file, onnxruntime"] = functools.partial(Session(folder / "model.fp32.onnx"), x.numpy())
    return found


def measure() -> Latency:
    """Check the outputs of all forms, then time them.

    Raises:
        ValueError: if a form's error is not below `MAX_ERROR`; nothing is timed then.
    """
    torch.manual_seed(0)
    model, x = build("torchvision:resnet18", classes=1000, channels=3).eval(), torch.randn(1, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        steps = forms(model, x, Path(folder))
        # Weights as constants, packed once; as an option of torch.compile it would come too late for the capture.
        with torch.inference_mode(), inductor.patch(freezing=True):
            exact = copy.deepcopy(model).double()(x.double())
            outputs = {name: torch.as_tensor(step()) for name, step in steps.items()}
            checked = tuple(Form(name, ((y - exact).norm() / exact.norm()).item()) for name, y in outputs.items())
            if wrong := [form for form in checked if not form.error < MAX_ERROR]:
                raise ValueError(f"wrong outputs, nothing was timed: {wrong}")
            timed = timing.interleave(steps, repeats=REPEATS, shortest_sample=SAMPLE, rest=REST)
    return Latency(environment(), "torchvision:resnet18", 224, torch.get_num_threads(), checked, timed)


def measure_fold() -> FoldTime:
    """Time folding and exporting, after a small model has loaded what is loaded once."""
    x = torch.randn(1, 3, 224, 224)
    fold(build("torchvision:resnet18", classes=10, channels=3).eval(), x)
    model = build("torchvision:resnet152", classes=1000, channels=3).eval()
    capture = functools.partial(torch.export.export, dynamic_shapes=({0: Dim.AUTO},))
    seconds = []
    for _ in range(FOLDS):
        begin = time.perf_counter()
        fold(model, x)
        middle = time.perf_counter()
        capture(model, (torch.cat([x, x]),))
        seconds.append((middle - begin, time.perf_counter() - middle))
    return FoldTime(environment(), "torchvision:resnet152", 224, torch.get_num_threads(), *zip(*seconds, strict=True))


def table(latency: Latency) -> str:
    """The forms in Markdown, with the source's own speed-up."""
    lines = ["| form | ms | times faster than torch eager | quartiles | error |", "|---|---|---|---|---|"]
    eager = latency.timings[0].seconds
    for form, timed in zip(latency.forms, latency.timings, strict=True):
        faster = quartiles(ratios(eager, timed.seconds))
        lines.append(
            f"| {form.name} | {1e3 * statistics.median(timed.seconds):.1f} | {faster.median:.2f}x "
            f"| {faster.low:.2f}-{faster.high:.2f} | {form.error:.1e} |"
        )
    return "\n".join([*lines, f"| Chen et al., folded | 5.7 | {SOURCE:.2f}x | | |"])


def main() -> None:
    """Measure, or show what is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fold", action="store_true", help="time the fold of ResNet-152")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    options = parser.parse_args()
    if options.fold:
        records.write(FOLDING, measure_fold())
    elif not options.table:
        records.write(LATENCY, measure())
    if LATENCY.exists():
        print(table(records.read(Latency, LATENCY)))
    if FOLDING.exists():
        took = records.read(FoldTime, FOLDING)
        whole, captured = (statistics.median(seconds) for seconds in (took.fold_seconds, took.export_seconds))
        print(f"\nfold of {took.model}: {whole:.1f} s, of which torch.export {captured:.1f} s (medians)")


if __name__ == "__main__":
    main()
