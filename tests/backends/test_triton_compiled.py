"""What the Triton compiler makes of the kernels for an H100; no GPU is needed to see it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SPILLED = 8  # bytes at most: the assembler that comes with Triton 3.6 keeps a register or two less than later ones


def compiled(*step):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), json.dumps(step)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("source", "residual", "launches"),
    [
        ("full", True, ["moments", "normalize", "gradient", "apply"]),
        ("grid:1/32", False, ["moments", "normalize", "gradient", "correct"]),
        pytest.param(
            "fs:1/32+vdn:1",
            False,
            ["moments", "moments", "normalize", "gradient", "correct", "correct"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_launches_a_direction_fill_the_device_with_wide_loads(source, residual, launches):
    result = compiled((256, 64, 112, 112), True, source, "bfloat16", "relu", residual)
    before, after = result["variants"]
    forms = len(set(launches)) + (
        launches.count("correct") > 1
    )  # the first region's merges partial sums, later ones not
    assert before == after == forms, "places or the batch size compile again"
    found = result["launches"]
    assert [launch["kernel"] for launch in found] == [*launches, "moments", "finish", "track"]
    for launch in found[: len(launches)]:
        assert "ld.global.v4.b32" in launch["loads"], launch
        assert not any("b16" in load for load in launch["loads"]), launch
        assert launch["spilled"] == 0, launch
        assert not launch["wide"], launch
    whole = [launch for launch in found if launch["kernel"] in ("gradient", "normalize", "apply")]
    assert all(launch["programs"] >= 132 for launch in whole)


def _spilling(*step):
    return [launch for launch in compiled(*step)["launches"] if launch["spilled"] > SPILLED]


@pytest.mark.parametrize(
    ("shape", "source", "dtype", "activation"),
    [((256, 512, 28, 28), "grid:1/32", "float32", "silu"), ((256, 2048, 7, 7), "full", "bfloat16", "relu")],
)
def test_contiguous_tensors_spill_no_registers(shape, source, dtype, activation):
    assert not _spilling(shape, False, source, dtype, activation, True)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "activation"), [("full", "relu"), ("grid:1/32", "relu"), ("grid:1/32", "silu")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_a_resnet_spills_no_registers(channels_last, dtype, source, activation):
    for shape in ((256, 64, 112, 112), (256, 512, 28, 28), (256, 2048, 7, 7)):
        assert not _spilling(shape, channels_last, source, dtype, activation, True), shape


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["", "silu", "hardswish", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_kind_compiles(dtype, channels_last, activation):
    for shape in ((32, 24, 14, 14), (2, 3, 7, 5)):
        compiled(shape, channels_last, "fs:1/8@step+vdn:1", dtype, activation, True)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_tensors_beyond_32_bits_compile_with_wide_indices(channels_last):
    result = compiled((2**12, 64, 128, 128), channels_last, "grid:1/32@step", "bfloat16", "relu", True)
    assert all(launch["wide"] for launch in result["launches"][:4])
