"""`make gpu` without a GPU: what it says, how stages end, and the table of targets from made-up results."""

import dataclasses
import datetime
import math
import re
import runpy
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
from leannorm.bench.results import Check, Conditions, LayerBenchmark, LayerCase, Timing, TrainingBenchmark, TrainingCase
from leannorm.records import Environment
from triton_interpreter import poisoned

ROOT = Path(__file__).parents[2]

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


def python(code, *arguments, **needs):
    return Stage((sys.executable, "-c", code, *arguments), **needs)


def test_stages_end_with_a_verdict():
    assert re.fullmatch(r"passed in \d s, limit 60 s", python("pass").run(60))
    assert python("raise SystemExit(3)").run(60).startswith("FAILED with exit code 3 in ")
    assert re.fullmatch(r"FAILED: not done after \d s, limit 2 s", python("import time; time.sleep(60)").run(2))
    assert python("pass", modules=("no_such_module",)).run(60) == "NOT RUN: no_such_module is not installed"
    assert python("pass", program="no-such-program").run(60) == "NOT RUN: no-such-program is not installed"


@pytest.mark.parametrize("code", [0, 9])
def test_a_tool_that_cannot_work_here_has_not_run(capfd, code):
    says = f"import sys; sys.stderr.write('Error: Device not supported. Please\\n'); sys.exit({code})"
    verdict = python(says, refusal="Device not supported").run(60)
    assert verdict == f"NOT RUN: {Path(sys.executable).name} says 'Device not supported'"
    assert "Error: Device not supported. Please" in capfd.readouterr().out
    assert python("print('0 errors')", refusal="Device not supported").run(60).startswith("passed")
    assert "0 errors" in capfd.readouterr().out


def test_a_stage_that_fails_leaves_no_results_of_an_earlier_run(tmp_path):
    out = tmp_path / "layers.json"
    out.write_text("old")
    assert python("pass", out=out, modules=("no_such_module",)).run(60).startswith("NOT RUN")
    assert out.read_text() == "old"
    assert python("raise SystemExit(1)", out=out).run(60).startswith("FAILED")
    assert not out.exists()


def test_shares_are_all_of_the_time_and_what_is_left_over_goes_to_the_next():
    names = list(gpu.SHARES)
    assert sum(gpu.SHARES.values()) == gpu.TIME
    assert gpu.limit(names, names[0], gpu.TIME) == gpu.SHARES[names[0]]
    left = gpu.TIME - 20
    assert gpu.limit(names, names[1], left) == gpu.SHARES[names[0]] - 20 + gpu.SHARES[names[1]]
    used_up = gpu.TIME - gpu.SHARES[names[0]] - gpu.SHARES[names[1]]
    assert gpu.limit(names, names[2], used_up) == gpu.SHARES[names[2]]
    assert gpu.limit(names, names[-1], 12.0) == 12.0
    assert gpu.limit(["layers"], "layers", gpu.TIME) == gpu.TIME


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], list(gpu.SHARES)),
        (["layers,launches"], ["launches", "layers"]),
        (["layers", "racecheck, layers"], ["layers", "racecheck"]),
    ],
)
def test_stages_are_chosen_by_name(arguments, names):
    assert gpu.chosen(arguments) == names


def test_unknown_stages_are_told_with_the_known_ones(capsys):
    assert gpu.main(["layers,kernels"]) == 2
    message = "make gpu: unknown stage 'kernels'; expected some of tests, launches, layers, training-resnet50, "
    assert message in capsys.readouterr().out


def test_each_stage_is_a_command_that_is_there():
    stages = gpu.stages(CONDITIONS, datetime.date(2026, 11, 22))
    assert list(stages) == list(gpu.SHARES)
    for stage in stages.values():
        for argument in stage.command:
            assert not argument.startswith("tests/") or Path(argument).is_file()
    outs = {name: stage.out.name for name, stage in stages.items() if stage.out is not None}
    assert outs == {
        name: f"{name}-nvidia-h100-a-machine-2026-11.json"
        for name in ("launches", "layers", "training-resnet50", "training-densenet121")
    } | {"decomposed": "layers-decomposed-nvidia-h100-a-machine-2026-11.json"}
    for name in outs:
        _, _, module, *arguments = stages[name].command
        assert module == "leannorm"
        parsed = CliRunner().invoke(cli.main, [*arguments, "--help"])  # --help ends it once all before is parsed
        assert parsed.exit_code == 0, parsed.output
    assert "--report-api-errors" in stages["memcheck"].command


