"""What fold does: the folded model computes the same, holds no batch normalization, and the original is untouched."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

import leannorm
from leannorm.graph import compare, fold
from leannorm.graph.batch_norm import find
from leannorm.records import Change

# torch.export.save, run_decompositions and deepcopy copy pytrees through a class that torch deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8, eps=1e-3),
            nn.ReLU(),
            nn.Conv2d(8, 6, 1),
            nn.BatchNorm2d(6),
        )
        self.fc = nn.Linear(6, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        return self.norm(self.fc(self.features(x).mean((2, 3))))


EVERY_LAYER = (
    Change("features.1", "folded into the conv2d features.0"),
    Change("features.4", "folded into the conv2d features.3"),
    Change("norm", "folded into the linear fc"),
)


def relative_error(reference, got):
    return ((got - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_a_module_gives_a_callable_module_for_any_batch(randomized, dtype, bound):
    model = randomized(Small()).to(dtype)
    folded, report = fold(model, torch.randn(1, 3, 8, 8, dtype=dtype))
    assert report.changes == EVERY_LAYER
    assert report.refusals == ()
    assert not list(find(folded.graph))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 8, 8, dtype=dtype)
        assert relative_error(model(x), folded(x)) < bound


def test_the_folded_model_keeps_the_layers_names(randomized):
    folded, _ = fold(randomized(Small()), torch.randn(2, 3, 8, 8))
    assert sorted(folded.state_dict()) == sorted(
        f"{layer}.{kind}" for layer in ("features.0", "features.3", "fc") for kind in ("weight", "bias")
    )


def test_the_input_is_not_changed_and_shares_nothing_with_the_result(randomized):
    model = randomized(Small())
    x = torch.randn(2, 3, 8, 8)
    state = copy.deepcopy(model.state_dict())
    folded, _ = fold(model, x)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    expected = folded(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(folded(x), expected)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_gives_a_program_that_saves_and_loads(randomized, decomposed):
    model = randomized(Small())
    program = export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: Dim("batch", max=64)},))
    if decomposed:
        program = program.run_decompositions()
    before = {name: value.clone() for name, value in program.state_dict.items()}
    folded, report = fold(program)
    assert [change.module for change in report.changes] == ["features.1", "features.4", "norm"]
    assert report.refusals == ()
    assert folded.range_constraints == program.range_constraints
    assert all(torch.equal(before[name], value) for name, value in program.state_dict.items())
    file = io.BytesIO()
    torch.export.save(folded, file)
    file.seek(0)
    x = torch.randn(5, 3, 8, 8)
    for result in (folded, torch.export.load(file)):
        assert relative_error(model(x), result.module()(x)) < 1e-6
        with pytest.raises(Exception, match="64"):
            result.module()(torch.randn(65, 3, 8, 8))


def test_a_program_without_decomposed_training_flag_is_read(randomized):
    class Native(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

        def forward(self, x):
            bn = self.bn
            args = (bn.weight, bn.bias, bn.running_mean, bn.running_var, False, 0.1, bn.eps)
            return torch.native_batch_norm(self.conv(x), *args)[0]

    model = randomized(Native())
    x = torch.randn(2, 3, 6, 6)
    folded, report = fold(model, x)
    assert len(report.changes) == 1
    assert relative_error(model(x), folded(x)) < 1e-6


def test_functional_batch_norm_is_folded_and_named_by_its_module(randomized):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)

        def forward(self, x):
            return F.batch_norm(self.conv(x), self.bn.running_mean, self.bn.running_var, eps=1e-2)

    model = randomized(nn.Sequential(Block(), nn.ReLU()))
    x = torch.randn(2, 3, 9)
    folded, report = fold(model, x)
    assert report.changes == (Change("0", "folded into the conv1d 0.conv"),)
    assert relative_error(model(x), folded(x)) < 1e-6


def test_a_converted_model_folds(randomized):
    model, _ = leannorm.convert(Small(), leannorm.GridSampling(1 / 4))
    model = randomized(model)
    x = torch.randn(2, 3, 8, 8)
    folded, report = fold(model, x)
    assert report.changes == EVERY_LAYER
    assert relative_error(model(x), folded(x)) < 1e-6


def test_a_new_bias_does_not_take_a_name_that_is_taken(randomized):
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(5, 3, 3, 3))
            self.bias = nn.Parameter(torch.tensor(0.5))
            self.bn = nn.BatchNorm2d(5)

        def forward(self, x):
            return self.bn(F.conv2d(x, self.kernel)) + self.bias

    model = randomized(Clash())
    x = torch.randn(2, 3, 8, 8)
    folded, _ = fold(model, x)
    assert sorted(folded.state_dict()) == ["bias", "bias_1", "kernel"]
    assert torch.equal(folded.state_dict()["bias"], torch.tensor(0.5))
    assert relative_error(model(x), folded(x)) < 1e-6


def test_a_half_precision_convolution_before_a_float32_norm_stays_half(randomized):
    model = randomized(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    model[0].to(torch.bfloat16)
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    folded, report = fold(model, x)
    assert len(report.changes) == 1
    assert {value.dtype for value in folded.state_dict().values()} == {torch.bfloat16}
    assert relative_error(model(x).double(), folded(x).double()) < 2e-2


def test_frozen_weights_held_as_buffers_fold(randomized):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(5, 3, 3, 3), persistent=False)
            self.bn = nn.BatchNorm2d(5)

        def forward(self, x):
            return self.bn(F.conv2d(x, self.weight))

    model = randomized(Frozen())
    x = torch.randn(2, 3, 8, 8)
    folded, report = fold(model, x)
    assert len(report.changes) == 1
    assert relative_error(model(x), folded(x)) < 1e-6


def test_several_inputs_and_nested_outputs(randomized):
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Small()

        def forward(self, x, options, scale):
            y = self.body(x + options["shift"])
            return {"logits": y, "scaled": (y * scale, 3)}

    model = randomized(TwoInputs())
    inputs = (torch.randn(1, 3, 8, 8), {"shift": torch.randn(1, 3, 8, 8)}, 2.0)
    folded, report = fold(model, inputs)
    assert len(report.changes) == 3
    assert report.refusals == ()
    inputs = (torch.randn(4, 3, 8, 8), {"shift": torch.randn(4, 3, 8, 8)}, 2.0)
    got, expected = folded(*inputs), model(*inputs)
    assert relative_error(expected["logits"], got["logits"]) < 1e-6
    assert got["scaled"][1] == 3


def test_dynamic_shapes_are_handed_on(randomized):
    model = randomized(Small())
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    folded, _ = fold(model, torch.randn(2, 3, 8, 8), dynamic_shapes=shapes)
    x = torch.randn(3, 3, 12, 10)
    assert relative_error(model(x), folded(x)) < 1e-6


def test_a_model_that_fixes_its_batch_says_so(randomized):
    class Fixed(nn.Sequential):
        def forward(self, x):
            return super().forward(x.reshape(1, 3, 8, 8))

    model = randomized(Fixed(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    x = torch.randn(1, 3, 8, 8)
    folded, report = fold(model, x)
    assert [change.module for change in report.changes] == ["1"]
    (refusal,) = report.refusals
    assert refusal.module == ""
    assert refusal.reason.startswith("the batch stays 1")
    assert relative_error(model(x), folded(x)) < 1e-6


def test_a_folded_module_copies_evaluates_and_refuses_to_train(randomized):
    folded, _ = fold(randomized(Small()), torch.randn(2, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    assert not folded.training
    assert torch.equal(copy.deepcopy(folded).eval()(x), folded(x))
    with pytest.raises(NotImplementedError, match="no training mode"):
        folded.train()


def test_a_no_grad_block_in_the_model_does_not_hide_its_layers(randomized):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), nn.Conv2d(5, 2, 1)

        def forward(self, x):
            with torch.no_grad():
                x = self.backbone(x)
            return self.head(x)

    _, report = fold(randomized(Frozen()), torch.randn(2, 3, 8, 8))
    assert [change.module for change in report.changes] == ["backbone.1"]


def test_example_inputs_are_required_and_programs_keep_their_shapes(randomized):
    model = randomized(Small())
    with pytest.raises(ValueError, match="example_inputs"):
        fold(model)
    program = export(model, (torch.randn(2, 3, 8, 8),))
    with pytest.raises(ValueError, match="dynamic_shapes"):
        fold(program, dynamic_shapes=({0: Dim.AUTO},))


def test_a_wrong_result_never_leaves(randomized, monkeypatch):
    from leannorm.graph import algebra

    right = algebra.scale_outputs
    monkeypatch.setattr(
        algebra, "scale_outputs", lambda *args, **options: tuple(1.001 * value for value in right(*args, **options))
    )
    with pytest.raises(RuntimeError, match="output 0 by a relative error of"):
        fold(randomized(Small()), torch.randn(2, 3, 8, 8))


def test_randomness_in_eval_mode_does_not_fail_the_check(randomized):
    class Noisy(Small):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5, training=True))

    model, x = randomized(Noisy()), torch.randn(2, 3, 8, 8)
    state = torch.get_rng_state()
    _, report = fold(model, x)
    assert report.changes == EVERY_LAYER
    assert torch.equal(torch.get_rng_state(), state)


def test_nan_in_one_of_two_outputs_is_a_difference():
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = torch.tensor(value)

        def forward(self, x):
            return self.value + x

    x = (torch.zeros(3),)
    compare.require_equal(Constant(float("nan")), Constant(float("nan")), x, {})
    with pytest.raises(RuntimeError, match="relative error of inf"):
        compare.require_equal(Constant(1.0), Constant(float("nan")), x, {})
    with pytest.raises(RuntimeError, match="shapes"):
        compare.require_equal(Constant(1.0), Constant([[1.0], [1.0]]), x, {})


def test_a_batch_norm_without_a_module_is_named_by_its_node():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x):
            return F.batch_norm(x, self.mean, self.var)

    _, report = fold(Bare().eval(), torch.randn(2, 3, 4, 4))
    reason = "it follows input (x), which cannot absorb it; its result is an output of the model"
    assert report.changes == (Change("batch_norm", f"replaced by a scale and a shift per channel: {reason}"),)
    assert report.refusals == ()


class Paired(nn.Module):
    """Its output shape ties the batch to a number of its code."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)).reshape(2, -1)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_that_only_a_guard_fixes_is_reported(batch):
    model, x = Paired().eval(), torch.randn(batch, 3, 8, 8)
    folded, report = leannorm.fold(model, (x,))
    assert [(r.module, r.reason.startswith(f"the batch stays {batch}")) for r in report.refusals] == [("", True)]
    torch.testing.assert_close(folded(x), model(x))


def test_a_batch_that_only_data_can_show_to_be_free_is_tried(randomized):
    class Counting(Small):
        def forward(self, x):
            y = super().forward(x)
            return y, torch.nonzero(y > 0)  # as many rows as there are: no shape without data

    model = randomized(Counting())
    folded, report = fold(model, torch.randn(1, 3, 8, 8))
    assert report.refusals == ()
    x = torch.randn(5, 3, 8, 8)
    assert relative_error(model(x)[0], folded(x)[0]) < 1e-6
