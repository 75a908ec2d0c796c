from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from leannorm.train import models

FACTORIES = """
from dataclasses import dataclass
from torch import nn

@dataclass
class Options:  # looks its module up
    width: int = 4

def small(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, Options().width, 1), nn.Flatten(), nn.LazyLinear(num_classes))

def keywords(**options):
    return small(**options)

def neither():
    return small(7, 2)

def width(num_classes, width):
    return small(num_classes, 1)

def positional(num_classes, /):
    return small(num_classes, 1)

def text(num_classes):
    return "a model"

number = 3
"""


@pytest.mark.parametrize(("name", "depth"), [("resnet8", 8), ("resnet20", 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_built_in(name, depth, channels):
    model = models.build(name, classes=5, channels=channels)
    assert model(torch.randn(2, channels, 9, 8)).shape == (2, 5)
    kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert kernels.count((3, 3)) + 1 == depth  # and the linear layer
    assert kernels.count((1, 1)) == 2  # projections where a stage begins
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == len(kernels)
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}


def test_resnet20_has_as_many_parameters_as_published():
    model = models.build("resnet20", classes=10, channels=3)
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(p.numel() for p in model.parameters()) - projections == 269_722  # 0.27 M, He et al., table 6


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_torchvision_gives_one_tensor_while_training(name):
    model = models.build(f"torchvision:{name}", classes=4, channels=3)
    assert model.training
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)


def test_timm_takes_any_channels():
    pytest.importorskip("timm")
    model = models.build("timm:resnet10t", classes=4, channels=1)
    with torch.no_grad():
        assert model(torch.randn(2, 1, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize("factory", ["small", "keywords", "neither"])
def test_factory_in_a_file(tmp_path, factory):
    file = tmp_path / "nets.py"
    file.write_text(FACTORIES)
    model = models.build(f"{file}:{factory}", classes=7, channels=2)
    assert model(torch.randn(3, 2, 4, 4)).shape == (3, 7)


def test_factory_in_a_module(tmp_path, monkeypatch):
    (tmp_path / "nets_package").mkdir()
    (tmp_path / "nets_package" / "nets.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    assert models.build("nets_package.nets:small", classes=7, channels=2)(torch.randn(3, 2, 4, 4)).shape == (3, 7)


def test_a_file_that_fails_leaves_no_half_module(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("number = 1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        models.build(f"{file}:small", classes=2, channels=1)
    assert "leannorm_model_broken" not in sys.modules


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet9", r"unknown model 'resnet9' \(did you mean resnet8.*torchvision:NAME, timm:NAME, package"),
        ("torchvision:resnet_18", r"did you mean resnet18.*expected one of alexnet"),
        ("torchvision:fasterrcnn_resnet50_fpn", "unknown model"),  # a detector
        ("timm:resnet_18", r"did you mean resnet18"),
        (":small", "unknown model ':small'"),
        ("nets.py:", "unknown model 'nets.py:'"),
        ("no_such_package.nets:small", "no module 'no_such_package' to import; expected resnet8"),
        ("leannorm.no_such:small", "no module 'leannorm.no_such' to import"),
        ("{file}:smal", r"has no factory 'smal' \(did you mean small"),
        ("{file}:number", "has no factory 'number'"),
        ("{file}:width", "requires width, but a factory is called with num_classes= and in_channels= only"),
        ("{file}:positional", "requires num_classes, but"),
        ("{file}:text", "returned str, expected a torch.nn.Module"),
    ],
)
def test_bad_spellings(tmp_path, spec, message):
    file = tmp_path / "nets.py"
    file.write_text(FACTORIES)
    with pytest.raises(ValueError, match=message):
        models.build(spec.format(file=file), classes=7, channels=3)


def test_an_import_that_fails_inside_the_users_module_is_shown_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        models.build("needs_more:small", classes=2, channels=1)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"no file nowhere/nets\.py"):
        models.build("nowhere/nets.py:small", classes=2, channels=3)


def test_torchvision_refuses_other_channels():
    with pytest.raises(ValueError, match=r"torchvision:resnet18 takes images of 3 channels, got 1: use resnet8"):
        models.build("torchvision:resnet18", classes=10, channels=1)


def test_a_missing_extra_is_named():
    with pytest.raises(ImportError, match=r"no_such_package is not installed: pip install 'leannorm\[timm\]'"):
        models.require("no_such_package", extra="timm")


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_torchvision_imports_and_its_users_too():
    # a process of its own: in this one torchvision is there already
    code = """
from leannorm.train.models import import_torchvision
torchvision = import_torchvision()
assert import_torchvision() is torchvision
import torchmetrics, torch
print(torchvision.transforms.functional.hflip(torch.tensor([[[1, 2]]])).tolist())
"""
    assert run_python(code).strip() == "[[[2, 1]]]"


def test_nothing_is_defined_where_the_compiled_operators_load():
    code = """
import torch, leannorm
loaded = []
def load(path):  # what the library of a wheel that fits would do
    loaded.append(path)
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    loaded.append(library)
torch.ops.load_library = load
from leannorm.train import models
models.define_missing_operators()
print(len(loaded), loaded[0].endswith("_C.so"), models._schemas)
"""
    assert run_python(code).strip() == "2 True []"
