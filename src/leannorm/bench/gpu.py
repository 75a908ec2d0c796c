"""`make gpu`: kernel tests, benchmarks and compute-sanitizer on the CUDA GPU that is there, straight from the sources.

Each stage is a process of its own with a time limit. What fails, or does not fit into the time, is said, and the stages
after it run all the same. ``python -m leannorm.bench.gpu table`` shows what recorded results say about the targets.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TIME = 470.0  # seconds for all stages together
_MODELS = {"resnet50": "--compile", "densenet121": "--no-compile"}  # compiling the other one takes minutes
_TOOLKIT = str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))  # often not on the path


@dataclass(frozen=True)
class Stage:
    """A command with its limit in seconds, and the modules and the program's file without which it cannot run."""

    command: tuple[str, ...]
    limit: float
    modules: tuple[str, ...] = ()
    program: str | None = None

    def run(self, time_left: float) -> str:
        """Run it; give the verdict."""
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if self.program is not None and not Path(self.program).is_file():
            missing.append(self.program)
        if missing:
            return f"NOT RUN: {', '.join(missing)} is not installed"
        if time_left < 10:
            return "NOT RUN: no time was left"
        start, limit = time.monotonic(), min(self.limit, time_left)
        process = subprocess.Popen(self.command, start_new_session=True)
        try:
            code = process.wait(limit)
        except BaseException as error:  # its workers too, which would slow the next stage down
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return f"FAILED: not done after {limit:.0f} s"
        taken = f"{time.monotonic() - start:.0f} s"
        return f"passed in {taken}" if code == 0 else f"FAILED with exit code {code} in {taken}"


def stages() -> dict[str, Stage]:
    """Give the stages, what matters most first."""
    from leannorm.bench.conditions import conditions
    from leannorm.bench.plan import LayerPlan, planned
    from leannorm.bench.results import default_path

    described, today = conditions(planned(LayerPlan, "cuda")), datetime.datetime.now(datetime.UTC).date()
    tests = ["tests/backends/test_triton.py", "tests/backends/test_triton_on_gpu.py"]
    parallel = ["-n", str(min(6, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    needed = ("typer", "rich", "torchvision", "lightning")

    def bench(kind: str, name: str, limit: float, *options: str) -> Stage:
        out = ("--device", "cuda", "--overwrite", "--out", str(default_path(name, described, today)))
        return Stage((sys.executable, "-m", "leannorm.cli", "bench", kind, *out, *options), limit, needed)

    def sanitizer(tool: str) -> Stage:
        small = (sys.executable, "tests/backends/small_triton_case.py")
        program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), _TOOLKIT]))
        command = (program or "compute-sanitizer", "--error-exitcode", "9", "--tool", tool, *small)
        return Stage(command, 60, program=command[0])

    return {
        "kernel tests": Stage(
            (sys.executable, "-m", "pytest", "-q", "-W", "default", "-m", "not slow", *parallel, *tests),
            200,
            ("pytest", "hypothesis", *needed),
        ),
        "launches": bench("launches", "launches", 60),
        "layers": bench("layers", "layers", 280, "--operations", "bn+relu,bn+add+relu", "--repeats", "7"),
        **{
            f"training {model}": bench(
                "training", f"training-{model}", 150, "--models", model, compiled, "--repeats", "5"
            )
            for model, compiled in _MODELS.items()
        },
        "memcheck": sanitizer("memcheck"),
        "racecheck": sanitizer("racecheck"),
    }


def main(arguments: list[str]) -> int:
    """Run the stages, or show the table alone; give the exit code."""
    if arguments == ["table"]:
        from leannorm.bench.targets import table

        _say(table())
        return 0
    if importlib.util.find_spec("torch") is None:
        _say(f"make gpu needs PyTorch for CUDA, and {sys.executable} has none: make gpu PYTHON=...")
        return 2
    import torch

    if not torch.cuda.is_available():
        _say("make gpu: there is no CUDA GPU here; nothing was run, nothing is measured")
        return 2
    from leannorm.bench.targets import RESULTS, table

    _say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    end, verdicts = time.monotonic() + TIME, {}
    for name, stage in stages().items():
        _say(f"\n== {name}")
        verdicts[name] = stage.run(end - time.monotonic())
    for name, verdict in verdicts.items():
        _say(f"{name}: {verdict}")
    _say("\n" + table())
    return 0 if all(verdict.startswith("passed") for verdict in verdicts.values()) else 1


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
