"""deploy of models trained with a method: folded where it is BN in eval mode, shipped as they are where not."""

import pytest

from leannorm.deploy import deploy
from leannorm.train.run import train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spelling", "folds", "recalibrates"),
    [("ghost:32", True, True), ("renorm:3", True, True), ("mabn:4", True, False), ("gn:8", False, False)],
)
def test_a_method_is_trained_and_shipped(spelling, folds, recalibrates, tmp_path):
    train("resnet8", "digits", statistics=spelling, epochs=2, seed=0, out=tmp_path, batch_size=64, accelerator="cpu")
    deployment = deploy(tmp_path / "last.ckpt", out=tmp_path / "shipped")
    assert bool(deployment.recalibration.batches) is recalibrates
    assert len(deployment.fold.changes) == (9 if folds else 0)
    assert len(deployment.fold.refusals) == (0 if folds else 9)
    assert all("it is group normalization" in refusal.reason for refusal in deployment.fold.refusals)
    fp32 = deployment.files[0]
    assert not fp32.failures
    assert bool(fp32.normalization_nodes) is not folds
