from __future__ import annotations

import pytest
import torch
from torch import nn

from leannorm.deploy.export import export_onnx
from leannorm.graph import fold
from leannorm.graph.export import export
from leannorm.train.run import train

FACTORY = """
from torch import nn

def network(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, num_classes),
    )
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    (folder / "networks.py").write_text(FACTORY)
    train(
        f"{folder / 'networks.py'}:network",
        "digits",
        statistics="fs:1/4+vdn:1",
        epochs=3,
        seed=0,
        out=folder / "run",
        batch_size=64,
        accelerator="cpu",
    )
    return folder / "run" / "last.ckpt"


@pytest.fixture(scope="session")
def to_onnx():
    """Write a model in eval mode as the folded fp32 file that `deploy` makes of it."""

    def write(model: nn.Module, path, example: torch.Tensor):
        program, _ = export(model.eval(), (example,))
        folded, _ = fold(program, (example,))
        export_onnx(folded, path, inputs=["images"], outputs=["logits"], metadata={"classes": "ten"})
        return path

    return write
