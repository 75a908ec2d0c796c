"""`make gpu` without a GPU: what it says, how stages end, and the table of targets from made-up results."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from leannorm import cli, records
from leannorm.bench import gpu, launches, summary, targets
from leannorm.bench.gpu import Stage
from leannorm.bench.launches import LaunchBenchmark, LaunchCase
from leannorm.bench.plan import LayerPlan, TrainingPlan, planned
from leannorm.bench.results import Conditions, LayerBenchmark, LayerCase, Timing, TrainingBenchmark, TrainingCase
from leannorm.records import Environment

ENVIRONMENT = Environment("a machine", 2, "3.12", (("torch", "2.11"),), "0123456789abcdef")
CONDITIONS = Conditions(ENVIRONMENT, "NVIDIA H100", 2, (), 2**20, 3, 0, quick=False)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def timed(**milliseconds):
    return tuple(Timing(side, 1, (seconds / 1e3,) * 3) for side, seconds in milliseconds.items())


def layer_case(shape, torchs, ours, replayed):
    milliseconds = {"torch": torchs, "grid:1/32": ours, "torch, replayed": 4.0, "grid:1/32, replayed": replayed}
    timings = timed(**milliseconds, copy=0.3)
    return LayerCase("bn+relu", shape, "channels_last", "bf16", (), timings)


CASES = (layer_case((256, 64, 56, 56), 6.0, 2.0, 1.0), layer_case((256, 64, 28, 28), 12.0, 1.0, 1.0))
LAYERS = LayerBenchmark("layers", CONDITIONS, 224, 256, CASES)


@no_gpu
def test_without_a_gpu_it_says_so_and_fails(capsys):
    assert gpu.main([]) == 2
    assert "there is no CUDA GPU here; nothing was run, nothing is measured" in capsys.readouterr().out


@no_gpu
def test_commands_for_a_gpu_say_that_there_is_none(tmp_path):
    for kind in ("layers", "training", "launches"):
        result = CliRunner().invoke(cli.main, ["bench", kind, "--device", "cuda", "--out", str(tmp_path / "a.json")])
        assert result.exit_code == 2
        assert "no CUDA device" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_stages_end_with_a_verdict():
    def python(code, limit=60.0, **needs):
        return Stage((sys.executable, "-c", code), limit, **needs)

    assert python("pass").run(60).startswith("passed in ")
    assert python("raise SystemExit(3)").run(60).startswith("FAILED with exit code 3")
    assert python("import time; time.sleep(60)", 0.5).run(60) == "FAILED: not done after 0 s"
    assert python("pass").run(5) == "NOT RUN: no time was left"
    assert python("pass", modules=("no_such_module",)).run(60) == "NOT RUN: no_such_module is not installed"
    assert python("pass", program="no-such-program").run(60) == "NOT RUN: no-such-program is not installed"


def test_defaults_on_cuda_are_those_of_the_targets():
    layers, training = planned(LayerPlan, "cuda"), planned(TrainingPlan, "cuda:0")
    assert (layers.batch, layers.dtypes, layers.layouts, layers.compiled, layers.replayed) == (
        256, ("bf16",), ("channels_last",), True, True,
    )  # fmt: skip
    assert (training.batch, training.dtype, training.models) == (256, "bf16", ("resnet50", "densenet121"))
    assert planned(LayerPlan, "cuda", dtypes=("fp32",), compiled=False) == dataclasses.replace(
        layers, dtypes=("fp32",), compiled=False
    )
    assert planned(LayerPlan, "cpu", batch=None) == LayerPlan()
    assert planned(TrainingPlan, "cpu") == TrainingPlan()


def test_plans_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="CUDA graphs need a CUDA device, got 'cpu'"):
        LayerPlan(replayed=True)
    with pytest.raises(ValueError, match="unknown dtype 'fp8'"):
        TrainingPlan(dtype="fp8")
    with pytest.raises(ValueError, match="unknown operation 'bn\\+gelu'"):
        LayerPlan(operations=("bn+gelu",))
    with pytest.raises(ValueError, match="launches are those of a GPU"):
        launches.run(LayerPlan(), CONDITIONS)


def test_replays_are_compared_with_torchs_replay():
    case = LAYERS.cases[0]
    assert summary.speedup(case, "grid:1/32") == pytest.approx([3.0] * 3)
    assert summary.speedup(case, "grid:1/32, replayed") == pytest.approx([4.0] * 3)
    rows = {row.side: row.speedup.median for row in summary.layer_rows(LAYERS)}
    assert rows["grid:1/32, replayed"] == pytest.approx(4.0)


def test_the_table_says_what_was_measured_and_what_was_not(tmp_path):
    steps = timed(**{"torch": 300.0, "grid:1/32 + fuse": 200.0, "ceiling": 225.0})
    training = TrainingBenchmark(
        "training", CONDITIONS, 224, 256, "channels_last", "bf16", (TrainingCase("resnet50", (), (), steps),)
    )
    cases = (LaunchCase("bn+add+relu", "torch", 9, (2e-4,)), LaunchCase("bn+add+relu", "grid:1/32", 4, (1e-4,)))
    records.write(tmp_path / "layers-a.json", LAYERS)
    records.write(tmp_path / "training-a.json", training)
    records.write(tmp_path / "launches-a.json", LaunchBenchmark("launches", CONDITIONS, cases))
    on_cpu = dataclasses.replace(LAYERS, conditions=dataclasses.replace(CONDITIONS, device="cpu"))
    records.write(tmp_path / "layers-b.json", on_cpu)
    (heading, _, *rows) = targets.table(tmp_path).splitlines()
    assert heading == "| figure | wanted | NVIDIA H100 |"
    found = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[2].removesuffix(" |") for row in rows}
    assert found["bn+relu, grid:1/32, against torch"] == "6.00x"  # of 3 and 12
    assert found["bn+relu, grid:1/32, replayed, against torch"] == "4.00x"
    assert found["bn+relu, grid:1/32, replayed, of the copy bandwidth"] == "75%"  # 5 passes of 0.15 ms in 1 ms
    assert found["bn+add+relu, grid:1/32, host time over torch's"] == "0.50"
    assert found["resnet50 step, grid:1/32 + fuse, against torch"] == "1.50x"
    assert found["share of BN and ReLU in torch's resnet50 step"] == "25%"
    assert found["bn+relu, fs:1/32, against torch"] == "not measured"
    assert found["densenet121 step, grid:1/32 + fuse, against torch"] == "not measured"


def test_the_documented_table_is_that_of_the_recorded_results():
    root = Path(__file__).parents[2]
    assert targets.table(root / "benchmarks" / "results") in (root / "docs" / "gpu.md").read_text(encoding="utf-8")
