from __future__ import annotations

import dataclasses
import inspect
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

from leannorm import cli, convert, records


def leannorm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "leannorm", *arguments]
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


@pytest.fixture
def deployment():
    environment = records.Environment("a machine", 2, "3.11", (("torch", "2.13"),), "unknown")
    epochs = (records.Epoch(0, 0.5, 0.4, 0.9, 0.1, 1.0),)
    training = records.TrainingRun(
        "resnet8", "digits", "grid:1/4", 0, 1, 128, 0.1, ("0", "1"), (1, 8, 8), epochs, environment
    )
    verification = records.Verification(360, 1e-6, 1e-5, 1.0, 0.9, 0.9, 0.01, True)
    return records.Deployment(
        checkpoint="best.ckpt",
        training=training,
        recalibration=records.Recalibration("trained", 0.9, 0.89, 11),
        fold=records.TransformReport((records.Change("bn", "folded"),)),
        reference_latency_ms=1.0,
        files=(records.ShippedFile("model.fp32.onnx", "fp32", 1000, 0.5, (), verification, ()),),
        passed=True,
    )


@pytest.mark.parametrize("passed", [True, False])
def test_deploy_exits_by_the_verification(tmp_path, monkeypatch, deployment, passed):
    calls = []

    def deploy(checkpoint, **options):
        calls.append((checkpoint, options))
        return dataclasses.replace(deployment, passed=passed)

    # stands in for the real one, which has tests of its own
    module = types.ModuleType("leannorm.deploy")
    monkeypatch.setattr(module, "deploy", deploy, raising=False)
    monkeypatch.setitem(sys.modules, "leannorm.deploy", module)
    result = CliRunner().invoke(cli.main, ["deploy", "best.ckpt", "--data", "digits", "--out", str(tmp_path)])
    assert result.exit_code == (0 if passed else 1)
    assert "grid:1/4" in result.stdout, result.output
    options = {"data": "digits", "out": tmp_path, "precision": "int8", "overwrite": False, "prune": False}
    assert calls == [(Path("best.ckpt"), options)]


def test_report_compares_deployments_on_one_page(tmp_path, deployment):
    for statistics in ("full", "grid:1/4"):
        folder = tmp_path / statistics.partition(":")[0]
        folder.mkdir()
        training = dataclasses.replace(deployment.training, statistics=statistics)
        records.write(folder / "report.json", dataclasses.replace(deployment, training=training))
    page = tmp_path / "new" / "page.html"
    result = CliRunner().invoke(
        cli.main, ["report", str(tmp_path / "full"), str(tmp_path / "grid"), "--out", str(page)]
    )
    assert result.exit_code == 0, result.output
    assert "full" in page.read_text()
    assert "grid:1/4" in page.read_text()
    assert "grid:1/4" in result.stdout


