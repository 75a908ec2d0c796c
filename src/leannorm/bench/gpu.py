"""`make gpu`: kernel tests, benchmarks and compute-sanitizer on the CUDA GPU that is there, straight from the sources.

Each stage is a process of its own, which may take its share of the time and what the stages before it left over. What
fails, or does not fit into the time, is said, and the stages after it run all the same. ``python -m
leannorm.bench.gpu`` takes the names of stages; ``table`` shows what recorded results say about the targets.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leannorm.bench.results import Conditions

TIME = 470.0  # seconds for everything
SHARES = {  # of it, for each stage, what matters most first
    "tests": 110.0,
    "launches": 30.0,
    "layers": 140.0,
    "training-resnet50": 90.0,
    "training-densenet121": 40.0,
    "memcheck": 30.0,
    "racecheck": 20.0,
    "decomposed": 10.0,  # and what the others leave over
}
WORKERS = 14  # of the kernel tests: more of them would not fit into the GPU's memory
_TOOLKIT = str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))  # often not on the path


@dataclass(frozen=True)
class Stage:
    """A command, and what it needs.

    Args:
        command: the program and its arguments.
        modules: without which it cannot run.
        program: a file without which it cannot run.
        refusal: what the program prints where it cannot work; its output is shown when it is done.
        out: the file of its results.
    """

    command: tuple[str, ...]
    modules: tuple[str, ...] = ()
    program: str | None = None
    refusal: str | None = None
    out: Path | None = None

    def run(self, limit: float) -> str:
        """Run it for at most ``limit`` seconds; give the verdict."""
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if self.program is not None and not Path(self.program).is_file():
            missing.append(self.program)
        if missing:
            return f"NOT RUN: {', '.join(missing)} is not installed"
        if self.out is not None:
            self.out.unlink(missing_ok=True)  # or an earlier run's figures would stand for a stage that fails
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            start = time.monotonic()
            code = self._exit_code(limit, output if self.refusal else None)
            taken = f"{time.monotonic() - start:.0f} s, limit {limit:.0f} s"
            output.seek(0)
            printed = output.read()
        if printed:
            _say(printed)
        if self.refusal is not None and self.refusal in printed:
            return f"NOT RUN: {Path(self.command[0]).name} says {self.refusal!r}"
        if code is None:
            return f"FAILED: not done after {taken}"
        return f"passed in {taken}" if code == 0 else f"FAILED with exit code {code} in {taken}"

    def _exit_code(self, limit: float, output: IO[str] | None) -> int | None:
        """Give the exit code, None where the time was over before."""
        process = subprocess.Popen(self.command, start_new_session=True, stdout=output, stderr=output)
        try:
            return process.wait(limit)
        except BaseException as error:  # its workers too, which would slow the next stage down
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return None


def stages(conditions: Conditions, today: datetime.date) -> dict[str, Stage]:
    """Give the stages by name, in the order of their shares."""
    from leannorm.bench.results import default_path

    needed = ("typer", "rich", "torchvision")

    def bench(kind: str, name: str, *options: str) -> Stage:
        out = default_path(name, conditions, today)
        fixed = ("--device", "cuda", "--overwrite", "--out", str(out))
        return Stage((sys.executable, "-m", "leannorm", "bench", kind, *fixed, *options), needed, out=out)

    def sanitizer(tool: str, *options: str) -> Stage:
        small = (sys.executable, "tests/backends/small_triton_case.py")
        program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), _TOOLKIT]))
        command = (program or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *options, *small)
        return Stage(command, program=command[0], refusal="Device not supported")

    tests = tuple(f"tests/backends/test_triton{part}.py" for part in ("", "_layers", "_on_gpu"))
    parallel = ("-n", str(min(WORKERS, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    pytest = (sys.executable, "-m", "pytest", "-q", "-W", "default", "-m", "not slow", *parallel, *tests)
    rounds = ("--repeats", "5")
    least = ("--operations", "bn+relu", "--statistics", "full,grid:1/32", "--no-compile", "--no-replayed")
    return {
        "tests": Stage(pytest, ("pytest", "hypothesis", *needed)),
        "launches": bench("launches", "launches"),
        "layers": bench("layers", "layers", "--operations", "bn+relu,bn+add+relu", "--repeats", "7"),
        "training-resnet50": bench("training", "training-resnet50", "--models", "resnet50", "--compile", *rounds),
        # compiling this one takes minutes
        "training-densenet121": bench(
            "training", "training-densenet121", "--models", "densenet121", "--no-compile", *rounds
        ),
        "memcheck": sanitizer("memcheck", "--report-api-errors", "no"),  # CUDA's libraries probe, and handle errors
        "racecheck": sanitizer("racecheck"),
        "decomposed": bench("layers", "layers-decomposed", "--decomposed", *least, *rounds),
    }


def chosen(arguments: Sequence[str]) -> list[str]:
    """Give the stages that the arguments name, apart or separated by commas, in order; all where they name none.

    Raises:
        ValueError: for a name that no stage has.
    """
    names = [name.strip() for argument in arguments for name in argument.split(",") if name.strip()]
    unknown = [name for name in names if name not in SHARES]
    if unknown:
        raise ValueError(f"unknown stage {', '.join(map(repr, unknown))}; expected some of {', '.join(SHARES)}")
    return [name for name in SHARES if name in names or not names]


def limit(names: Sequence[str], name: str, time_left: float) -> float:
    """Give the seconds that a stage may take: all that is left but the shares of the stages after it."""
    return time_left - sum(SHARES[later] for later in names[names.index(name) + 1 :])


def main(arguments: Sequence[str]) -> int:
    """Run the stages, or show the table alone; give the exit code."""
    end = time.monotonic() + TIME
    if arguments == ["table"]:
        from leannorm.bench.targets import table

        _say(table())
        return 0
    try:
        names = chosen(arguments)
    except ValueError as error:
        _say(f"make gpu: {error}")
        return 2
    if importlib.util.find_spec("torch") is None:
        _say(f"make gpu needs PyTorch for CUDA, and {sys.executable} has none: make gpu PYTHON=...")
        return 2
    import torch

    if not torch.cuda.is_available():
        _say("make gpu: there is no CUDA GPU here; nothing was run, nothing is measured")
        return 2
    from leannorm.bench.conditions import conditions
    from leannorm.bench.plan import LayerPlan, planned
    from leannorm.bench.targets import RESULTS, table

    described = conditions(planned(LayerPlan, "cuda"))
    commit = described.environment.commit
    _say(f"{described.device}, torch {torch.__version__}, Python {sys.version.split()[0]}, commit {commit}")
    if commit == "unknown":
        _say("results will not tell their commit; where there is no repository, say it: make gpu COMMIT=...")
    RESULTS.mkdir(parents=True, exist_ok=True)
    known = stages(described, datetime.datetime.now(datetime.UTC).date())
    verdicts = {}
    for name in names:
        _say(f"\n== {name}")
        verdicts[name] = known[name].run(limit(names, name, end - time.monotonic()))
        _say(verdicts[name])
    _say("\n== verdicts")
    for name, verdict in verdicts.items():
        _say(f"{name}: {verdict}")
    _say("\n" + table(RESULTS) + "\n")
    for name, verdict in verdicts.items():
        out = known[name].out
        if out is not None and out.exists() and not verdict.startswith("NOT RUN"):
            _say(f"raw results: {out}")
    return 0 if all(verdict.startswith("passed") for verdict in verdicts.values()) else 1


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
