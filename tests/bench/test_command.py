"""`leannorm bench` from the command line."""

import pytest
from typer.testing import CliRunner

from leannorm import cli
from leannorm.bench import layers, results
from leannorm.bench.gate import RedGate
from leannorm.bench.plan import LayerPlan, TrainingPlan

QUICK = ["--quick", "--layouts", "channels_last", "--dtypes", "fp32", "--statistics", "grid:1/8"]


def bench(*arguments):
    return CliRunner().invoke(cli.main, ["bench", *map(str, arguments)])


def test_layers_writes_raw_results_that_give_the_same_table(tmp_path):
    file = tmp_path / "new" / "layers.json"
    measured = bench("layers", *QUICK, "--threads", 1, "--out", file)
    assert measured.exit_code == 0, measured.output
    found = results.read(file)
    assert found.conditions.threads == 1
    assert found.conditions.quick
    shown = bench("table", file)
    assert shown.exit_code == 0
    assert shown.stdout
    assert measured.stdout.startswith(shown.stdout)
    assert "raw results: " in measured.stdout


def test_training(tmp_path):
    file = tmp_path / "training.json"
    measured = bench("training", "--quick", "--models", "resnet18", "--statistics", "grid:1/8", "--out", file)
    assert measured.exit_code == 0, measured.output
    (case,) = results.read(file).cases
    assert [timing.side for timing in case.timings] == [
        "torch",
        "grid:1/8",
        "grid:1/8 + fuse",
        "grid:1/8 + fuse convolution",
        "grid:1/8 + tune",
        "ceiling",
    ]
    assert "grid:1/8 + fuse" in measured.stdout


def test_a_red_gate_exits_with_1_and_its_checks_are_written(tmp_path, monkeypatch):
    right = layers._gradients

    def wrong(layer, *arguments):
        found = right(layer, *arguments)
        return {name: tensor * 1.001 for name, tensor in found.items()} if hasattr(layer, "statistics") else found

    monkeypatch.setattr(layers, "_gradients", wrong)
    file = tmp_path / "layers.json"
    measured = bench("layers", *QUICK, "--out", file)
    assert measured.exit_code == 1
    assert "the correctness gate is red, so nothing was timed:" in measured.stderr
    assert "grid:1/8: y has the relative error" in measured.stderr
    assert measured.stdout == ""
    found = results.read(file)
    assert [case.timings for case in found.cases] == [()] * len(found.cases)
    assert {check.side for check in found.cases[0].checks if check.error > check.limit} == {"grid:1/8"}
    shown = bench("table", file)
    assert shown.exit_code == 0
    assert "GATE RED, so nothing was timed:" in shown.stdout
    assert "grid:1/8: y has the relative error" in shown.stdout


def test_what_was_timed_before_an_interruption_is_kept(tmp_path, monkeypatch):
    right, timed = layers.measure, []

    def measure(case, plan):
        if len(timed) == 2:
            raise KeyboardInterrupt
        timed.append(right(case, plan))
        return timed[-1]

    monkeypatch.setattr(layers, "measure", measure)
    file = tmp_path / "layers.json"
    interrupted = bench("layers", *QUICK, "--out", file)
    assert interrupted.exit_code == 130
    assert "interrupted: the file holds the cases that were timed, if any was" in interrupted.stderr
    cases = results.read(file).cases
    assert [case.timings for case in cases] == [*timed, (), (), (), ()]
    assert all(case.checks for case in cases)
    assert "PARTIAL: 2 of 6 cases were timed." in bench("table", file).stdout


def test_earlier_results_are_not_replaced_unasked(tmp_path, monkeypatch):
    file = tmp_path / "layers.json"
    file.write_text("kept")
    monkeypatch.setattr(layers, "run", lambda *_, **__: pytest.fail("measured"))
    refused = bench("layers", *QUICK, "--out", file)
    assert refused.exit_code == 2
    assert "holds earlier results" in refused.stderr
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(KeyboardInterrupt(), 130, "interrupted: "), (RedGate(["a case"]), 1, "a case")],
)
def test_exit_codes(tmp_path, monkeypatch, error, code, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(layers, "run", fail)
    result = bench("layers", "--quick", "--out", tmp_path / "a.json")
    assert result.exit_code == code
    assert message in result.stderr


def test_errors_of_the_user_are_one_message(tmp_path):
    for arguments in (
        ("layers", "--dtypes", "fp8"),
        ("layers", "--statistics", "gird:1/8"),
        ("training", "--quick", "--models", "resnet51", "--out", tmp_path / "a.json"),
        ("layers", "--quick", "--threads", 0),
        ("table", tmp_path / "missing.json"),
    ):
        result = bench(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")


def test_defaults_of_the_command_are_those_of_the_plans(monkeypatch):
    plans = []
    monkeypatch.setattr(cli.bench, "_measure", lambda plan, **_: plans.append(plan))
    assert bench("layers").exit_code == 0
    assert bench("training").exit_code == 0
    assert plans == [LayerPlan(), TrainingPlan()]