def test_report_draws_the_layers_that_were_recorded_beside_the_checkpoint(tmp_path, deployment):
    shipped = dataclasses.replace(deployment, checkpoint=str(tmp_path / "best.ckpt"))
    records.write(tmp_path / "report.json", shipped)
    points = (records.LayerPoint(0, 0.1, 1.0, None, 2.0), records.LayerPoint(9, 0.1, 1.0, 0.5, 2.0))
    trace = records.TrainingTrace("grid:1/4", (records.LayerTrace("bn", points),), ())
    records.write(tmp_path / "layers.json", trace)
    page = tmp_path / "page.html"
    result = CliRunner().invoke(cli.main, ["report", str(tmp_path), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert "Layers while training" in page.read_text()
    assert "0.5 at step 9" in page.read_text()


def test_report_of_a_folder_without_one(tmp_path):
    result = CliRunner().invoke(cli.main, ["report", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "report.json" in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_python_m_leannorm_is_the_command():
    command = [sys.executable, "-m", "leannorm", "report", "--out", "page.html", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")


STOPS = {  # the signal comes with the call of this name, after which so many files are there
    "while files are made": ("(folder / 'model.fp32.onnx').write_bytes(b'half')", "Path.write_bytes", 0),
    "between the moves": ("[(folder / file).touch() for file in shipping.FILES]", "Path.replace", 0),
    "after the moves": ("[(folder / file).touch() for file in shipping.FILES]", "shutil.rmtree", 5),
}


@pytest.mark.parametrize(("work", "call", "files"), STOPS.values(), ids=STOPS)
def test_a_terminated_deploy_says_what_it_left_and_exits_by_convention(tmp_path, work, call, files):
    # stands in for the slow part of the work
    doomed = textwrap.dedent(f"""
        import os, shutil, signal, sys, types
        from pathlib import Path
        from leannorm import cli
        from leannorm.deploy import shipping

        def deploy(checkpoint, *, out, **options):
            with shipping._staged(out) as folder:
                print(folder.name)
                {work}

        def then_stopped(*args, plain={call}, **options):
            plain(*args, **options)
            os.kill(os.getpid(), signal.SIGTERM)

        {call} = then_stopped
        module = types.ModuleType("leannorm.deploy")
        module.deploy = deploy
        sys.modules["leannorm.deploy"] = module
        cli.main(["deploy", "best.ckpt", "--out", {str(tmp_path / "out")!r}])
    """)
    command = [sys.executable, "-c", doomed]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 128 + signal.SIGTERM, result.stderr
    assert result.stdout.startswith(".deploy.")
    said = f"all files are in {tmp_path / 'out'}" if files else "nothing was changed"
    assert result.stderr == f"terminated: {said}\n"
    assert len(list(tmp_path.glob("out/*"))) == files
    assert files or not (tmp_path / "out").exists()


def test_the_handler_of_sigterm_is_put_back(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(cli.main, ["deploy", "no.ckpt"])
    assert result.exit_code == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_explain_prints_the_table(tmp_path):
    arguments = ["explain", "resnet8", "--statistics", "grid:1/8", "--image-size", "16", "--batch-size", "4"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 0, result.output
    heading, first, *_ = result.stdout.splitlines()
    assert heading.split() == ["module", "layer", "statistics", "computes", "by"]
    assert "grid:1/8 (128 of 1024)  batch norm + relu" in first
    apart = CliRunner().invoke(cli.main, [*arguments, "--no-fuse"])
    assert "leannorm.fuse computes batch norm + add + relu in one operator" in apart.stdout
    folded = CliRunner().invoke(cli.main, [*arguments, "--convolution"])
    assert "convolution + batch norm + relu" in folded.stdout


def test_train_and_explain_take_the_same_statistics_as_convert():
    model, _ = convert(nn.Sequential(nn.BatchNorm2d(3)))
    assert str(model[0].statistics) == cli.DEFAULT_STATISTICS
    for command in (cli.train, cli.explain):
        assert inspect.signature(command).parameters["statistics"].default == cli.DEFAULT_STATISTICS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet9",), "unknown model 'resnet9'"),
        (("resnet8", "--statistics", "grid"), "grid"),
        (("resnet8", "--image-size", "0"), "the image size must be at least 1, got 0"),
        (("resnet8", "--device", "tpu9"), "resnet8 cannot be built on 'tpu9'"),
        (("resnet8", "--no-fuse", "--convolution"), "leave --no-fuse or --convolution away"),
        (("torchvision:vit_b_32", "--image-size", "32"), "torchvision:vit_b_32 does not take images of shape"),
    ],
)
def test_explain_refuses(arguments, message):
    result = CliRunner().invoke(cli.main, ["explain", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_default_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from leannorm.train.run import default_folder

    assert default_folder("timm:resnet18", "../data/cifar10", "fs:1/32+vdn:1") == Path(
        "runs/timm_resnet18-cifar10-fs_1_32+vdn_1"
    )
    result = leannorm("train", "resnet8", "digits", "--epochs=1")
    assert result.returncode == 0, result.stderr
    result = leannorm("deploy", "runs/resnet8-digits-grid_1_8/last.ckpt")
    assert result.returncode in (0, 1), result.stderr
    assert (tmp_path / "runs/resnet8-digits-grid_1_8/deployed/report.html").exists()
