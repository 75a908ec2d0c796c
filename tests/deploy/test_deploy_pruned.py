"""deploy --prune: fewer channels in the same files, compared with the whole model."""

from __future__ import annotations

import onnx
import pytest
import torch

from leannorm import records
from leannorm.deploy import deploy
from leannorm.records import Deployment
from leannorm.report import html, rows
from leannorm.train.run import train

FACTORY = """
import torch
from torch import nn

class Divided(nn.Module):
    def forward(self, x):
        return x / x.shape[1]

def network(num_classes, in_channels, last=nn.Identity):
    network = nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        last(), nn.Flatten(), nn.Linear(288, num_classes),
    )
    with torch.no_grad():
        network[1].weight[:3], network[1].bias[:3] = 0.0, -1.0
    network[1].requires_grad_(False)
    return network

def counting(num_classes, in_channels):
    return network(num_classes, in_channels, Divided)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    def trained(factory):
        folder = tmp_path_factory.mktemp("training")
        (folder / "networks.py").write_text(FACTORY)
        arguments = {"statistics": "full", "epochs": 1, "seed": 0, "batch_size": 128, "accelerator": "cpu"}
        train(f"{folder / 'networks.py'}:{factory}", "digits", out=folder / "run", **arguments)
        return folder / "run" / "last.ckpt"

    return trained


def test_the_files_are_smaller_and_the_report_says_why(checkpoint, tmp_path):
    deployment = deploy(checkpoint("network"), out=tmp_path, prune=True)
    pruning = deployment.pruning
    assert pruning is not None
    assert (pruning.channels_before, pruning.channels_after) == (8, 5)
    assert pruning.changes[0].action == "3 of 8 channels removed: 3 always zero"
    assert records.read(Deployment, tmp_path / "report.json") == deployment
    weights = {tuple(tensor.dims) for tensor in onnx.load(tmp_path / "model.fp32.onnx").graph.initializer}
    assert (5, 1, 3, 3) in weights
    assert deployment.files[0].verification.relative_error < 1e-5
    page = html.page([deployment])
    assert "3 of 8 channels removed: 3 always zero" in page
    assert "Pruning of full removed 3 channels of 8." in rows.verdict([deployment]).sentences


def test_without_the_option_nothing_is_removed(checkpoint, tmp_path):
    deployment = deploy(checkpoint("network"), out=tmp_path)
    assert deployment.pruning is None
    assert "Pruning" not in html.page([deployment])


def test_a_model_that_cannot_be_pruned_is_an_error_and_leaves_nothing(checkpoint, tmp_path):
    path = checkpoint("counting")
    with pytest.raises(ValueError, match="the model cannot be pruned, ship it without: the rewritten model differs"):
        deploy(path, out=tmp_path / "out", prune=True)
    assert not (tmp_path / "out").exists()
    assert torch.is_grad_enabled()
