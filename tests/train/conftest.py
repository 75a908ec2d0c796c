from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from image_files import write_images

from leannorm.train.run import train

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Weights are compared bit for bit with those of processes that run on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Two classes of ten and five images."""
    write_images(tmp_path / "images" / "cat", 10)
    write_images(tmp_path / "images" / "dog", 5)
    return tmp_path / "images"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of two epochs."""
    out = tmp_path_factory.mktemp("trained")
    train("resnet8", "digits", statistics="grid:1/4", epochs=2, seed=3, out=out, batch_size=256, learning_rate=0.05)
    return out
