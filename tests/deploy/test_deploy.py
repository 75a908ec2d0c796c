"""deploy from a checkpoint to four files, on a small network trained here on the digits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import leannorm
from leannorm import records
from leannorm.deploy import deploy, shipping
from leannorm.records import Deployment, Verification
from leannorm.train import checkpoint as checkpoints

FILES = ["model.fp32.onnx", "model.int8.onnx", "report.html", "report.json"]


@pytest.fixture(scope="module")
def shipped(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("shipped") / "new" / "folder"
    return deploy(checkpoint, out=out), out


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_four_files_and_the_record_are_written(shipped):
    deployment, out = shipped
    assert sorted(file.name for file in out.iterdir()) == FILES
    assert records.read(Deployment, out / "report.json") == deployment
    assert "model.int8.onnx" in (out / "report.html").read_text(encoding="utf-8")


def test_every_layer_is_folded_and_nothing_of_normalization_is_left(shipped):
    deployment, _ = shipped
    assert [change.module for change in deployment.fold.changes] == ["1", "4", "8"]
    assert deployment.fold.refusals == ()
    assert [file.normalization_nodes for file in deployment.files] == [(), ()]


def test_the_fp32_file_is_the_model(shipped):
    deployment, _ = shipped
    verification = deployment.files[0].verification
    assert verification.relative_error < 1e-5
    assert [layer.layer for layer in verification.layers] == ["1", "2", "4", "5", "6", "8", "9", "10"]
    assert verification.first_wrong_layer is None
    assert verification.argmax_agreement == 1
    assert verification.samples == 359
    kept = max(deployment.recalibration.trained_accuracy, deployment.recalibration.recalibrated_accuracy)
    assert verification.reference_accuracy == verification.candidate_accuracy == kept
    assert kept > 0.9
    assert deployment.passed


def test_the_files_alone_give_the_accuracy_that_is_reported(shipped, checkpoint):
    deployment, out = shipped
    data = checkpoints.open_data_of(checkpoint, batch_size=50)
    for file in deployment.files:
        session = onnxruntime.InferenceSession(out / file.file)
        correct = [session.run(None, {"images": x.numpy()})[0].argmax(1) == y.numpy() for x, y in data.val_dataloader()]
        assert np.concatenate(correct).mean() == pytest.approx(file.verification.candidate_accuracy)


def test_the_files_say_what_they_are(shipped, checkpoint):
    deployment, out = shipped
    preprocessing = checkpoints.open_data_of(checkpoint, batch_size=50).preprocessing
    for file in deployment.files:
        properties = {entry.key: entry.value for entry in onnx.load(out / file.file).metadata_props}
        assert properties["statistics"] == "fs:1/4+vdn:1"
        assert properties["checkpoint"] == "last.ckpt"
        assert properties["data"] == "digits"
        assert properties["training_commit"] == deployment.training.environment.commit
        assert properties["deployment_commit"]
        verified = json.loads(properties["verification"])
        assert verified["relative_error"] == file.verification.relative_error
        assert verified["candidate_accuracy"] == file.verification.candidate_accuracy
        assert properties["leannorm_version"] == leannorm.__version__
        assert json.loads(properties["classes"]) == list("0123456789")
        assert json.loads(properties["input_mean"]) == list(preprocessing.mean)
        assert json.loads(properties["input_std"]) == list(preprocessing.std)
        assert file.bytes == (out / file.file).stat().st_size


def test_a_folder_with_a_deployment_is_refused_and_kept(shipped, checkpoint):
    _, out = shipped
    before = contents(out)
    with pytest.raises(FileExistsError, match=r"already holds a deployment \(model.fp32.onnx.*--overwrite"):
        deploy(checkpoint, out=out)
    assert contents(out) == before


def test_overwrite_replaces_the_deployment_and_nothing_else(checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.fp32.onnx").write_text("old")
    deployment = deploy(checkpoint, out=tmp_path, overwrite=True, max_error=1e-12)
    assert sorted(contents(tmp_path)) == sorted([*FILES, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model.fp32.onnx").stat().st_size == deployment.files[0].bytes
    # What does not pass is written too, for a look at it, and says so.
    assert not deployment.passed
    assert not deployment.files[0].verification.passed
    assert (
        f"it goes wrong at {deployment.files[0].verification.first_wrong_layer} first"
        in deployment.files[0].failures[0]
    )


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_on_the_way_leaves_everything_as_it_was(checkpoint, tmp_path, monkeypatch, exists):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(shipping, "quantize_int8", fail)
    out = tmp_path / "out"
    if exists:
        out.mkdir()
        (out / "model.fp32.onnx").write_bytes(b"old")
    with pytest.raises(OSError, match="no space"):
        deploy(checkpoint, out=out, overwrite=True)
    assert contents(out) == {"model.fp32.onnx": b"old"} if exists else not out.exists()


OLD = {"model.fp32.onnx": b"old", "model.int8.onnx": b"old", "report.html": b"old"}
NEW = {"model.fp32.onnx": b"new", "model.mixed.onnx": b"new", "report.json": b"new"}


@pytest.mark.parametrize(("held", "moves"), [({}, 3), (OLD, 6)])
def test_a_stop_between_the_moves_leaves_everything_as_it_was(tmp_path, monkeypatch, held, moves):
    plain, calls = Path.replace, itertools.count(1)

    def move_and_stop(path, target):
        plain(path, target)
        if next(calls) == stop:
            raise SystemExit(143)

    monkeypatch.setattr(Path, "replace", move_and_stop)

    def ship(out):
        with shipping._staged(out) as folder:
            for name, content in NEW.items():
                (folder / name).write_bytes(content)

    for stop in range(1, moves + 2):
        calls, out = itertools.count(1), tmp_path / str(stop)
        if held:
            out.mkdir()
        for name, content in held.items():
            (out / name).write_bytes(content)
        if stop > moves:
            ship(out)
            assert contents(out) == NEW
        else:
            with pytest.raises(SystemExit):
                ship(out)
            assert contents(out) == held if held else not out.exists()


def test_a_truncated_checkpoint_is_an_error_and_makes_no_folder(checkpoint, tmp_path):
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(checkpoint.read_bytes()[:2000])
    with pytest.raises(ValueError, match="truncated"):
        deploy(broken, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_running_statistics_are_replaced_and_good_ones_are_not(checkpoint, tmp_path, monkeypatch):
    saved = torch.load(checkpoint, weights_only=True)
    for name, value in saved["state_dict"].items():
        if name.endswith("running_var"):
            value *= 30.0
    torch.save(saved, tmp_path / "bad.ckpt")
    recalibration = deploy(tmp_path / "bad.ckpt", out=tmp_path / "bad").recalibration
    assert recalibration.kept == "recalibrated"
    assert recalibration.recalibrated_accuracy > 0.9 > recalibration.trained_accuracy

    def spoil(model, batches, limit):
        model[1].running_var.fill_(1e6)

    monkeypatch.setattr(leannorm, "recalibrate", spoil)
    deployment = deploy(checkpoint, out=tmp_path / "good")
    assert deployment.recalibration.kept == "trained"
    assert deployment.files[0].verification.candidate_accuracy == deployment.recalibration.trained_accuracy > 0.9


def test_a_model_for_one_size_of_batch_is_an_error():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.reshape(1, 64)[:, :10]

    with pytest.raises(ValueError, match=r"cannot be shipped for any batch: the batch stays 1"):
        shipping._fold(Fixed().eval(), torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("agreement", "accuracy", "error", "passes"),
    [
        (1.0, 0.98, 0.02, True),
        (0.96, 0.9751, 0.09, True),
        (0.94, 0.98, 0.02, False),
        (1.0, 0.975, 0.02, False),
        (1.0, 0.98, 0.11, False),
    ],
)
def test_int8_passes_by_accuracy_agreement_and_error(agreement, accuracy, error, passes):
    bound = shipping.INT8_MAX_ERROR
    verification = Verification(100, error, 1.0, agreement, 0.98, accuracy, bound, error <= bound)
    assert (not shipping._failures("int8", verification)) is passes