def test_the_whole_of_it_says_verdicts_then_the_table_then_the_files(capsys, monkeypatch, tmp_path):
    written = tmp_path / "layers-a.json"
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    stages = {
        "launches": python("raise SystemExit(1)", out=tmp_path / "launches-a.json"),
        "layers": python(write, str(written), records.to_json(LAYERS), out=written),
        "memcheck": python("pass", program="no-such-program"),
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("leannorm.bench.conditions.conditions", lambda _: CONDITIONS)
    monkeypatch.setattr(targets, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "stages", lambda *_: stages)
    assert gpu.main(["launches,layers,memcheck"]) == 1
    first, _, rest = capsys.readouterr().out.partition("\n== verdicts\n")
    assert first.startswith("NVIDIA H100, torch ")
    assert "commit 0123456789abcdef" in first
    launched, timed, checked, _, heading, *_, last = rest.splitlines()
    assert launched.startswith("launches: FAILED with exit code 1")
    assert timed.startswith("layers: passed in ")
    assert checked == "memcheck: NOT RUN: no-such-program is not installed"
    assert heading == "| figure | wanted | NVIDIA H100, 0123456 |"
    assert last == f"raw results: {written}"


def test_sanitizers_case_runs(monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # as the file sets it for its process
    small = runpy.run_path(str(ROOT / "tests" / "backends" / "small_triton_case.py"))
    with poisoned():
        small["run"]("cpu")
    right = small["normalize"]
    monkeypatch.setitem(small["run"].__globals__, "normalize", lambda *a, **options: right(*a, **options) * math.nan)
    with pytest.raises(AssertionError, match="full"):
        small["run"]("cpu")


def test_launches_are_timed_in_turns_and_counted_afterwards(monkeypatch):
    calls = []
    monkeypatch.setattr("time.perf_counter_ns", lambda: 10_000_000 * len(calls))  # each call is a sample
    monkeypatch.setattr(launches, "sides", lambda *_: {"torch": "torch", "full": "full"})
    monkeypatch.setattr(launches, "stepping", lambda side, case: lambda: calls.append((case.operation, side)))
    monkeypatch.setattr(launches, "_launches", lambda step: step() or calls.append("counted") or 4)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("idle"))
    plan = planned(LayerPlan, "cuda", operations=("bn", "bn+relu"), repeats=20)
    benchmark = launches.run(plan, CONDITIONS)
    found = [(case.operation, case.side, case.launches, len(case.seconds)) for case in benchmark.cases]
    assert found == [(o, side, 4, 20) for o in ("bn", "bn+relu") for side in ("torch", "full")]
    first = calls.index("counted") - 1
    assert ("bn+relu", "full") in calls[:first]
    assert "idle" not in calls[first:]
    order = [call[1] for call in calls[:first] if call[0] == "bn"]
    rounds = [tuple(order[-40:][i : i + 2]) for i in range(0, 40, 2)]
    assert set(rounds) == {("torch", "full"), ("full", "torch")}


def test_defaults_on_cuda_are_those_of_the_targets():
    layers, training = planned(LayerPlan, "cuda"), planned(TrainingPlan, "cuda:0")
    assert (layers.batch, layers.dtypes, layers.layouts, layers.compiled, layers.replayed) == (
        256, ("bf16",), ("channels_last",), True, True,
    )  # fmt: skip
    assert (training.batch, training.dtype, training.models) == (256, "bf16", ("resnet50", "densenet121"))
    assert not training.folded
    assert planned(TrainingPlan, "cuda", folded=True).folded
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


def cells(folder, column=0):
    """Give the figures of a column of the table."""
    return {row[0].removeprefix("| "): row[2 + column].removesuffix(" |") for row in rows(folder)[1:]}


def rows(folder):
    heading, _, *others = targets.table(folder).splitlines()
    return [row.split(" | ") for row in (heading, *others)]


def at(commit, benchmark):
    environment = dataclasses.replace(ENVIRONMENT, commit=commit)
    return dataclasses.replace(benchmark, conditions=dataclasses.replace(CONDITIONS, environment=environment))


STEPS = timed(**{"torch": 300.0, "grid:1/32 + fuse": 200.0, "ceiling": 225.0})
TRAINING = TrainingBenchmark(
    "training", CONDITIONS, 224, 256, "channels_last", "bf16", (TrainingCase("resnet50", (), (), STEPS),)
)
RED = (Check("grid:1/32", "y", 3.0, 1.0, 2.0),)


def test_the_table_says_what_was_measured_and_what_was_not(tmp_path):
    cases = (LaunchCase("bn+add+relu", "torch", 9, (2e-4,)), LaunchCase("bn+add+relu", "grid:1/32", 4, (1e-4,)))
    records.write(tmp_path / "layers-a.json", LAYERS)
    records.write(tmp_path / "training-a.json", TRAINING)
    records.write(tmp_path / "launches-a.json", LaunchBenchmark("launches", CONDITIONS, cases))
    on_cpu = dataclasses.replace(LAYERS, conditions=dataclasses.replace(CONDITIONS, device="cpu"))
    records.write(tmp_path / "layers-b.json", on_cpu)
    assert rows(tmp_path)[0] == ["| figure", "wanted", "NVIDIA H100, 0123456 |"]
    found = cells(tmp_path)
    assert found["bn+relu, grid:1/32, against torch"] == "6.00x"  # of 3 and 12
    assert found["bn+relu, grid:1/32, replayed, against torch"] == "4.00x"
    assert found["bn+relu, grid:1/32, replayed, of the copy bandwidth"] == "75%"  # 5 passes of 0.15 ms in 1 ms
    assert found["bn+add+relu, grid:1/32, host time over torch's"] == "0.50"
    assert found["bn+add+relu, grid:1/32, launches, ours / torch's"] == "4 / 9"
    assert found["resnet50 step, grid:1/32 + fuse, against torch"] == "1.50x"
    assert found["share of BN and ReLU in torch's resnet50 step"] == "25%"
    assert found["bn+relu, fs:1/32, against torch"] == "not measured"
    assert found["densenet121 step, grid:1/32 + fuse, against torch"] == "not measured"


def test_a_commit_has_a_column_of_its_own(tmp_path):
    records.write(tmp_path / "layers-a.json", at("a" * 40, LAYERS))
    records.write(tmp_path / "training-a.json", at("b" * 40, TRAINING))
    assert rows(tmp_path)[0] == ["| figure", "wanted", "NVIDIA H100, aaaaaaa", "NVIDIA H100, bbbbbbb |"]
    layer, step = "bn+relu, grid:1/32, against torch", "resnet50 step, grid:1/32 + fuse, against torch"
    assert (cells(tmp_path)[layer], cells(tmp_path, 1)[layer]) == ("6.00x", "not measured")
    assert (cells(tmp_path)[step], cells(tmp_path, 1)[step]) == ("not measured", "1.50x")


def test_what_was_stopped_says_how_far_it_came(tmp_path):
    untimed = dataclasses.replace(CASES[1], timings=())
    other = dataclasses.replace(untimed, operation="bn+add+relu")
    records.write(tmp_path / "layers-a.json", dataclasses.replace(LAYERS, cases=(CASES[0], untimed, other)))
    assert cells(tmp_path)["bn+relu, grid:1/32, against torch"] == "3.00x (1 of 2 cases)"
    assert cells(tmp_path)["bn+add+relu, grid:1/32, against torch"] == "not measured"


def test_a_red_gate_is_told_instead_of_every_speed_up(tmp_path):
    red, fine = (dataclasses.replace(case, checks=checks) for case, checks in zip(CASES, (RED, ()), strict=True))
    stopped = dataclasses.replace(TRAINING.cases[0], checks=(Check("full", "logits", math.nan, 1.0, 2.0),), timings=())
    records.write(tmp_path / "layers-a.json", dataclasses.replace(LAYERS, cases=(red, fine)))
    records.write(tmp_path / "training-a.json", dataclasses.replace(TRAINING, cases=(stopped,)))
    for figure, cell in cells(tmp_path).items():
        told = (figure.startswith("bn+relu") and "decomposed" not in figure) or "resnet50" in figure
        assert cell == ("gate red" if told else "not measured"), figure


def test_what_is_decomposed_has_figures_of_its_own(tmp_path):
    both = {"grid:1/32, compiled": 1.0, "grid:1/32, decomposed": 1.5}
    cases = tuple(dataclasses.replace(case, timings=case.timings + timed(**both)) for case in LAYERS.cases[:1])
    records.write(tmp_path / "layers-a.json", LAYERS)
    before = targets.table(tmp_path).splitlines()
    records.write(tmp_path / "layers-decomposed-a.json", dataclasses.replace(LAYERS, cases=cases))
    changed = set(targets.table(tmp_path).splitlines()) - set(before)
    line = "| bn+relu, grid:1/32 in torch.compile, one operator against decomposed |  | 1.50x |"
    assert changed == {line}
    red = dataclasses.replace(LAYERS, cases=(dataclasses.replace(CASES[0], checks=RED, timings=()),))
    records.write(tmp_path / "layers-decomposed-a.json", red)
    changed = set(targets.table(tmp_path).splitlines()) - set(before)
    assert changed == {
        line.replace("1.50x", "gate red"),
        line.replace("1.50x", "gate red").replace("grid:1/32", "full"),
    }


def test_the_documented_table_is_that_of_the_recorded_results():
    assert targets.table(ROOT / "benchmarks" / "results") in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_the_documentation_names_every_stage():
    documented = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert [name for name in gpu.SHARES if f"`{name}`" not in documented] == []
