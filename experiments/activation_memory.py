"""What a training step keeps: bytes saved for backward, and the process's peak, with the convolutions folded and not.

    .venv/bin/python experiments/activation_memory.py       # some minutes on 2 cores; what is measured stays so

Each side in a process of its own: one forward and backward at 224 px, batch 8, channels_last, fp32, random weights and
images. Peak is the growth of the largest resident set over what model and images take, gradients included. Raw results:
`benchmarks/results/activation-memory.json`.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

import leannorm
from leannorm import records
from leannorm.bench.training import saved_bytes
from leannorm.train.models import build

MODELS = ("resnet50", "resnet18", "mobilenet_v2", "regnet_x_800mf", "densenet121")
SIDES = ("torch", "fuse full", "fuse grid:1/32", "fold grid:1/32", "fold grid:1/8")
BATCH, PIXELS = 8, 224
RESULT = Path("benchmarks/results/activation-memory.json")


def measure(name: str, side: str) -> dict[str, int]:
    """Count the bytes of one step of a side."""
    torch.manual_seed(0)
    model = build(f"torchvision:{name}", classes=1000, channels=3).to(memory_format=torch.channels_last)
    images = torch.randn(BATCH, 3, PIXELS, PIXELS).to(memory_format=torch.channels_last)
    if side != "torch":
        how, spelling = side.split()
        leannorm.convert(model, leannorm.parse_statistics(spelling))
        leannorm.fuse(model, convolution=True if how == "fold" else None)
    model(torch.randn(2, 3, 32, 32)).sum().backward()  # what is loaded once does not count
    before = _peak()
    model(images).sum().backward()
    peak = _peak() - before
    return {"saved": saved_bytes(model, images), "peak": peak}


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Measure every side, write the raw results, print the table."""
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    for name in MODELS:
        for side in SIDES:
            if f"{name} {side}" not in found:
                command = [sys.executable, __file__, name, side]
                found[f"{name} {side}"] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
                records.write_text(RESULT, json.dumps(found, indent=1) + "\n")
    print("| model | " + " | ".join(f"{side}: saved, peak" for side in SIDES) + " |")
    print("|---" * (1 + len(SIDES)) + "|")
    for name in MODELS:
        torchs = found[f"{name} torch"]
        cells = []
        for side in SIDES:
            one = found[f"{name} {side}"]
            cells.append(f"{one['saved'] / torchs['saved']:.0%}, {one['peak'] / torchs['peak']:.0%}")
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
