"""Where there is no compiler a wheel is built all the same, and its layers compute by ATen."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTALLED = {distribution.name.replace("_", "-") for distribution in importlib.metadata.distributions()}
MISSING = {"scikit-build-core", "pip"} - INSTALLED
if shutil.which("cmake") is None and "cmake" not in INSTALLED:
    MISSING.add("cmake")

USE = """
import torch, leannorm
from leannorm.backends import cpu

assert not cpu.available
ours, theirs = leannorm.BatchNorm2d(3, activation="relu"), torch.nn.BatchNorm2d(3)
x = torch.randn(4, 3, 8, 8, requires_grad=True)
expected = torch.relu(theirs(x))
gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (ours(x), expected)]
torch.testing.assert_close(*gradients)
torch.testing.assert_close(ours.running_var, theirs.running_var)
explained = leannorm.explain(torch.nn.Sequential(ours), x).layers[0]
print(leannorm.__file__, explained.served_by, *explained.reasons, sep="\\n")
"""


def run(*command, **environment):
    result = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"to build a wheel, {', '.join(sorted(MISSING))} would have to be installed")
def test_without_a_compiler_the_wheel_is_built_and_aten_serves(tmp_path):
    pip = (sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check")
    none = str(tmp_path / "no-compiler")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT), CC=none, CXX=none)
    (wheel,) = tmp_path.glob("leannorm-*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith((".so", ".pyd", ".cpp", ".h"))]
    installed = tmp_path / "installed"
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(installed), str(wheel))
    path = os.pathsep.join([str(installed), *dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))])
    # without `site` no editable installation comes first
    where, served_by, reason = run(sys.executable, "-S", "-c", USE, PYTHONPATH=path).splitlines()
    assert Path(where).is_relative_to(installed)
    assert served_by == "ATen"
    assert reason.startswith("the extension leannorm.backends.cpu._kernels was not built")
    assert reason.endswith("install again where a C++ compiler is found")
