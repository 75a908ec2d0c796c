"""Methods as text, and what is said of bad ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import leannorm
from cases import METHODS
from leannorm import parse_target
from leannorm.methods import Method
from leannorm.nn import METHOD_LAYERS
from method_cases import PER_SAMPLE, converted

METHOD_CLASSES = sorted(Method.__subclasses__(), key=lambda method: method.name)


@given(st.data())
def test_spellings_are_read_back(data):
    cls = data.draw(st.sampled_from(METHOD_CLASSES))
    numbers = {"int": st.integers(1, 50), "float": st.floats(1, 50)}
    fields = {name: data.draw(numbers[kind]) for name, kind in cls.__annotations__.items() if kind in numbers}
    if "start" in fields:
        fields["r_end"] += fields["start"]
        fields["d_end"] += fields["start"]
    if cls is leannorm.EnhancedTransform:
        fields["kernel"] = data.draw(st.sampled_from([3, 5, 7]))
    if cls is leannorm.DiminishingAverage:
        fields["exponent"] = data.draw(st.floats(0, 1))
    if cls is leannorm.EightBitNormalization:
        fields = {name: value + 1 for name, value in fields.items()}
    method = cls(**fields)
    assert parse_target(str(method)) == method


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("ghost:0", "samples must be at least 1, got 0"),
        ("ghost:x", "'x' is not a whole number"),
        ("ghost:", "ghost takes no ''"),
        ("in:3", "in takes no '3'"),
        ("renorm:0.5", "r_max must be at least 1"),
        ("renorm:3@r_end=3", "r_end must be at least 5000"),
        ("renorm:3@speed=3", "renorm has no option 'speed=3'"),
        ("renorm:3@", "renorm has no option ''"),
        ("accumulated", "missing 1 required positional argument: 'steps'"),
        ("diminishing:2", "exponent must be at most 1"),
        ("bnet:4", "kernel must be 3, 5 or 7, got 4"),
        ("mabn:0", "batches must be at least 1"),
        ("mixture:0", "components must be at least 1"),
        ("wageubn:1", "bits must be at least 2"),
        ("ghost:3+grid:1/4", "allowed are"),
        ("grid:1/4+ghost:3", "'ghost' is a method, which cannot be added"),
        ("gnn:3", r"is not a source, nor a method \(gn, in"),
    ],
)
def test_bad_spellings_say_what_is_wrong(spelling, says):
    with pytest.raises(ValueError, match=says):
        parse_target(spelling)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: leannorm.GhostBatch("32"), ValueError, "samples must be of type int, got '32'"),
        (lambda: leannorm.GhostBatch(True), ValueError, "samples must be of type int, got True"),
        (lambda: leannorm.BatchRenormalization(float("nan")), ValueError, "r_max must be finite and not negative"),
        (lambda: leannorm.BatchNorm2d(3, statistics=leannorm.GhostBatch(3)), TypeError, "leannorm.convert"),
        (lambda: leannorm.parse_statistics("ghost:3"), ValueError, "'ghost' is a method"),
        (lambda: leannorm.nn.GhostBatchNorm(3, leannorm.AccumulatedBatch(2)), TypeError, "takes GhostBatch, got"),
        (
            lambda: leannorm.nn.BatchRenorm(3, leannorm.BatchRenormalization(), track_running_stats=False),
            ValueError,
            "needs running statistics",
        ),
        (lambda: converted("ghost:3").bn1(torch.randn(2, 8, 3, 3)), ValueError, "expected 2D or 3D input"),
        (lambda: converted("in").bn1(torch.randn(8, 8)), ValueError, r"needs an \(N, C, L\) input"),
        (lambda: converted("bnet:3").bn1(torch.randn(8, 8)), ValueError, "over the 1 spatial dimensions"),
        (lambda: converted("ghost:3")(torch.ones(2, 3, 4).int()), RuntimeError, "Float|float|dtype|type"),
    ],
)
def test_bad_use_says_what_is_wrong(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_every_method_has_a_layer_and_a_case():
    assert {*METHOD_LAYERS} | {type(parse_target(s)) for s in PER_SAMPLE} == {*METHOD_CLASSES}
    assert {type(parse_target(s)) for s in METHODS} == {*METHOD_CLASSES}
    assert all("Source:" in layer.__doc__ for layer in METHOD_LAYERS.values())
