"""Plans written and run: what fails goes back, what passes stays."""

from __future__ import annotations

import dataclasses

import onnx
import precision_networks as networks
import pytest
import torch

from leannorm import execute_plan, plan_precision
from leannorm.deploy.precision import emulated_types, support
from leannorm.deploy.precision.execution import predicted_error
from leannorm.deploy.precision.layers import layers_of
from leannorm.deploy.runtime import Session

BATCHES = networks.batches(4)


@pytest.fixture
def planned(to_onnx, tmp_path):
    def make(model, **options):
        path = to_onnx(model, tmp_path / "fp32.onnx", BATCHES[0])
        return path, plan_precision(path, BATCHES, model=model, **options)

    return make


def believed(plan, position, kind, error):
    """The plan with a measurement replaced: a layer has a format that would have been rejected."""
    layer = plan.layers[position]
    candidates = tuple(
        dataclasses.replace(c, rejected=None, layer_error=error, model_error=error) if c.type == kind else c
        for c in layer.candidates
    )
    computed = support(layer.operator, kind).computed
    changed = dataclasses.replace(layer, type=kind, computed=computed, candidates=candidates)
    layers = tuple(changed if i == position else other for i, other in enumerate(plan.layers))
    return dataclasses.replace(plan, layers=layers)


def written(path):
    model = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    names = {1: "fp32", 3: "int8", 10: "fp16"}
    return {layer.name: names[kinds[layer.weight]] for layer in layers_of(model, any_type=True)}


def test_a_plan_that_passes_is_shipped_as_it_is(planned, tmp_path):
    path, plan = planned(networks.network(), types=("int8", "fp32"), max_error=0.1)
    done = execute_plan(plan, path, tmp_path / "mixed.onnx", BATCHES, BATCHES)
    assert done.passed
    assert done.trail == ()
    assert done.layers == plan.layers
    assert written(tmp_path / "mixed.onnx") == {layer.layer: "int8" for layer in plan.layers}
    assert 1e-3 < done.relative_error < 0.1
    assert done.rounded_error is None
    assert Session(tmp_path / "mixed.onnx")(torch.zeros(3, 3, 8, 8)).shape == (3, 10)


def test_a_layer_where_int8_fails_goes_back_and_the_others_stay(planned, tmp_path):
    path, plan = planned(networks.scaled(4, networks.hostile()), types=("int8", "fp32"), max_error=0.06)
    assert [layer.type for layer in plan.layers] == ["int8", "fp32", "fp32", "int8"]
    wrong = believed(plan, 1, "int8", 0.06)
    done = execute_plan(wrong, path, tmp_path / "mixed.onnx", BATCHES, BATCHES)
    (step,) = done.trail
    assert (step.layer, step.before, step.after, step.measured) == ("4", "int8", "fp32", True)
    assert step.error > 0.06
    assert step.failure.startswith("the relative error is")
    assert done.passed
    assert written(tmp_path / "mixed.onnx") == {"1": "int8", "4": "fp32", "7": "fp32", "10": "int8"}
    assert done.layers[1].reason.startswith("raised from int8: the relative error is")


def test_the_largest_error_goes_first_and_one_format_up(planned, tmp_path):
    path, plan = planned(networks.network(), types=("int8", "fp16", "fp32"), max_error=0.01)
    for i, error in enumerate((0.001, 0.004, 0.003, 0.002)):
        plan = believed(believed(plan, i, "fp16", 0.0001), i, "int8", error)
    done = execute_plan(plan, path, tmp_path / "mixed.onnx", BATCHES, BATCHES)
    assert done.passed
    assert len(done.trail) >= 1
    assert [step.layer for step in done.trail] == ["4", "7", "10", "1"][: len(done.trail)]
    assert {step.after for step in done.trail} == {"fp16"}


def test_the_same_plan_gives_the_same_file(planned, tmp_path):
    path, plan = planned(networks.network())
    done = [execute_plan(plan, path, tmp_path / f"{i}.onnx", BATCHES, BATCHES) for i in range(2)]
    assert done[0] == done[1]
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()


def test_hopeless_files_are_not_run(planned, tmp_path):
    path, plan = planned(networks.network(), types=("int8", "fp32"), max_error=0.01)
    wrong = believed(plan, 0, "int8", 0.5)
    assert predicted_error(wrong) > 0.5
    done = execute_plan(wrong, path, tmp_path / "mixed.onnx", BATCHES, BATCHES)
    assert (done.trail[0].layer, done.trail[0].measured) == ("1", False)
    assert done.trail[0].error == predicted_error(wrong)
    assert done.passed


def test_an_overflow_that_an_emulating_runtime_hides_is_found(planned, tmp_path):
    path, plan = planned(networks.scaled(4, torch.full((8,), 2e4)), types=("fp16", "fp32"))
    wrong = believed(plan, 1, "fp16", 1e-3)
    done = execute_plan(wrong, path, tmp_path / "mixed.onnx", BATCHES, BATCHES)
    assert done.trail[0].layer == "4"
    assert done.passed
    assert done.rounded_error is None or done.rounded_error < 0.01
    assert written(tmp_path / "mixed.onnx")["4"] == "fp32"
    if support("Conv", "fp16").computed == "emulated":
        # as this runtime computes the file, nothing is wrong with it
        assert done.trail[0].failure.startswith("rounded as the formats say, the relative error is nan")
        assert emulated_types(onnx.load(tmp_path / "mixed.onnx")) == ("fp16",)


def test_lost_accuracy_is_a_failure_too(planned, tmp_path):
    path, plan = planned(networks.network(), types=("int8", "fp32"), max_error=0.9)
    reference = Session(path)
    labelled = []
    for batch in BATCHES:
        logits = torch.as_tensor(reference(batch))
        close = logits.topk(2).values.diff().abs()[:, 0] < 0.05 * logits.std()  # these int8 may turn round
        labelled.append((batch[close], logits.argmax(1)[close]))
    labelled = [(x, y) for x, y in labelled if len(x)]
    done = execute_plan(plan, path, tmp_path / "mixed.onnx", BATCHES, labelled)
    assert done.passed
    assert done.trail
    assert all("points of accuracy" in step.failure for step in done.trail)


def test_what_cannot_pass_ends_in_fp32_and_says_so(planned, tmp_path):
    path, plan = planned(networks.network(), types=("int8", "fp32"), max_error=0.05)
    other = networks.network(seed=1)
    done = execute_plan(plan, path, tmp_path / "mixed.onnx", BATCHES, BATCHES, reference=other)
    assert not done.passed
    assert {layer.type for layer in done.layers} == {"fp32"}
    assert done.relative_error > 0.05
    assert (tmp_path / "mixed.onnx").exists()


def test_a_plan_of_another_file_is_refused(planned, to_onnx, tmp_path):
    _, plan = planned(networks.network())
    other = to_onnx(networks.network()[:6], tmp_path / "other.onnx", BATCHES[0])
    with pytest.raises(ValueError, match=r"the plan is of another file than .*other\.onnx"):
        execute_plan(plan, other, tmp_path / "mixed.onnx", BATCHES, BATCHES)


@pytest.mark.parametrize("position", [0, 1])
def test_batches_that_can_be_read_once_are_refused(planned, tmp_path, position):
    path, plan = planned(networks.network())
    given = [BATCHES, BATCHES]
    given[position] = iter(BATCHES)
    with pytest.raises(ValueError, match=f"{('batches', 'validation')[position]} are read several times"):
        execute_plan(plan, path, tmp_path / "mixed.onnx", *given)
