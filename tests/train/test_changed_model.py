"""A run is resumed after its model's file has changed."""

import pytest

from leannorm.train.run import train

FACTORY = """
from torch import nn

def net(num_classes, in_channels):
    layers = [nn.Conv2d(in_channels, {width}, 3), nn.BatchNorm2d({width}), nn.Flatten(), nn.Linear({width} * 36, 10)]
    return nn.Sequential(*layers{more})
"""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"width": 5}, "missing none; unknown none; of another shape 0.weight, 0.bias, 1.weight"),
        ({"more": " , nn.Linear(10, 10)"}, "missing 4.weight, 4.bias; unknown none; of another shape none"),
        ({"more": "[:-1], nn.Sequential(layers[-1])"}, "missing 3.0.weight, 3.0.bias; unknown 3.weight, 3.bias"),
    ],
)
def test_resume_after_the_model_changed_says_what_and_the_way_out(tmp_path, change, reason):
    file, out = tmp_path / "net.py", tmp_path / "out"
    options = {"statistics": "full", "epochs": 1, "seed": 0, "batch_size": 512, "out": out}
    file.write_text(FACTORY.format(width=4, more=""))
    train(f"{file}:net", "digits", **options)
    kept = (out / "last.ckpt").read_bytes()
    file.write_text(FACTORY.format(**({"width": 4, "more": ""} | change)))
    with pytest.raises(ValueError, match=r"last\.ckpt holds other weights than .* has now: ") as raised:
        train(f"{file}:net", "digits", resume=True, **options)
    assert reason in str(raised.value)
    assert str(raised.value).endswith("Resume with the model as it was, or train this one in another folder")
    assert (out / "last.ckpt").read_bytes() == kept
