from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from leannorm import fold, verify


def constant(values):
    tensor = torch.tensor(values)
    return lambda x: tensor


def batches(*shapes, labels=None):
    return [(torch.zeros(shape), labels) for shape in shapes]


def test_relative_error_is_over_all_batches_and_not_the_mean_of_theirs():
    outputs = iter([[[3.0, 4.0]], [[0.0, 1.0]]])
    others = iter([[[3.0, 4.0]], [[0.0, 2.0]]])
    record = verify(
        lambda x: torch.tensor(next(outputs)), lambda x: torch.tensor(next(others)), batches((1, 2), (1, 2))
    )
    assert record.relative_error == pytest.approx(1 / math.sqrt(26))
    assert record.maximum_error == 1.0
    assert record.samples == 2
    assert not record.passed


def test_it_passes_at_the_bound_and_not_above():
    reference, candidate = constant([[4.0, 0.0]]), constant([[5.0, 0.0]])
    assert verify(reference, candidate, batches((1, 2)), max_error=0.25).passed
    assert not verify(reference, candidate, batches((1, 2)), max_error=0.2499).passed


def test_agreement_and_accuracies():
    reference = constant([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    candidate = constant([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    record = verify(reference, candidate, batches((4, 2), labels=torch.tensor([0, 1, 1, 0])))
    assert (record.argmax_agreement, record.reference_accuracy, record.candidate_accuracy) == (0.75, 0.5, 0.75)


def test_without_labels_or_classes_there_is_no_accuracy():
    model = constant([[1.0, 2.0]])
    record = verify(model, model, [torch.zeros(1, 2)])
    assert (record.argmax_agreement, record.reference_accuracy, record.candidate_accuracy) == (1.0, None, None)
    record = verify(constant([1.0]), constant([1.0]), [torch.zeros(1, 2)])
    assert record.argmax_agreement is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["reference", "candidate", "both"])
def test_nan_and_infinity_never_pass(value, where):
    good, bad = constant([[1.0, 2.0]]), constant([[1.0, value]])
    reference, candidate = (bad if where in (role, "both") else good for role in ("reference", "candidate"))
    assert not verify(reference, candidate, batches((1, 2), (1, 2)), max_error=1e6).passed


def test_a_nan_in_an_early_batch_stays_in_the_maximum():
    outputs = iter([[[math.nan, 1.0]], [[5.0, 1.0]]])
    record = verify(constant([[1.0, 1.0]]), lambda x: torch.tensor(next(outputs)), batches((1, 2), (1, 2)))
    assert math.isnan(record.maximum_error)


def test_a_zero_reference_needs_an_exact_candidate():
    zero = constant([[0.0, 0.0]])
    assert verify(zero, zero, batches((1, 2))).relative_error == 0
    assert verify(zero, constant([[0.0, 1e-9]]), batches((1, 2))).relative_error == math.inf


def test_modules_programs_and_arrays_compare():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 6, 6)
    folded, _ = fold(model, x)
    program = torch.export.export(model, (x,))
    inputs = [torch.randn(2, 3, 6, 6)]
    for candidate in (folded, program, program.module(), lambda x: model(x).detach().numpy()):
        assert verify(model, candidate, inputs, max_error=1e-5).passed
    assert verify(lambda x: {"a": np.float32(1.0)}, lambda x: {"a": np.float32(1.0)}, inputs).passed


@pytest.mark.parametrize("role", ["reference", "candidate"])
def test_training_mode_is_refused_with_the_module_that_is_in_it(role):
    good = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    bad = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    bad[1].train()
    models = (bad, good) if role == "reference" else (good, bad)
    with pytest.raises(ValueError, match=rf"the {role} is in training mode \(1\): call eval\(\)"):
        verify(*models, [torch.zeros(2, 2)])


@pytest.mark.parametrize(
    ("reference", "candidate", "inputs", "message"),
    [
        (constant([[1.0, 2.0]]), constant([[1.0]]), batches((1, 2)), r"same shapes, got \[\(1, 1\)\] and \[\(1, 2\)\]"),
        (constant([[1.0]]), lambda x: (torch.ones(1, 1), torch.ones(1)), batches((1, 1)), "same shapes"),
        (constant([[1.0]]), constant([[1.0]]), [], "no batches"),
        (constant([[1.0]]), constant([[1.0]]), batches((0, 1)), "no batches"),
        (constant([[1]]), constant([[1]]), batches((1, 1)), "no floating tensor"),
        (
            constant([[1.0, 2.0]]),
            constant([[1.0, 2.0]]),
            batches((1, 2), labels=torch.zeros(3, dtype=torch.int64)),
            "labels",
        ),
        (
            constant([[1.0, 2.0]]),
            constant([[1.0, 2.0]]),
            batches((1, 2), labels=torch.zeros(1)),
            "labels must be integers",
        ),
        (constant([[1.0]]), constant([[1.0]]), [(torch.zeros(1), None, None)], r"a tensor or \(inputs, labels\)"),
    ],
)
def test_what_cannot_be_compared_is_an_error(reference, candidate, inputs, message):
    with pytest.raises(ValueError, match=message):
        verify(reference, candidate, inputs)


@pytest.mark.parametrize("max_error", [-1.0, math.nan, math.inf])
def test_max_error_must_bound_something(max_error):
    with pytest.raises(ValueError, match="max_error"):
        verify(constant([[1.0]]), constant([[1.0]]), batches((1, 1)), max_error=max_error)


def test_several_arguments_are_handed_on():
    record = verify(lambda x, y: x + y, lambda x, y: y + x, [((torch.ones(3, 2), torch.ones(3, 2)), None)])
    assert record.samples == 3
    assert record.relative_error == 0


def test_verify_and_fold_need_no_onnx():
    code = (
        "import sys, leannorm; leannorm.verify, leannorm.fold; "
        "sys.exit(', '.join({'onnx', 'onnxruntime', 'onnxscript', 'lightning'} & sys.modules.keys()) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
