from __future__ import annotations

import os
import pickle

import pytest
import torch

import leannorm
from cases import METHODS
from leannorm import records
from leannorm.records import TrainingRun
from leannorm.train import checkpoint
from leannorm.train.configuration import Configuration
from leannorm.train.data import open_data


@pytest.fixture
def edited(trained, tmp_path):
    """Write the trained checkpoint with some entries changed."""

    def edit(change):
        content = checkpoint.read(trained / "last.ckpt")
        change(content)
        torch.save(content, tmp_path / "edited.ckpt")
        return tmp_path / "edited.ckpt"

    return edit


def test_load_gives_the_trained_model_and_its_run(trained):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model, run = checkpoint.load(trained / "last.ckpt")
    assert torch.equal(torch.get_rng_state(), state)
    assert run == records.read(TrainingRun, trained / "run.json")
    assert not model.training
    assert {str(m.statistics) for m in model.modules() if isinstance(m, leannorm.BatchNorm2d)} == {"grid:1/4"}
    assert all(m.guard_nonfinite for m in model.modules() if isinstance(m, leannorm.BatchNorm2d))
    correct = count = 0
    for images, labels in checkpoint.open_data_of(trained / "last.ckpt", batch_size=100).val_dataloader():
        with torch.no_grad():
            correct += (model(images).argmax(1) == labels).sum().item()
        count += len(labels)
    assert correct / count == pytest.approx(run.history[-1].validation_accuracy, abs=1e-6)


def test_the_identity_of_the_run_is_there_in_plain_types(trained):
    content = torch.load(trained / "last.ckpt", weights_only=True)
    plain = content["hyper_parameters"]
    assert plain["model"] == "resnet8"
    assert plain["statistics"] == "grid:1/4"
    data = open_data("digits", batch_size=4, seed=0)
    assert plain["preprocessing"]["mean"] == data.preprocessing.mean
    assert plain["training_images"] == data.training_images


def test_data_of_a_checkpoint_must_have_its_classes_and_shape(trained, class_folders):
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\), expected \(1, 8, 8\)"):
        checkpoint.open_data_of(trained / "last.ckpt", str(class_folders), batch_size=4)


def test_data_of_a_checkpoint_with_other_classes(edited):
    def rename(content):
        content["hyper_parameters"]["classes"] = ("cat", "dog")

    with pytest.raises(ValueError, match=r"digits has the classes 0, 1.*\(10 in all\).*was trained on cat, dog"):
        checkpoint.open_data_of(edited(rename), batch_size=4)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*best\.ckpt"):
        checkpoint.load(tmp_path / "best.ckpt")
    with pytest.raises(FileNotFoundError, match="a folder"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated_file(trained, tmp_path, share):
    whole = (trained / "last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.ckpt is truncated"):
        checkpoint.load(cut)


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"state_dict": {}})])
def test_not_a_checkpoint(tmp_path, content):
    file = tmp_path / "some.ckpt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.ckpt is not a checkpoint"):
        checkpoint.load(file)


def test_a_zip_file_of_something_else(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "some.ckpt", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(ValueError, match=r"some\.ckpt is damaged, or not a checkpoint"):
        checkpoint.load(tmp_path / "some.ckpt")


def test_a_checkpoint_of_something_else(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is not a checkpoint of `leannorm train`: expected the entries"):
        checkpoint.load(tmp_path / "other.ckpt")


def test_code_is_refused_and_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"hyper_parameters": Attack(), "state_dict": {}, "training_run": ""}, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil\.ckpt holds more than tensors and plain data.*refused"):
        checkpoint.load(tmp_path / "evil.ckpt")
    assert not (tmp_path / "attacked").exists()


def test_another_architecture_lists_the_first_missing_keys(edited):
    def call_it_resnet20(content):
        content["hyper_parameters"]["model"] = "resnet20"

    message = (
        r"edited\.ckpt is a checkpoint of another architecture than resnet20: missing stages\.3\.conv1\.weight, "
        r"stages\.3\.bn1\.weight, .*, \.\.\. \(84 in all\); unknown stages\.1\.shortcut\.0\.weight, .*; "
        r"of another shape stages\.1\.conv1\.weight"
    )
    with pytest.raises(ValueError, match=message):
        checkpoint.load(edited(call_it_resnet20))


def test_fields_that_are_missing_are_named(edited):
    def drop(content):
        del content["hyper_parameters"]["statistics"]

    with pytest.raises(ValueError, match=r"Configuration: expected the fields .*'statistics'"):
        checkpoint.load(edited(drop))


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        checkpoint.AtomicCheckpointIO().save_checkpoint({"step": 2, "bad": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_a_damaged_file_of_the_right_length(trained, tmp_path):
    content = bytearray((trained / "last.ckpt").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = bytes(2000)
    (tmp_path / "damaged.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.ckpt is damaged"):
        checkpoint.load(tmp_path / "damaged.ckpt")


@pytest.mark.parametrize("spelling", [s for s in METHODS if s != "masked"])
def test_methods_are_spelled_in_checkpoints_and_loaded_without_running_code(spelling, trained, tmp_path):
    content = checkpoint.read(trained / "last.ckpt")
    content["hyper_parameters"]["statistics"] = spelling
    torch.manual_seed(0)
    model = checkpoint.build(Configuration.from_plain(content["hyper_parameters"]))
    x = torch.randn(6, 1, 8, 8)
    for _ in range(2):
        model(x).square().mean().backward()
    content["state_dict"] = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save(content, tmp_path / "method.ckpt")
    loaded, _ = checkpoint.load(tmp_path / "method.ckpt")
    assert torch.equal(loaded(x), model.eval()(x))
    assert {str(m.method) for m in loaded.modules() if hasattr(m, "method")} == {spelling}
