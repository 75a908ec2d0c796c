from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from image_files import write_images
from PIL import Image
from sklearn.datasets import load_digits

from leannorm.train import image_folder
from leannorm.train.data import open_data
from leannorm.train.image_folder import stratified_split
from leannorm.train.pipeline import Augmentation, stream


def epoch_of(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(left, right, strict=True)
    )


def test_digits():
    data = open_data("digits", batch_size=100, seed=0)
    assert data.classes == tuple("0123456789")
    assert data.input_shape == (1, 8, 8)
    validation = list(data.val_dataloader())
    held_out = sum(len(labels) for _, labels in validation)
    assert held_out + data.training_images == 1797
    assert abs(held_out - 0.2 * 1797) < 5
    images, labels = validation[0]
    assert images.dtype == torch.float32
    assert images.shape == (128, 1, 8, 8)
    assert labels.dtype == torch.int64
    assert [len(labels) for _, labels in epoch_of(data, 0)] == [100] * (data.training_images // 100)


@pytest.mark.parametrize(("batch_size", "expected"), [(2, 16), (16, 128), (100, 128), (200, 200)])
def test_validation_takes_larger_batches_than_training(batch_size, expected):
    assert open_data("digits", batch_size=batch_size, seed=0).val_dataloader().batch_size == expected


def test_digits_are_held_out_in_the_same_way_for_every_seed_and_never_trained_on():
    validation = [list(open_data("digits", batch_size=500, seed=seed).val_dataloader()) for seed in (0, 1)]
    assert same(*validation)
    training, held_out = stratified_split(load_digits().target.tolist())
    assert sorted(training + held_out) == list(range(1797))
    shares = np.bincount(load_digits().target[held_out]) / np.bincount(load_digits().target)
    assert np.abs(shares - 0.2).max() < 0.005


def test_normalisation_is_measured_on_the_training_images():
    data = open_data("digits", batch_size=2000, seed=0)
    training, _ = stratified_split(load_digits().target.tolist())
    pixels = load_digits().images[training] / 16
    assert data.preprocessing.mean == pytest.approx([pixels.mean()], rel=1e-6)
    assert data.preprocessing.std == pytest.approx([pixels.std()], rel=1e-6)
    image = data._validation[0][0]
    (index, *_) = stratified_split(load_digits().target.tolist())[1]
    expected = (load_digits().images[index] / 16 - pixels.mean()) / pixels.std()
    torch.testing.assert_close(image[0], torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_epoch_alone(class_folders, workers):
    def batches(seed, epoch, workers=0):
        return epoch_of(open_data(str(class_folders), batch_size=5, seed=seed, workers=workers), epoch)

    torch.manual_seed(1)
    first = batches(0, 3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same(first, batches(0, 3, workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert not same(first, batches(0, 4, workers))
    assert not same(first, batches(1, 3, workers))


def test_every_image_comes_once_an_epoch():
    data = open_data("digits", batch_size=64, seed=0)
    keys = list(data.train_dataloader().sampler)
    assert sorted(index for _, index in keys) == list(range(data.training_images))
    assert [index for _, index in keys] != list(range(data.training_images))


@pytest.mark.parametrize("flip", [False, True])
def test_augmentation_draws_every_crop_and_no_other(flip):
    image = torch.arange(1.0, 13.0).view(1, 3, 4)
    padded = torch.zeros(1, 5, 6)
    padded[:, 1:4, 1:5] = image
    crops = [padded[:, top : top + 3, left : left + 4] for top, left in itertools.product(range(3), repeat=2)]
    expected = {str(crop.tolist()) for crop in crops}
    if flip:
        expected |= {str(crop.flip(-1).tolist()) for crop in crops}
    augment = Augmentation(padding=1, flip=flip)
    assert {str(augment(image, stream(0, i)).tolist()) for i in range(400)} == expected


def test_class_folders_are_split_in_each_class(class_folders):
    data = open_data(str(class_folders), batch_size=4, seed=0)
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 16, 16)
    assert data.training_images == 12
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [0, 0, 1]


def test_train_and_val_folders(tmp_path):
    for part, count in (("train", 6), ("val", 2)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, count, name="jpg")
    data = open_data(str(tmp_path), batch_size=8, seed=0)
    assert data.classes == ("a", "b")
    assert data.training_images == 12
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [0, 0, 1, 1]


def test_pixels_reach_the_model_as_they_are_in_the_file(class_folders):
    data = open_data(str(class_folders), batch_size=4, seed=0)
    image, _ = data._validation[0]
    path = data._validation.images.dataset.samples[data._validation.images.indices[0]][0]
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).double() / 255
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (data.preprocessing.mean, data.preprocessing.std))
    torch.testing.assert_close(image.double(), (pixels - mean) / std, rtol=1e-5, atol=1e-5)


def test_grey_images_become_three_channels(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / name / f"{index}.png")
    assert open_data(str(tmp_path), batch_size=2, seed=0).input_shape == (3, 8, 8)


def test_image_size_resizes(class_folders):
    write_images(class_folders / "bird", 3, size=(20, 30))
    with pytest.raises(ValueError, match=r"images differ in size.*20x30.*16x16.*--image-size"):
        open_data(str(class_folders), batch_size=4, seed=0)
    data = open_data(str(class_folders), batch_size=20, seed=0, image_size=12)
    assert data.input_shape == (3, 12, 12)
    assert next(iter(data.train_dataloader()))[0].shape == (14, 3, 12, 12)
    # a model trained so gets its images so, whatever their size
    again = open_data(str(class_folders), batch_size=20, seed=0, preprocessing=data.preprocessing)
    assert same(list(again.val_dataloader()), list(data.val_dataloader()))


def test_an_image_of_another_size_that_was_not_looked_at_is_named(class_folders, monkeypatch):
    monkeypatch.setattr("leannorm.train.image_folder.SIZES_READ", 1)
    Image.new("RGB", (9, 7)).save(class_folders / "dog" / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png is 9x7 pixels, expected 16x16: give --image-size"):
        epoch_of(open_data(str(class_folders), batch_size=4, seed=0), 0)


def test_given_preprocessing_is_used_and_checked(class_folders):
    digits = open_data("digits", batch_size=4, seed=0).preprocessing
    with pytest.raises(ValueError, match=r"images of shape \(3, 8, 8\), expected \(1, 8, 8\)"):
        open_data(str(class_folders), batch_size=4, seed=0, preprocessing=digits)
    folder = open_data(str(class_folders), batch_size=4, seed=0).preprocessing
    with pytest.raises(ValueError, match=r"digits has images of shape \(1, 8, 8\), expected \(3, 16, 16\)"):
        open_data("digits", batch_size=4, seed=0, preprocessing=folder)


def test_unknown_data():
    with pytest.raises(ValueError, match="unknown data 'cifar': no such folder; expected 'digits' or a folder"):
        open_data("cifar", batch_size=4, seed=0)


def test_no_class_folders(tmp_path):
    with pytest.raises(ValueError, match="holds 0 class folders, expected one folder of images for each class"):
        open_data(str(tmp_path), batch_size=4, seed=0)


def test_one_part_only(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    with pytest.raises(ValueError, match="has train/ but no class folders in val/"):
        open_data(str(tmp_path), batch_size=4, seed=0)


def test_empty_class_is_named(class_folders):
    (class_folders / "emu").mkdir()
    (class_folders / "emu" / "notes.txt").write_text("none yet")
    with pytest.raises(ValueError, match=r"no images in .*emu: fill or remove"):
        open_data(str(class_folders), batch_size=4, seed=0)


def test_class_of_one_image(class_folders):
    write_images(class_folders / "emu", 1)
    with pytest.raises(ValueError, match="emu holds one image; a class needs at least 2"):
        open_data(str(class_folders), batch_size=4, seed=0)


def test_parts_of_different_classes(tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/c"):
        write_images(tmp_path / name, 2)
    with pytest.raises(ValueError, match=r"same classes, but only one of them has \['b', 'c'\]"):
        open_data(str(tmp_path), batch_size=4, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_jpeg_is_named(tmp_path, monkeypatch, workers):
    for name in ("a", "b"):
        write_images(tmp_path / name, 4, size=(64, 64), name="jpg")
    damaged = tmp_path / "b" / "2.jpg"
    damaged.write_bytes(damaged.read_bytes()[:-900])
    with pytest.raises(ValueError, match=r"b/2\.jpg cannot be decoded .*truncated"):
        open_data(str(tmp_path), batch_size=4, seed=0)
    monkeypatch.setattr("leannorm.train.data.mean_and_std", lambda _: ((0.5,) * 3, (0.2,) * 3))  # reads some only
    data = open_data(str(tmp_path), batch_size=6, seed=0, workers=workers)
    with pytest.raises(ValueError, match=r"b/2\.jpg cannot be decoded .*truncated"):
        epoch_of(data, 0)


def test_images_are_decoded_once_while_there_is_room(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_images(tmp_path / name, 4, size=(16, 16))
    monkeypatch.setattr(image_folder, "KEPT_BYTES", 3 * 3 * 16 * 16)
    opened = []
    decode = image_folder.ImageReader._decode
    monkeypatch.setattr(
        image_folder.ImageReader, "_decode", lambda self, path: opened.append(path) or decode(self, path)
    )
    reader = image_folder.ImageReader((16, 16), resize=False)
    paths = sorted(map(str, tmp_path.glob("*/*")))
    first, second = ([reader(path) for path in paths] for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert opened == paths + paths[3:]
    again = pickle.loads(pickle.dumps(reader))
    assert again == reader
    assert not again._kept


def test_a_file_that_is_no_image_is_named(class_folders):
    (class_folders / "dog" / "2.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"dog/2\.png cannot be decoded"):
        open_data(str(class_folders), batch_size=4, seed=0)


def test_sixteen_bits_are_refused_rather_than_clipped(class_folders):
    Image.fromarray(np.full((16, 16), 40000, dtype=np.uint16)).save(class_folders / "dog" / "2.png")
    with pytest.raises(ValueError, match=r"2\.png has pixels of mode I;16, expected 8 bits"):
        open_data(str(class_folders), batch_size=4, seed=0)


def test_constant_images_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{index}.png")
    with pytest.raises(ValueError, match="the training images are constant"):
        open_data(str(tmp_path), batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"image_size": 0}, "image size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"image_size": 16}, "digits are images of 8x8"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_data("digits", **{"batch_size": 4, "seed": 0, **arguments})


def test_what_is_hidden_is_no_class_and_no_image(tmp_path, class_folders):
    seen = open_data(str(class_folders), batch_size=4, seed=0)
    batches = epoch_of(seen, 0)
    write_images(class_folders / ".ipynb_checkpoints", 3)
    write_images(class_folders / "cat" / ".thumbnails", 2, size=(4, 4))
    (class_folders / "cat" / "._0.png").write_bytes(b"a resource fork")
    (class_folders / ".DS_Store").write_bytes(b"")
    data = open_data(str(class_folders), batch_size=4, seed=0)
    assert data.classes == ("cat", "dog")
    assert data.training_images == seen.training_images == 12
    assert same(epoch_of(data, 0), batches)
    hidden_root = tmp_path / ".data"
    class_folders.rename(hidden_root)
    assert same(epoch_of(open_data(str(hidden_root), batch_size=4, seed=0), 0), batches)


def test_a_hidden_folder_does_not_make_up_for_a_class(tmp_path):
    write_images(tmp_path / "cat", 3)
    write_images(tmp_path / ".cache", 3)
    with pytest.raises(ValueError, match="holds 1 class folders"):
        open_data(str(tmp_path), batch_size=4, seed=0)


def split_folders(root, *, size=(16, 16)):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(root / part / name, 4, size=size)
    return root


def test_validation_images_of_another_size_are_found_at_the_start(tmp_path):
    root = split_folders(tmp_path)
    Image.new("RGB", (20, 18)).save(root / "val" / "dog" / "3.png")
    message = r"images differ in size: .*train/cat/0\.png is 16x16, .*val/dog/3\.png is 20x18: give --image-size"
    with pytest.raises(ValueError, match=message):
        open_data(str(root), batch_size=4, seed=0)
    assert open_data(str(root), batch_size=4, seed=0, image_size=16).input_shape == (3, 16, 16)


def test_data_for_a_trained_model_are_checked_at_the_start(tmp_path):
    trained_on = open_data(str(split_folders(tmp_path / "one")), batch_size=4, seed=0)
    others = split_folders(tmp_path / "other", size=(24, 16))
    with pytest.raises(ValueError, match=r"is 24x16 pixels, expected 16x16 as in the training: resize it, or train"):
        open_data(str(others), batch_size=4, seed=0, preprocessing=trained_on.preprocessing)


def test_a_damaged_validation_image_is_found_at_the_start(tmp_path):
    root = split_folders(tmp_path)
    (root / "val" / "dog" / "2.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"val/dog/2\.png cannot be decoded"):
        open_data(str(root), batch_size=4, seed=0)


def test_of_many_images_the_first_of_each_class_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("leannorm.train.image_folder.SIZES_READ", 2)
    root = tmp_path
    for name in ("a", "b", "c"):
        write_images(root / name, 4)
    Image.new("RGB", (20, 18)).save(root / "b" / "0.png")
    with pytest.raises(ValueError, match="images differ in size"):
        open_data(str(root), batch_size=4, seed=0)
