from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pathlib import Path


def write_images(folder: Path, count: int, *, size: tuple[int, int] = (16, 16), name: str = "png") -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(str(folder)) + count)
    for index in range(count):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.{name}")
