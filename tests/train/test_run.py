from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from leannorm import records
from leannorm.records import TrainingRun
from leannorm.train import checkpoint
from leannorm.train.module import ImageClassifier
from leannorm.train.resnet import ResNet
from leannorm.train.run import train

# A resnet8 with dropout, so that a run draws from the default generator; it sends its own process a signal at a
# given training step. There are 5 steps an epoch.
DOOMED = """
import os
from torch import nn
from leannorm.train.resnet import resnet8

class Doomed(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.network = resnet8(num_classes, in_channels)
        self.dropout = nn.Dropout(0.1)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        if self.training and self.steps == int(os.environ.get("STOP_AT", -1)):
            os.kill(os.getpid(), int(os.environ["STOP_SIGNAL"]))
        return self.network(self.dropout(x))
"""
EPOCHS, STEPS = 3, 5
ARGUMENTS = {"statistics": "grid:1/4@step", "epochs": EPOCHS, "seed": 7, "batch_size": 256, "learning_rate": 0.05}
# One process that has everything imported forks one for each run: imports are most of the time of a short run.
FORK = """
import json, os, signal, sys
import leannorm.train.run
from leannorm.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process inherits that it is ignored
codes = []
for arguments, environment, errors in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        main(arguments)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""
STOPS = {
    "killed in the first epoch": (signal.SIGKILL, 3),
    "killed in the last epoch": (signal.SIGKILL, 2 * STEPS + 3),
    "interrupted": (signal.SIGINT, STEPS + 3),
    "terminated": (signal.SIGTERM, STEPS + 3),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "doomed.py"
    file.write_text(DOOMED)
    return f"{file}:Doomed"


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):
    """Stop a process in each of the ways; give the folders, exit codes and error output."""
    folder = tmp_path_factory.mktemp("stopped")
    options = [f"--{key.replace('_', '-')}={value}" for key, value in ARGUMENTS.items()]
    runs = [
        (
            ["train", model, "digits", *options, f"--out={folder / name}"],
            {"STOP_AT": str(step), "STOP_SIGNAL": str(int(number))},
            str(folder / f"{name}.txt"),
        )
        for name, (number, step) in STOPS.items()
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FORK]
    codes = json.loads(subprocess.check_output(command, input=json.dumps(runs), env=environment, text=True))
    errors = [(folder / f"{name}.txt").read_text() for name in STOPS]
    return {name: (folder / name, code, text) for name, code, text in zip(STOPS, codes, errors, strict=True)}


@pytest.fixture(scope="module")
def unbroken(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    train(model, "digits", out=out, **ARGUMENTS)
    return out


def rows(out):
    with (out / "metrics.csv").open(newline="") as stream:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(stream)]


def assert_same_state(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_state(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same_state(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("name", STOPS)
def test_a_resumed_run_ends_as_if_it_had_never_been_stopped(name, stopped, unbroken, model):
    out, code, errors = stopped[name]
    number, step = STOPS[name]
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
    assert code == expected[number], errors
    finished = (step - 1) // STEPS
    assert len(rows(out)) == finished
    before = checkpoint.read(out / "last.ckpt")
    assert before["global_step"] == finished * STEPS
    if number != signal.SIGKILL:
        assert "Traceback" not in errors
        assert checkpoint.read(out / "interrupted.ckpt")["global_step"] >= step - 1
        checkpoint.load(out / "interrupted.ckpt")

    run = train(model, "digits", out=out, resume=True, **ARGUMENTS)

    for file in ("last.ckpt", "best.ckpt"):
        resumed, straight = (checkpoint.read(folder / file) for folder in (out, unbroken))
        for entry in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters"):
            assert_same_state(resumed[entry], straight[entry])
    assert not torch.equal(
        before["state_dict"]["model.network.fc.weight"], straight["state_dict"]["model.network.fc.weight"]
    )
    assert [row["epoch"] for row in rows(out)] == [str(epoch) for epoch in range(EPOCHS)]
    assert rows(out) == rows(unbroken)
    assert records.read(TrainingRun, out / "run.json") == run
    assert [epoch.epoch for epoch in run.history] == list(range(EPOCHS))
    assert not (out / "interrupted.ckpt").exists()
    assert not list(out.glob(".*"))
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("training_loss_step")] == list(range(EPOCHS * STEPS))


def test_an_interruption_says_how_to_go_on(stopped):
    _, _, errors = stopped["interrupted"]
    assert "interrupted: what was done is kept; the same command with --resume goes on" in errors


def test_files_of_a_run(trained):
    assert {path.name for path in trained.iterdir()} == {
        "last.ckpt",
        "best.ckpt",
        "metrics.csv",
        "run.json",
        "tensorboard",
    }
    run = records.read(TrainingRun, trained / "run.json")
    assert (run.model, run.data, run.statistics, run.seed, run.epochs) == ("resnet8", "digits", "grid:1/4", 3, 2)
    assert run.input_shape == (1, 8, 8)
    assert dict(run.environment.versions)["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    read = [{name: float(value) for name, value in row.items()} for row in rows(trained)]
    history = [{k: v for k, v in dataclasses.asdict(epoch).items() if k != "seconds"} for epoch in run.history]
    assert read == history
    assert history[1]["training_loss"] < history[0]["training_loss"]


def test_best_is_the_epoch_of_highest_validation_accuracy(tmp_path):
    arguments = {"statistics": "full", "epochs": 4, "seed": 0, "batch_size": 512, "learning_rate": 2.0}
    run = train("resnet8", "digits", out=tmp_path, **arguments)
    accuracies = [epoch.validation_accuracy for epoch in run.history]
    assert checkpoint.read(tmp_path / "best.ckpt")["epoch"] == accuracies.index(max(accuracies))
    assert checkpoint.read(tmp_path / "last.ckpt")["epoch"] == 3


def test_the_source_of_statistics_changes_neither_data_nor_initial_weights(tmp_path, monkeypatch):
    seen = {}
    step = ImageClassifier.training_step

    def remember(self, batch, batch_idx):
        run = seen.setdefault(self.configuration.statistics, [])
        run.append((batch[0].clone(), batch[1].clone(), self.model.conv.weight.detach().clone()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", remember)
    for number, statistics in enumerate(("full", "grid:1/4@step", "vdn:1")):
        train("resnet8", "digits", statistics=statistics, epochs=2, seed=5, out=tmp_path / str(number), batch_size=512)
    full, *others = seen.values()
    assert len(others) == 2
    for other in others:
        assert len(other) == len(full) == 4
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(full, other, strict=True))
        assert torch.equal(full[0][2], other[0][2])
        assert not torch.equal(full[-1][2], other[-1][2])


def test_decay_spares_biases_and_normalization(tmp_path, monkeypatch):
    groups = {}
    configure = ImageClassifier.configure_optimizers

    def remember(self):
        result = configure(self)
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for group in result["optimizer"].param_groups:
            groups[group["weight_decay"]] = {names[id(parameter)] for parameter in group["params"]}
        return result

    monkeypatch.setattr(ImageClassifier, "configure_optimizers", remember)
    train("resnet8", "digits", statistics="full", epochs=1, seed=0, out=tmp_path, batch_size=512, weight_decay=0.01)
    assert groups.keys() == {0.01, 0.0}
    assert all("bn" in name or name.endswith(("bias", "shortcut.1.weight")) for name in groups[0.0])
    assert all("conv" in name or "shortcut.0" in name or name == "model.fc.weight" for name in groups[0.01])


def test_a_folder_that_holds_a_run_is_refused_and_kept(trained):
    before = (trained / "last.ckpt").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds a run \(last\.ckpt.*--resume.*--overwrite"):
        train("resnet8", "digits", statistics="full", epochs=1, seed=0, out=trained)
    with pytest.raises(ValueError, match="unknown model"):
        train("resnet9", "digits", statistics="full", epochs=1, seed=0, out=trained, overwrite=True)
    assert (trained / "last.ckpt").read_bytes() == before


def test_overwrite_starts_anew(tmp_path):
    arguments = {"statistics": "full", "seed": 0, "out": tmp_path, "batch_size": 512}
    train("resnet8", "digits", epochs=2, **arguments)
    (tmp_path / "interrupted.ckpt").touch()
    (tmp_path / "notes.txt").write_text("mine")
    assert len(train("resnet8", "digits", epochs=1, overwrite=True, **arguments).history) == 1
    assert not (tmp_path / "interrupted.ckpt").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1


def test_a_finished_run_resumes_to_itself(trained):
    before = records.read(TrainingRun, trained / "run.json")
    weights = checkpoint.read(trained / "last.ckpt")["state_dict"]
    run = train(
        "resnet8",
        "digits",
        statistics="grid:1/4",
        epochs=2,
        seed=3,
        out=trained,
        batch_size=256,
        learning_rate=0.05,
        resume=True,
    )
    assert run == before
    assert_same_state(checkpoint.read(trained / "last.ckpt")["state_dict"], weights)


def test_training_is_fused_and_channels_last_unless_told_otherwise(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ImageClassifier, "on_train_end", lambda self: seen.append(self.model))
    for name, options in (("usual", {}), ("plain", {"channels_last": False, "fuse": False})):
        run = train("resnet8", "digits", out=tmp_path / name, **options, **(ARGUMENTS | {"epochs": 1}))
        assert (run.channels_last, run.fuse) == (not options, not options)
    layouts = [model.stages[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) for model in seen]
    assert layouts == [True, False]
    assert [type(model) is ResNet for model in seen] == [False, True]
    assert all(isinstance(model, ResNet) for model in seen)
    losses = [records.read(TrainingRun, tmp_path / name / "run.json").history[0] for name in ("usual", "plain")]
    assert losses[0].validation_loss == pytest.approx(losses[1].validation_loss, rel=0.05)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"epochs": 3}, "epochs 2, got 3"),
        ({"statistics": "full", "seed": 4}, "statistics grid:1/4, got full; seed 3, got 4"),
        ({"model": "resnet20"}, "model resnet8, got resnet20"),
        ({"gamma_l1": 1e-4}, "gamma_l1 0.0, got 0.0001"),
        ({"channels_last": False}, "channels_last True, got False"),
        ({"fuse": False}, "fuse True, got False"),
    ],
)
def test_resume_with_other_arguments_names_them(trained, change, difference):
    arguments = {"model": "resnet8", "statistics": "grid:1/4", "epochs": 2, "seed": 3, **change}
    with pytest.raises(ValueError, match=f"run of other arguments: it has {difference}. Resume with the same"):
        train(**arguments, data="digits", out=trained, batch_size=256, learning_rate=0.05, resume=True)


def test_resume_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run to resume \(no last\.ckpt\): start it without --resume"):
        train("resnet8", "digits", statistics="full", epochs=1, seed=0, out=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"learning_rate": 0.0}, "learning rate must be positive and finite, got 0.0"),
        ({"learning_rate": float("nan")}, "learning rate must be positive and finite, got nan"),
        ({"weight_decay": -1.0}, "weight decay must be at least 0 and finite, got -1.0"),
        ({"gamma_l1": -1.0}, "L1 penalty on gamma must be at least 0 and finite, got -1.0"),
        ({"gamma_l1": 1e-3, "statistics": "gn:4"}, "has no gamma of batch normalization to penalize"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"statistics": "half"}, "half"),
        ({"data": "nowhere"}, "unknown data 'nowhere'"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_bad_arguments_leave_no_folder(tmp_path, arguments, message):
    values = {"model": "resnet8", "data": "digits", "statistics": "full", "epochs": 1, "seed": 0, **arguments}
    with pytest.raises(ValueError, match=message):
        train(**values, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 3))", r"to \(2, 3\), expected logits \(2, 10\)"),
        ("nn.Sequential(nn.Conv2d(1, 4, 9), nn.BatchNorm2d(4))", r"does not take images of shape \(1, 8, 8\)"),
        ("nn.Sequential(nn.Flatten(), nn.Linear(64, 10))", "has no batch normalization to convert"),
    ],
)
def test_models_that_do_not_fit(tmp_path, body, message):
    (tmp_path / "unfit.py").write_text(f"from torch import nn\ndef make():\n    return {body}\n")
    with pytest.raises(ValueError, match=message):
        train(f"{tmp_path}/unfit.py:make", "digits", statistics="full", epochs=1, seed=0, out=tmp_path / "out")


def test_a_run_that_fails_keeps_its_state_and_raises(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text(DOOMED.replace("os.kill(", "raise RuntimeError("))
    monkeypatch.setenv("STOP_AT", str(STEPS + 2))
    monkeypatch.setenv("STOP_SIGNAL", "12345")
    with pytest.raises(RuntimeError, match="12345"):
        train(f"{tmp_path}/fails.py:Doomed", "digits", out=tmp_path / "out", **ARGUMENTS)
    assert checkpoint.read(tmp_path / "out" / "interrupted.ckpt")["global_step"] == STEPS + 1
    assert checkpoint.read(tmp_path / "out" / "last.ckpt")["global_step"] == STEPS


@pytest.mark.skipif(torch.cuda.is_available(), reason="the accelerator that is to be missing is here")
def test_overwrite_keeps_the_old_run_where_the_new_one_cannot_start(tmp_path):
    train("resnet8", "digits", statistics="full", epochs=1, seed=0, out=tmp_path, accelerator="cpu")
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"(?i)gpu|cuda"):
        train("resnet8", "digits", statistics="full", epochs=1, seed=1, out=tmp_path, overwrite=True, accelerator="gpu")
    assert {file.name: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_a_training_that_diverges_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="training diverged: the loss of epoch 0 is"):
        train("resnet8", "digits", statistics="full", epochs=2, seed=0, out=tmp_path, learning_rate=1e30)


def test_accumulated_gradients_make_one_step_of_several_batches(tmp_path):
    arguments = {"epochs": 1, "seed": 0, "batch_size": 64, "learning_rate": 0.05, "schedule": "drops:1"}
    train("resnet8", "digits", statistics="accumulated:4", accumulate=4, out=tmp_path / "some", **arguments)
    content = checkpoint.read(tmp_path / "some" / "last.ckpt")
    assert content["global_step"] == 5  # 22 batches, of which the last two make no step
    assert content["state_dict"]["model.bn.num_batches_tracked"] == 5


def test_the_rate_drops_at_the_epochs_of_the_schedule(tmp_path):
    arguments = {"epochs": 3, "seed": 0, "batch_size": 512, "learning_rate": 0.1, "schedule": "drops:1,2"}
    run = train("resnet8", "digits", statistics="full", out=tmp_path, **arguments)
    assert [epoch.learning_rate for epoch in run.history] == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; expected 'one-cycle', or epochs as in 'drops:50,80'"),
        ({"schedule": "drops:x"}, "unknown schedule 'drops:x'"),
        ({"statistics": "accumulated:2", "accumulate": 4}, "accumulated:2 pools 2 batches a step, got accumulate=4"),
        ({"accumulate": 0}, "accumulated over at least 1 batch, got 0"),
        ({"accumulate": 99}, "fewer than the 99 to accumulate over"),
    ],
)
def test_bad_schedules_leave_no_folder(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train("resnet8", "digits", **{"statistics": "full", "epochs": 1, "seed": 0, "out": tmp_path / "out"} | change)
    assert not (tmp_path / "out").exists()
