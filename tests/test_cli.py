from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from leannorm import cli, records


def leannorm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "leannorm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_help_imports_nothing_heavy():
    result = leannorm("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("train", "deploy", "report"))
    code = "import sys, leannorm.cli; print([n for n in ('torch', 'lightning', 'numpy') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "resnet9", "digits", "--out", "out"), "error: unknown model 'resnet9' (did you mean resnet8"),
        (("train", "resnet8", "digits", "--out", "out", "--resume"), "error: out holds no run to resume"),
    ],
)
def test_errors_of_the_user_are_one_message(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("no such source"), 2, "error: no such source\n"),
        (FileExistsError("runs/a already holds a run"), 2, "error: runs/a already holds a run\n"),
        (ImportError("timm is not installed: pip install 'leannorm[timm]'"), 2, "error: timm is not installed"),
        (KeyboardInterrupt(), 130, "interrupted: "),
    ],
)
def test_exit_codes(monkeypatch, error, code, text):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("leannorm.train.run.train", fail)
    result = CliRunner().invoke(cli.main, ["train", "resnet8", "digits", "--out", "out"])
    assert result.exit_code == code
    assert result.stderr.startswith(text)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a bug")

    monkeypatch.setattr("leannorm.train.run.train", fail)
    result = CliRunner().invoke(cli.main, ["train", "resnet8", "digits", "--out", "out"])
    assert isinstance(result.exception, AssertionError)


def test_train(tmp_path):
    result = leannorm("train", "resnet8", "digits", "--epochs=1", "--statistics=grid:1/4", f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    run = records.read(records.TrainingRun, tmp_path / "run.json")
    (epoch,) = run.history
    assert f"validation accuracy {epoch.validation_accuracy:.2%} after epoch 0: {tmp_path}" in result.stdout
    assert (run.statistics, run.epochs, run.seed) == ("grid:1/4", 1, 0)
