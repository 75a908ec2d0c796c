"""Which commit a result is of."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import leannorm
from leannorm.train import environment

REPOSITORY = Path(leannorm.__file__).resolve().parents[2]
in_repository = pytest.mark.skipif(
    not (REPOSITORY / ".git").exists() or shutil.which("git") is None, reason="there is no repository"
)


@in_repository
def test_the_commit_is_the_repositorys_whoever_owns_it(monkeypatch):
    monkeypatch.setenv("LEANNORM_COMMIT", "given")
    head = subprocess.check_output(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], text=True).strip()
    assert environment.environment().commit == head
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    refused = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert environment.environment().commit == head


@pytest.mark.parametrize("given", ["0123456", None])
def test_where_git_cannot_tell_the_commit_is_the_given_one(monkeypatch, tmp_path, given):
    if given is None:
        monkeypatch.delenv("LEANNORM_COMMIT", raising=False)
    else:
        monkeypatch.setenv("LEANNORM_COMMIT", given)
    copied = tmp_path / "src" / "leannorm" / "__init__.py"
    monkeypatch.setattr(leannorm, "__file__", str(copied))
    assert environment.environment().commit == (given or "unknown")
    (tmp_path / ".git").mkdir()
    assert environment.environment().commit == (given or "unknown"), "git refuses"
    monkeypatch.setenv("PATH", "")
    assert environment.environment().commit == (given or "unknown"), "there is no git"


def test_models_and_benchmarks_need_no_lightning_and_training_says_that_it_does():
    code = """
import sys
sys.modules |= dict.fromkeys(("lightning", "sklearn", "tensorboard", "jinja2", "matplotlib", "onnx"))
import leannorm.bench.command, leannorm.bench.table, leannorm.cli
from leannorm.train.models import build
build("torchvision:resnet18", classes=10, channels=3)
for name in ("run", "checkpoint", "data"):
    try:
        __import__(f"leannorm.train.{name}")
    except ImportError as error:
        assert "pip install 'leannorm[train]'" in str(error), error
    else:
        raise SystemExit(f"{name} was imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
